"""The cutlass backend: matrix products with what follows them fused, from CUTLASS's templates; only when chosen."""
