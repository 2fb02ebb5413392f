"""Collectives that send codes instead of numbers, around any others.

[Note: Compressed collectives]
Weights are gathered as payloads: each rank codes its shard once, and all ranks, its owner included, decode the same
bytes, so that what they compute with is equal to the bit. Gradients are reduced by an exchange of payloads: each rank
codes the slice of every other rank, which decodes them and adds in float32: its own slice, as it is, then those of the
others in the order of ranks. Sums are reproducible, but depend on the number of ranks. All other calls are exact, and
so are tensors that are neither float32 nor bfloat16 nor float16.
"""
