"""What the cpu backend is made of: the native module, and one file for each family of kernels."""
