// Lion, Adagrad and SGD with momentum over a block.
//
// For classes that torch has, the operations and their order are those of its loop over tensors. Every element is
// computed by itself: its result does not depend on where it lies.
#pragma once

#include <cstddef>

#include "adam.h"
#include "float_format.h"
#include "optimizer_table.h"

namespace {

inline void lion(const ds_kernels::StepBlock& block, const ds_kernels::LionScalars& scalars) {
    float* const param = block.param;
    const float* const grad = block.grad;
    float* const exp_avg = block.states[0];
    const ds_kernels::LionScalars s = scalars;

#pragma omp simd
    for (std::size_t i = 0; i < block.n; ++i) {
        const float g = grad[i] * s.scale;
        const float m = exp_avg[i];
        const float c = lerp(m, g, s.direction_weight);
        // The step with the sign of c; 0 for 0, and NaN for NaN.
        const float size = as_float(as_bits(s.minus_lr) ^ (as_bits(c) & ~kMagnitude));
        const float step = c != 0.0f ? size : 0.0f;
        param[i] = param[i] * s.decay + (c == c ? step : c);
        exp_avg[i] = lerp(m, g, s.moment_weight);
    }
}

inline void adagrad(const ds_kernels::StepBlock& block, const ds_kernels::AdagradScalars& scalars) {
    float* const param = block.param;
    const float* const grad = block.grad;
    float* const sum = block.states[0];
    const ds_kernels::AdagradScalars s = scalars;

#pragma omp simd
    for (std::size_t i = 0; i < block.n; ++i) {
        const float g = __builtin_fmaf(param[i], s.weight_decay, grad[i] * s.scale);
        const float total = __builtin_fmaf(g, g, sum[i]);
        sum[i] = total;
        param[i] = param[i] + s.minus_lr * g / (__builtin_sqrtf(total) + s.eps);
    }
}

// With no momentum, states[0] is not touched.
template <bool with_momentum, bool nesterov>
void sgd(const ds_kernels::StepBlock& block, const ds_kernels::SgdScalars& scalars) {
    float* const param = block.param;
    const float* const grad = block.grad;
    [[maybe_unused]] float* const buffer = block.states[0];
    const ds_kernels::SgdScalars s = scalars;

#pragma omp simd
    for (std::size_t i = 0; i < block.n; ++i) {
        float g = __builtin_fmaf(param[i], s.weight_decay, grad[i] * s.scale);
        if constexpr (with_momentum) {
            const float b = __builtin_fmaf(s.grad_weight, g, buffer[i] * s.momentum);
            buffer[i] = b;
            g = nesterov ? __builtin_fmaf(s.look_ahead, b, g) : b;
        }
        param[i] = __builtin_fmaf(s.minus_lr, g, param[i]);
    }
}

}  // namespace
