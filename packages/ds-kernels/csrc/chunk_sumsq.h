// Sums of squares of consecutive chunks in float64, each along a fixed binary tree.
//
// The tree is that of [Note: Square tree] in backends/plain/sums.py. Squares of float32 numbers are exact in float64
// (48 bits), so fused multiply-adds would change nothing.
#pragma once

#include <cstddef>

#include "float_format.h"

namespace {

constexpr std::size_t kSquareBlock = 64;

template <class Format>
inline double block_sumsq(const typename Format::Storage* x) {
    double sum[kSquareBlock / 2];
    for (std::size_t i = 0; i < 32; ++i) {
        const double low = Format::widen(x[i]);
        const double high = Format::widen(x[i + 32]);
        sum[i] = low * low + high * high;
    }
    for (std::size_t i = 0; i < 16; ++i) sum[i] += sum[i + 16];
    for (std::size_t i = 0; i < 8; ++i) sum[i] += sum[i + 8];
    for (std::size_t i = 0; i < 4; ++i) sum[i] += sum[i + 4];
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

template <class Format>
double tree_sumsq(const typename Format::Storage* x, std::size_t blocks) {
    if (blocks == 1) {
        return block_sumsq<Format>(x);
    }
    if (blocks % 2 == 1) {
        return tree_sumsq<Format>(x, blocks - 1) + block_sumsq<Format>(x + (blocks - 1) * kSquareBlock);
    }
    return tree_sumsq<Format>(x, blocks / 2) + tree_sumsq<Format>(x + blocks / 2 * kSquareBlock, blocks / 2);
}

template <class Format>
void chunk_sumsq(const void* x, double* sums, std::size_t chunk, std::size_t begin, std::size_t end) {
    const auto* const data = static_cast<const typename Format::Storage*>(x);
    for (std::size_t i = begin; i < end; ++i) {
        sums[i] = tree_sumsq<Format>(data + i * chunk, chunk / kSquareBlock);
    }
}

}  // namespace
