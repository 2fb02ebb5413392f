// Sums along fixed trees: what each instruction set provides.
#pragma once

#include <cstddef>

#include "formats.h"

namespace ds_kernels {

// Sums elements begin <= i < end.
using TreeSumKernel = void (*)(void* out, const void* const* pieces, std::size_t num_pieces, std::size_t begin,
                               std::size_t end);
// Sums chunks begin <= i < end.
using ChunkSumsqKernel = void (*)(const void* x, double* sums, std::size_t chunk, std::size_t begin,
                                  std::size_t end);

struct ReductionTable {
    TreeSumKernel tree_sum[kNumFormats][kNumFormats];  // [pieces][out]
    ChunkSumsqKernel chunk_sumsq[kNumFormats];         // [x]
};

}  // namespace ds_kernels
