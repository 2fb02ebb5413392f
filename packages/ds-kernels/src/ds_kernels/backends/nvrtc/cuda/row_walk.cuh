// How a block of threads goes over one row: packets that each thread has, sums over all of them.
//
// A thread keeps its first packets in registers, so rows of up to 16 elements a thread are read from memory once; the rest
// of a longer row is read again, from a cache.
#pragma once

#include "packet.cuh"

namespace ds_kernels {

constexpr int kKept = 4;  // packets of a row that a thread keeps

struct Sum {
    __device__ static float of(float a, float b) { return a + b; }
};

struct Largest {  // of two numbers; a NaN in second place is passed over
    __device__ static float of(float a, float b) { return b > a ? b : a; }
};

// Given to all threads of the block, the same bits to each.
template <class Join, int threads>
__device__ inline float block_joined(float value) {
    __shared__ float warps[threads / 32];
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) value = Join::of(value, __shfl_xor_sync(~0u, value, apart));
    if constexpr (threads == 32) {
        return value;
    } else {
        __syncthreads();  // the sum before this one has been read
        if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
        __syncthreads();
        float joined = warps[0];
#pragma unroll
        for (int i = 1; i < threads / 32; ++i) joined = Join::of(joined, warps[i]);
        return joined;
    }
}

template <int threads>
__device__ inline float block_sum(float value) {
    return block_joined<Sum, threads>(value);
}

// The packets of one row that one thread has: `body(column, count, packet)` for each, a packet kept where it fits.
template <int threads>
struct RowWalk {
    Size columns;
    bool aligned;

    template <class Body>
    __device__ void each(Body body) const {
#pragma unroll
        for (int k = 0; k < kKept; ++k) visit((Size(k) * threads + threadIdx.x) * kPacket, k, body);
        for (Size at = (Size(kKept) * threads + threadIdx.x) * kPacket; at < columns; at += threads * kPacket) {
            visit(at, kKept, body);
        }
    }

  private:
    template <class Body>
    __device__ void visit(Size column, int k, Body body) const {
        if (column < columns) {
            const int count = columns - column < kPacket ? int(columns - column) : kPacket;
            body(column, k, aligned && count == kPacket, count);
        }
    }
};

template <class Format>
__device__ inline Packet load_or(const void* base, Size at, bool whole, int count, float otherwise) {
    if (base == nullptr) {
        return Packet{{otherwise, otherwise, otherwise, otherwise}};
    }
    return load<Format>(static_cast<const typename Format::Storage*>(base) + at, whole, count);
}

template <class Format>
__device__ inline bool aligned_or_null(const void* base) {
    return packet_aligned<Format>(static_cast<const typename Format::Storage*>(base));
}

}  // namespace ds_kernels
