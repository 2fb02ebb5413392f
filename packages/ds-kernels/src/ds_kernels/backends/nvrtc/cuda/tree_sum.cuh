// Sum of up to eight arrays in float32 along a fixed binary tree, in one pass over memory: neighbours first, as in
// csrc/tree_sum.h. Longer sums are made of these: eight arrays are a whole subtree.
#pragma once

#include "packet.cuh"

namespace ds_kernels {

constexpr int kMaxPieces = 8;

struct TreeSumArgs {
    const void* pieces[kMaxPieces];
    void* out;
    Size numel;
    int num_pieces;
};

// Leaves of the left subtree: the largest power of two below `count`.
__device__ constexpr int left_of(int count) { return count > 4 ? 4 : count > 2 ? 2 : 1; }

template <int count>
__device__ inline Packet tree_of(const Packet* pieces) {
    if constexpr (count == 1) {
        return pieces[0];
    } else {
        const Packet left = tree_of<left_of(count)>(pieces);
        const Packet right = tree_of<count - left_of(count)>(pieces + left_of(count));
        Packet sum;
#pragma unroll
        for (int k = 0; k < kPacket; ++k) sum.at[k] = left.at[k] + right.at[k];
        return sum;
    }
}

template <class Piece, class Out, int count>
__device__ inline void sum_pieces(const TreeSumArgs& args, Size begin) {
    const int filled = args.numel - begin < kPacket ? int(args.numel - begin) : kPacket;
    auto* const out = static_cast<typename Out::Storage*>(args.out);
    bool whole = filled == kPacket && packet_aligned<Out>(out);
#pragma unroll
    for (int i = 0; i < count; ++i) {
        whole = whole && packet_aligned<Piece>(static_cast<const typename Piece::Storage*>(args.pieces[i]));
    }
    Packet pieces[count];
#pragma unroll
    for (int i = 0; i < count; ++i) {
        const auto* const piece = global(static_cast<const typename Piece::Storage*>(args.pieces[i]));
        pieces[i] = load<Piece>(piece + begin, whole, filled);
    }
    store<Out>(out + begin, tree_of<count>(pieces), whole, filled);
}

template <class Piece, class Out>
__device__ inline void tree_sum(const TreeSumArgs& args) {
    const Size begin = thread_index() * kPacket;
    if (begin >= args.numel) {
        return;
    }
    switch (args.num_pieces) {
        case 1: return sum_pieces<Piece, Out, 1>(args, begin);
        case 2: return sum_pieces<Piece, Out, 2>(args, begin);
        case 3: return sum_pieces<Piece, Out, 3>(args, begin);
        case 4: return sum_pieces<Piece, Out, 4>(args, begin);
        case 5: return sum_pieces<Piece, Out, 5>(args, begin);
        case 6: return sum_pieces<Piece, Out, 6>(args, begin);
        case 7: return sum_pieces<Piece, Out, 7>(args, begin);
        default: return sum_pieces<Piece, Out, 8>(args, begin);
    }
}

}  // namespace ds_kernels
