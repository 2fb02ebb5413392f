"""The built-in kernel backends."""
