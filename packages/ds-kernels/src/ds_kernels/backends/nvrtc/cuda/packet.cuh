// Four neighbouring elements: one memory access of 16 bytes in float32, of 8 in the half formats.
//
// Neighbouring threads read neighbouring packets, so a warp's access is one contiguous stretch in every format.
#pragma once

#include "formats.cuh"

namespace ds_kernels {

constexpr int kPacket = 4;

struct Packet {
    float at[kPacket];
};

template <class Format>
__device__ inline bool packet_aligned(const typename Format::Storage* pointer) {
    return reinterpret_cast<Size>(pointer) % (kPacket * sizeof(typename Format::Storage)) == 0;
}

// Written out because the compiler splits some of these accesses when it is left to find them.
__device__ inline void load_aligned(const float* from, float* to) {
#if defined(__CUDA_ARCH__)
    asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
                 : "l"(__cvta_generic_to_global(from)));
#else
    for (int k = 0; k < kPacket; ++k) to[k] = from[k];
#endif
}

__device__ inline void load_aligned(const unsigned short* from, unsigned short* to) {
#if defined(__CUDA_ARCH__)
    asm volatile("ld.global.v4.u16 {%0, %1, %2, %3}, [%4];"
                 : "=h"(to[0]), "=h"(to[1]), "=h"(to[2]), "=h"(to[3])
                 : "l"(__cvta_generic_to_global(from)));
#else
    for (int k = 0; k < kPacket; ++k) to[k] = from[k];
#endif
}

__device__ inline void store_aligned(float* to, const float* from) {
#if defined(__CUDA_ARCH__)
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "f"(from[0]),
                 "f"(from[1]), "f"(from[2]), "f"(from[3])
                 : "memory");
#else
    for (int k = 0; k < kPacket; ++k) to[k] = from[k];
#endif
}

__device__ inline void store_aligned(unsigned short* to, const unsigned short* from) {
#if defined(__CUDA_ARCH__)
    asm volatile("st.global.v4.u16 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "h"(from[0]),
                 "h"(from[1]), "h"(from[2]), "h"(from[3])
                 : "memory");
#else
    for (int k = 0; k < kPacket; ++k) to[k] = from[k];
#endif
}

// The first `count` of four elements from `at`; `whole`: all four, and the address is aligned.
template <class Format>
__device__ inline Packet load(const typename Format::Storage* at, bool whole, int count) {
    Packet packet;
    if (whole) {
        typename Format::Storage stored[kPacket];
        load_aligned(at, stored);
#pragma unroll
        for (int k = 0; k < kPacket; ++k) packet.at[k] = Format::widen(stored[k]);
    } else {
#pragma unroll
        for (int k = 0; k < kPacket; ++k) packet.at[k] = k < count ? Format::widen(at[k]) : 0.0f;
    }
    return packet;
}

template <class Format>
__device__ inline void store(typename Format::Storage* at, const Packet& packet, bool whole, int count) {
    typename Format::Storage stored[kPacket];
#pragma unroll
    for (int k = 0; k < kPacket; ++k) stored[k] = Format::narrow(packet.at[k]);
    if (whole) {
        store_aligned(at, stored);
    } else {
#pragma unroll
        for (int k = 0; k < kPacket; ++k) {
            if (k < count) at[k] = stored[k];
        }
    }
}

}  // namespace ds_kernels
