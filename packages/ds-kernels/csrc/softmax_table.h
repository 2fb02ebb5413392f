// Softmax of attention scores: what each instruction set provides.
#pragma once

#include <cstddef>

#include "dropout_table.h"
#include "formats.h"

namespace ds_kernels {

// Rows are numbered over [batch, heads, queries]; a row has `keys` scores.
struct SoftmaxArgs {
    const void* scores;
    const void* mask;  // added to the scaled scores, or null
    void* out;         // probabilities
    void* dropped;     // of which some are dropped; null where none is
    std::size_t heads;
    std::size_t queries;
    std::size_t keys;
    std::size_t mask_strides[3];  // of batch, heads and queries, in elements
    float scale;
    bool causal;
    DropoutKey key;
};

struct SoftmaxBackwardArgs {
    const void* grad;  // of the dropped probabilities
    const void* probabilities;
    void* out;  // the gradient of the scores
    std::size_t queries;
    std::size_t keys;
    float scale;
    bool causal;
    DropoutKey key;
};

// Rows begin <= i < end; `row` has room for one row.
using SoftmaxKernel = void (*)(const SoftmaxArgs& args, std::size_t begin, std::size_t end, float* row);
using SoftmaxBackwardKernel = void (*)(const SoftmaxBackwardArgs& args, std::size_t begin, std::size_t end, float* row);

struct SoftmaxTable {
    SoftmaxKernel softmax[kNumFormats];                   // [scores]
    SoftmaxBackwardKernel softmax_backward[kNumFormats];  // [scores]
};

}  // namespace ds_kernels
