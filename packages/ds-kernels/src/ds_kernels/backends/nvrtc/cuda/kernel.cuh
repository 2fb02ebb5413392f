// How a kernel is made from a function template: one struct goes in by value, its layout as in Python.
//
// No header of CUDA's or of the standard library is included anywhere here, so NVRTC alone compiles these files; nvcc
// does, too, and a C++ compiler for the tests that run kernels on the CPU (they define DS_KERNELS_DEVICE_HEADER).
#pragma once

#if defined(DS_KERNELS_DEVICE_HEADER)
#include DS_KERNELS_DEVICE_HEADER
#else
// `bounds`: (threads of a block), or (threads, blocks that a multiprocessor must have room for).
#define DS_KERNELS_ENTRY(name, bounds, Args, ...)                                                  \
    extern "C" __global__ void __launch_bounds__ bounds name(const __grid_constant__ Args args) {  \
        __VA_ARGS__(args);                                                                         \
    }
#endif

namespace ds_kernels {

using Size = unsigned long long;

// Index of this thread among all of a one-dimensional grid.
__device__ inline Size thread_index() { return Size(blockIdx.x) * blockDim.x + threadIdx.x; }

// The compiler cannot see that an address it reads from memory or from a table lies in global memory.
template <class T>
__device__ inline T* global(T* pointer) {
#if defined(__CUDA_ARCH__)
    __builtin_assume(__isGlobal(pointer));
#endif
    return pointer;
}

}  // namespace ds_kernels
