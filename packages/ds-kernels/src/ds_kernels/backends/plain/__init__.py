"""What the reference backend is made of: one file for each family of kernels, in plain torch."""
