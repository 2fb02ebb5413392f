"""The triton backend: kernels for every GPU that Triton compiles for, taken where the nvrtc backend cannot run."""
