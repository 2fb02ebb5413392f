// Instantiates every kernel for the instruction set of the including file, and lists them in a table.
#pragma once

#include "adam.h"
#include "chunk_sumsq.h"
#include "kernel_table.h"
#include "tree_sum.h"

namespace {

#define DS_KERNELS_ADAM(Grad, Copy) {adam<Grad, Copy, false>, adam<Grad, Copy, true>}
#define DS_KERNELS_ADAM_ROW(Grad) \
    {DS_KERNELS_ADAM(Grad, Float32), DS_KERNELS_ADAM(Grad, BFloat16), DS_KERNELS_ADAM(Grad, Float16)}
#define DS_KERNELS_TREE_SUM_ROW(Piece) {tree_sum<Piece, Float32>, tree_sum<Piece, BFloat16>, tree_sum<Piece, Float16>}

// A macro and not a function: the table must be a constant in the file, because code that runs while the
// module is loaded must not use instructions the processor may lack.
#define DS_KERNELS_TABLE(name)                                                                              \
    {                                                                                                       \
        name, {DS_KERNELS_ADAM_ROW(Float32), DS_KERNELS_ADAM_ROW(BFloat16), DS_KERNELS_ADAM_ROW(Float16)},  \
            {DS_KERNELS_TREE_SUM_ROW(Float32), DS_KERNELS_TREE_SUM_ROW(BFloat16),                           \
             DS_KERNELS_TREE_SUM_ROW(Float16)},                                                             \
        {                                                                                                   \
            chunk_sumsq<Float32>, chunk_sumsq<BFloat16>, chunk_sumsq<Float16>                               \
        }                                                                                                   \
    }

}  // namespace
