"""The nvrtc backend: kernels in CUDA C++, compiled at their first use for the GPU that is there, kept on disk."""
