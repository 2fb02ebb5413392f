// One step of an optimizer over an array, in one pass over memory: read, decode, step, encode, write.
//
// A thread steps four neighbouring elements. Formats are template arguments, so a kernel has no branches for them, and
// each combination is compiled at its first use.
#pragma once

#include "state_codecs.cuh"
#include "step_formulas.cuh"

namespace ds_kernels {

constexpr int kStepThreads = 256;

template <class Scalars>
struct StepArgs {
    Operand param;
    Operand grad;
    Operand states[2];
    Operand copy;      // written only
    double* squares;   // two sums for each kSquareChunk elements; null where the step makes none
    Size numel;
    Size zero_grad;    // not 0: the gradient becomes 0
    Scalars scalars;
};

constexpr Size kSquareChunk = 512;
constexpr unsigned kChunkThreads = kSquareChunk / kPacket;
constexpr unsigned kWarp = 32;

// Along [Note: Square tree] in backends/plain/sums.py over the elements of a warp, which are two leaves of 64.
__device__ inline double warp_sumsq(const Packet& x) {
    double sum[kPacket];
#pragma unroll
    for (int k = 0; k < kPacket; ++k) sum[k] = double(x.at[k]) * double(x.at[k]);
#pragma unroll
    for (int apart = 8; apart > 0; apart /= 2) {
#pragma unroll
        for (int k = 0; k < kPacket; ++k) sum[k] += __shfl_xor_sync(~0u, sum[k], apart);
    }
    const double leaf = (sum[0] + sum[2]) + (sum[1] + sum[3]);
    return leaf + __shfl_xor_sync(~0u, leaf, 16);
}

// Writes the sums of squares of this block's chunks.
__device__ inline void write_squares(const Packet& param, const Packet& direction, double* squares, Size numel) {
    __shared__ double sums[2][kStepThreads / kWarp];
    const double of_param = warp_sumsq(param), of_direction = warp_sumsq(direction);
    if (threadIdx.x % kWarp == 0) {
        sums[0][threadIdx.x / kWarp] = of_param;
        sums[1][threadIdx.x / kWarp] = of_direction;
    }
    __syncthreads();
    const Size chunk = thread_index() / kChunkThreads;
    const unsigned which = threadIdx.x % kChunkThreads;
    if (which < 2 && chunk * kSquareChunk < numel) {
        const double* const of = sums[which] + threadIdx.x / kChunkThreads * (kChunkThreads / kWarp);
        squares[2 * chunk + which] = (of[0] + of[1]) + (of[2] + of[3]);
    }
}

template <class Step, class Param, class Grad, class Copy, class First, class Second>
__device__ inline void step(const StepArgs<typename Step::Scalars>& args) {
    constexpr bool together = Codec<First>::kGrouped || Codec<Second>::kGrouped || Step::kSquares;
    const Size begin = thread_index() * kPacket;
    if (!together && begin >= args.numel) {
        return;
    }
    const Size left = begin < args.numel ? args.numel - begin : 0;
    const int count = left < kPacket ? int(left) : kPacket;
    const bool aligned = Codec<Param>::aligned(args.param) && Codec<Grad>::aligned(args.grad) &&
                         Codec<Copy>::aligned(args.copy) && Codec<First>::aligned(args.states[0]) &&
                         Codec<Second>::aligned(args.states[1]);
    const bool whole = aligned && count == kPacket;

    Packet p = Codec<Param>::read(args.param, begin, whole, count);
    const Packet g = Codec<Grad>::read(args.grad, begin, whole, count);
    Packet first = Codec<First>::read(args.states[0], begin, whole, count);
    Packet second = Codec<Second>::read(args.states[1], begin, whole, count);
#pragma unroll
    for (int k = 0; k < kPacket; ++k) {
        Step::element(args.scalars, g.at[k], p.at[k], first.at[k], second.at[k]);
    }
    if constexpr (Step::kSquares) {
        Packet direction{};
#pragma unroll
        for (int k = 0; k < kPacket; ++k) {
            if (k < count) direction.at[k] = Step::direction(args.scalars, p.at[k], first.at[k], second.at[k]);
        }
        write_squares(p, direction, args.squares, args.numel);
    }
    if constexpr (Step::kWritesStates) {
        Codec<First>::write(args.states[0], begin, first, whole, count);
        Codec<Second>::write(args.states[1], begin, second, whole, count);
    }
    if constexpr (Step::kWritesParam) {
        Codec<Param>::write(args.param, begin, p, whole, count);
        Codec<Copy>::write(args.copy, begin, p, whole, count);
    }
    if (args.zero_grad) {
        Codec<Grad>::write(args.grad, begin, Packet{}, whole, count);
    }
}

}  // namespace ds_kernels
