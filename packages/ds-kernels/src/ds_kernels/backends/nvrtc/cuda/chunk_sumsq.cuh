// Sums of squares of consecutive chunks in float64, each along the tree of [Note: Square tree] in backends/reference.py.
//
// One block sums one chunk. Eight threads hold a leaf of 64 elements: thread t has elements 4t ... 4t+3 and those 32
// further on, so elements that meet 32, 2 and 1 apart are in one thread, those 16, 8 and 4 apart in threads 4, 2 and 1
// apart. Squares of float32 numbers are exact in float64, so fused multiply-adds would change nothing.
#pragma once

#include "packet.cuh"

namespace ds_kernels {

constexpr int kSquareLeaf = 64;
constexpr int kSquareThreads = 128;
constexpr int kMaxLeaves = 1024;

struct ChunkSumsqArgs {
    const void* x;
    double* sums;
    unsigned leaves;  // of a chunk, at most kMaxLeaves
};

// Given to all eight threads of the leaf.
template <class Format>
__device__ inline double leaf_sumsq(const typename Format::Storage* leaf, int thread, bool aligned) {
    const Packet low = load<Format>(leaf + kPacket * thread, aligned, kPacket);
    const Packet high = load<Format>(leaf + kPacket * thread + kSquareLeaf / 2, aligned, kPacket);
    double sum[kPacket];
#pragma unroll
    for (int k = 0; k < kPacket; ++k) {
        sum[k] = double(low.at[k]) * double(low.at[k]) + double(high.at[k]) * double(high.at[k]);
    }
#pragma unroll
    for (int apart = 4; apart > 0; apart /= 2) {
#pragma unroll
        for (int k = 0; k < kPacket; ++k) sum[k] += __shfl_xor_sync(~0u, sum[k], apart);
    }
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

// The tree over leaves, in place: T(n) stands where its first leaf stood. Its levels from below are the steps of the
// halving from above, n to n / 2 or to n - 1, backwards; `size` leaves are summed before a step.
__device__ inline void sum_leaves(double* leaf, unsigned leaves) {
    unsigned levels = 0;
    for (unsigned n = leaves; n > 1; n = n % 2 ? n - 1 : n / 2) ++levels;
    for (unsigned level = levels; level > 0; --level) {
        // Down from the top to this level: where run `thread` of it starts, and how long its left part is.
        for (unsigned run = threadIdx.x;; run += blockDim.x) {
            unsigned n = leaves, start = 0, rest = run;
            for (unsigned above = 1; above < level; ++above) {
                if (n % 2) {
                    n -= 1;
                } else {
                    n /= 2;
                    start += rest % 2 ? n : 0;
                    rest /= 2;
                }
            }
            if (rest > 0) {
                break;
            }
            leaf[start] += leaf[start + (n % 2 ? n - 1 : n / 2)];
        }
        __syncthreads();
    }
}

template <class Format>
__device__ inline void chunk_sumsq(const ChunkSumsqArgs& args) {
    __shared__ double leaf[kMaxLeaves];
    constexpr unsigned kThreadsPerLeaf = 8;
    constexpr unsigned kLeavesAtOnce = kSquareThreads / kThreadsPerLeaf;
    const auto* const x = static_cast<const typename Format::Storage*>(args.x) +
                          Size(blockIdx.x) * args.leaves * kSquareLeaf;
    const bool aligned = packet_aligned<Format>(x);
    const unsigned mine = threadIdx.x / kThreadsPerLeaf, thread = threadIdx.x % kThreadsPerLeaf;
    for (unsigned first = 0; first < args.leaves; first += kLeavesAtOnce) {
        // Threads beyond the last leaf read it again: all of a warp must take part.
        const unsigned index = first + mine < args.leaves ? first + mine : args.leaves - 1;
        const double sum = leaf_sumsq<Format>(x + Size(index) * kSquareLeaf, int(thread), aligned);
        if (thread == 0) leaf[index] = sum;
    }
    __syncthreads();
    sum_leaves(leaf, args.leaves);
    if (threadIdx.x == 0) args.sums[blockIdx.x] = leaf[0];
}

}  // namespace ds_kernels
