// Sum of several arrays in float32 along a fixed binary tree, in one pass over memory.
//
// The tree is the one a binary counter makes over the piece index: neighbours first, ((0+1)+(2+3))+(4+5).
#pragma once

#include <cstddef>

#include "float_format.h"

namespace {

// Pieces are read in aligned groups of this many, which are whole subtrees; up to so many need no buffers.
constexpr std::size_t kGroup = 8;
constexpr std::size_t kBlock = 1024;    // floats of a partial sum: a few of them stay in the first-level cache
constexpr std::size_t kMaxLevels = 24;  // partial sums held at a time: enough for kGroup * 2^23 pieces

// Leaves of the left subtree: the largest power of two below `count`.
constexpr std::size_t left_of(std::size_t count) { return count > 4 ? 4 : count > 2 ? 2 : 1; }

// Element i of the sum of `count` neighbouring pieces.
template <std::size_t count, class Piece>
inline float sum_at(const typename Piece::Storage* const* pieces, std::size_t i) {
    if constexpr (count == 1) {
        return Piece::widen(pieces[0][i]);
    } else {
        constexpr std::size_t left = left_of(count);
        return sum_at<left, Piece>(pieces, i) + sum_at<count - left, Piece>(pieces + left, i);
    }
}

template <std::size_t count, class Piece, class Out>
void sum_pieces(typename Out::Storage* out, const void* const* pieces, std::size_t offset, std::size_t n) {
    const typename Piece::Storage* at[count];
    for (std::size_t k = 0; k < count; ++k) {
        at[k] = static_cast<const typename Piece::Storage*>(pieces[k]) + offset;
    }
#pragma omp simd
    for (std::size_t i = 0; i < n; ++i) {
        out[i] = Out::narrow(sum_at<count, Piece>(at, i));
    }
}

template <class Piece, class Out>
void sum_group(typename Out::Storage* out, const void* const* pieces, std::size_t count, std::size_t offset,
               std::size_t n) {
    switch (count) {
        case 1: return sum_pieces<1, Piece, Out>(out, pieces, offset, n);
        case 2: return sum_pieces<2, Piece, Out>(out, pieces, offset, n);
        case 3: return sum_pieces<3, Piece, Out>(out, pieces, offset, n);
        case 4: return sum_pieces<4, Piece, Out>(out, pieces, offset, n);
        case 5: return sum_pieces<5, Piece, Out>(out, pieces, offset, n);
        case 6: return sum_pieces<6, Piece, Out>(out, pieces, offset, n);
        case 7: return sum_pieces<7, Piece, Out>(out, pieces, offset, n);
        default: return sum_pieces<8, Piece, Out>(out, pieces, offset, n);
    }
}

template <class Piece, class Out>
void tree_sum(void* out_data, const void* const* pieces, std::size_t num_pieces, std::size_t begin,
              std::size_t end) {
    auto* const out = static_cast<typename Out::Storage*>(out_data);
    if (num_pieces <= kGroup) {
        return sum_group<Piece, Out>(out + begin, pieces, num_pieces, begin, end - begin);
    }
    float partial[kMaxLevels][kBlock];
    const void* const levels[] = {partial};
    for (std::size_t at = begin; at < end; at += kBlock) {
        const std::size_t n = end - at < kBlock ? end - at : kBlock;
        std::size_t held = 0;
        const auto merge = [&] {
            --held;
            const void* const pair[] = {partial[held - 1], partial[held]};
            sum_pieces<2, Float32, Float32>(partial[held - 1], pair, 0, n);
        };
        for (std::size_t first = 0; first < num_pieces; first += kGroup) {
            const std::size_t count = num_pieces - first < kGroup ? num_pieces - first : kGroup;
            sum_group<Piece, Float32>(partial[held], pieces + first, count, at, n);
            ++held;
            for (std::size_t carry = first / kGroup; carry & 1; carry >>= 1) {
                merge();
            }
        }
        while (held > 1) {
            merge();
        }
        sum_pieces<1, Float32, Out>(out + at, levels, 0, n);
    }
}

}  // namespace
