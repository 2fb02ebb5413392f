"""Optimizers for slow links over partitioned state: plugins of ds-core, stepped by ds-zero."""
