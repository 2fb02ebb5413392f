// Instantiates the sums for the instruction set of the including file.
#pragma once

#include "chunk_sumsq.h"
#include "tree_sum.h"

#define DS_KERNELS_TREE_SUM_ROW(Piece) {tree_sum<Piece, Float32>, tree_sum<Piece, BFloat16>, tree_sum<Piece, Float16>}
#define DS_KERNELS_REDUCTIONS                                                               \
    {                                                                                       \
        {DS_KERNELS_TREE_SUM_ROW(Float32), DS_KERNELS_TREE_SUM_ROW(BFloat16),               \
         DS_KERNELS_TREE_SUM_ROW(Float16)},                                                 \
        {                                                                                   \
            chunk_sumsq<Float32>, chunk_sumsq<BFloat16>, chunk_sumsq<Float16>               \
        }                                                                                   \
    }
