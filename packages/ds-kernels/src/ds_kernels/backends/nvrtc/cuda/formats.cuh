// Storage formats of floating-point arrays: how one element becomes a float and back, with the bits of
// csrc/float_format.h. Narrowing rounds to nearest, ties to even; every NaN becomes the one canonical quiet NaN.
#pragma once

#include "kernel.cuh"

namespace ds_kernels {

// Compared as integers, NaN is the largest magnitude.
__device__ inline unsigned magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }
__device__ inline float magnitude(float x) { return __uint_as_float(magnitude_bits(x)); }
__device__ inline unsigned larger(unsigned a, unsigned b) { return a > b ? a : b; }

struct Float32 {
    using Storage = float;
    __device__ static float widen(float stored) { return stored; }
    __device__ static float narrow(float value) { return value; }
};

struct BFloat16 {
    using Storage = unsigned short;

    __device__ static float widen(unsigned short stored) { return __uint_as_float(unsigned(stored) << 16); }

    __device__ static unsigned short narrow(float value) {
#if defined(__CUDA_ARCH__)
        unsigned short rounded;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(value));
        return value == value ? rounded : 0x7fc0u;
#else
        const unsigned bits = __float_as_uint(value);
        const unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        return (unsigned short)(value == value ? rounded : 0x7fc0u);
#endif
    }
};

struct Float16 {
    using Storage = unsigned short;

    __device__ static float widen(unsigned short stored) {
#if defined(__CUDA_ARCH__)
        float value;
        asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(stored));
        return value;
#else
        const unsigned sign = unsigned(stored & 0x8000u) << 16;
        const unsigned rest = unsigned(stored & 0x7fffu) << 13;
        const unsigned finite = __float_as_uint(__uint_as_float(rest) * 0x1p112f);
        return __uint_as_float((rest < 0x0f800000u ? finite : rest | 0x7f800000u) | sign);
#endif
    }

    __device__ static unsigned short narrow(float value) {
#if defined(__CUDA_ARCH__)
        unsigned short rounded;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded) : "f"(value));
        return value == value ? rounded : 0x7e00u;
#else
        const unsigned bits = __float_as_uint(value);
        const unsigned sign = (bits >> 16) & 0x8000u;
        const unsigned size = bits & 0x7fffffffu;
        const unsigned normal = (size - (112u << 23) + 0x0fffu + ((size >> 13) & 1u)) >> 13;
        const unsigned subnormal = __float_as_uint(__uint_as_float(size) + 0.5f) - 0x3f000000u;
        const unsigned finite = size < 0x38800000u ? subnormal : normal;
        const unsigned half = size < 0x47800000u ? finite : 0x7c00u;
        return (unsigned short)(size > 0x7f800000u ? 0x7e00u : half | sign);
#endif
    }
};

}  // namespace ds_kernels
