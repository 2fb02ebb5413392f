// Optimizer steps: what each instruction set provides.
#pragma once

#include <cstddef>

#include "formats.h"

namespace ds_kernels {

// The numbers of one Adam step, rounded to float32 once.
struct AdamScalars {
    float scale;           // factor on the gradient
    float decay;           // decoupled: 1 - lr * weight_decay, factor on the parameter; else weight_decay
    float grad_weight;     // coefficient of (grad - exp_avg), see adam.h
    unsigned from_grad;    // all ones: exp_avg moves back from the gradient; zero: on from its old value
    float beta2;
    float one_minus_beta2;
    float eps;             // eps * sqrt(1 - beta2^step)
    float minus_step_size; // -lr / (1 - beta1^step) * sqrt(1 - beta2^step)
};

struct AdamArgs {
    float* param;
    const void* grad;
    float* exp_avg;
    float* exp_avg_sq;
    void* copy;
    AdamScalars scalars;
};

// Steps elements begin <= i < end.
using AdamKernel = void (*)(const AdamArgs& args, std::size_t begin, std::size_t end);

struct OptimizerTable {
    AdamKernel adam[kNumFormats][kNumFormats][2];  // [gradient][copy, 0 for none][decoupled]
};

}  // namespace ds_kernels
