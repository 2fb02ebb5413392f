// Dropout: what each instruction set provides.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats.h"

namespace ds_kernels {

struct DropoutKey {
    std::uint64_t seed;
    std::uint32_t threshold;  // elements with a smaller number are dropped; 0: none
    float scale;              // of those that stay
};

struct BiasDropoutArgs {
    const void* x;         // backward: the gradient of the result
    const void* bias;      // one number for each column, or null
    const void* residual;  // forward only
    void* out;             // the result; backward: the gradient of x, or null where it is that of the result
    std::size_t columns;
    DropoutKey key;
};

// Elements begin <= i < end.
using BiasDropoutKernel = void (*)(const BiasDropoutArgs& args, std::size_t begin, std::size_t end);
// With a bias: rows begin <= i < end, whose gradients are added up in sums; without: elements.
using BiasDropoutBackwardKernel = void (*)(const BiasDropoutArgs& args, std::size_t begin, std::size_t end,
                                           float* sums);

struct DropoutTable {
    BiasDropoutKernel bias_dropout[kNumFormats][2];                   // [x][has bias]
    BiasDropoutBackwardKernel bias_dropout_backward[kNumFormats][2];  // [x][has bias]
};

}  // namespace ds_kernels
