// Norms of rows: what each instruction set provides.
#pragma once

#include <cstddef>

#include "formats.h"

namespace ds_kernels {

struct NormArgs {
    const void* x;
    const void* residual;  // added to x before, or null
    const void* weight;    // one number for each column, or null
    const void* bias;      // the same
    void* out;
    void* sum;             // x + residual, or null
    float* mean;           // of each row; null for rms_norm
    float* scale;          // 1 / sqrt(variance + eps) of each row
    std::size_t columns;
    double eps;
};

struct NormBackwardArgs {
    const void* grad;      // of the normalized rows
    const void* grad_sum;  // of x + residual where it is used elsewhere, too; or null
    const void* x;         // what was normalized
    const void* weight;    // or null
    const float* mean;     // null for rms_norm
    const float* scale;
    void* grad_x;
    std::size_t columns;
};

// Rows begin <= i < end.
using NormKernel = void (*)(const NormArgs& args, std::size_t begin, std::size_t end);
// The same; adds up the gradients of the weight in sums, then, for layer_norm, those of the bias.
using NormBackwardKernel = void (*)(const NormBackwardArgs& args, std::size_t begin, std::size_t end, float* sums);

struct NormTable {
    NormKernel norm[kNumFormats][2];                   // [x][centered: layer_norm]
    NormBackwardKernel norm_backward[kNumFormats][2];  // [x][centered]
};

}  // namespace ds_kernels
