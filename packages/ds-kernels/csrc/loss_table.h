// Losses: what each instruction set provides.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats.h"

namespace ds_kernels {

struct CrossEntropyArgs {
    void* logits;                // [rows, columns]; the gradient is written over it
    const std::int64_t* target;  // [rows], 0 ... columns - 1 or ignore_index
    const float* scales;         // [rows], factors on the gradient; null: all 1
    float* losses;               // [rows]
    std::size_t columns;
    bool differentiate;
    std::int64_t ignore_index;
    double label_smoothing;
    double z_loss;
};

// Works on rows begin <= i < end.
using CrossEntropyKernel = void (*)(const CrossEntropyArgs& args, std::size_t begin, std::size_t end);

struct LossTable {
    CrossEntropyKernel cross_entropy[kNumFormats];  // [logits]
};

}  // namespace ds_kernels
