// One Adam or AdamW step over a block.
//
// The operations, their order and the three fused multiply-adds are those of torch's own fused CPU kernel, so that
// results agree with it, but for the bias of the second moment: it multiplies eps and the step size instead of dividing
// each element's root, and one division less shows where data are in the cache. Every element is computed by itself: its
// result does not depend on where it lies.
#pragma once

#include <cstddef>

#include "float_format.h"
#include "optimizer_table.h"

namespace {

// Linear interpolation from whichever end is nearer, so that both ends are hit exactly. A bit mask instead of a
// condition: GCC does not vectorize a choice that is the same for all elements.
inline float lerp(float from, float to, const ds_kernels::LerpWeight& weight) {
    const float nearer = as_float((as_bits(to) & weight.from_end) | (as_bits(from) & ~weight.from_end));
    return __builtin_fmaf(weight.value, to - from, nearer);
}

template <bool decoupled>
void adam(const ds_kernels::StepBlock& block, const ds_kernels::AdamScalars& scalars) {
    float* const param = block.param;
    const float* const grad = block.grad;
    float* const exp_avg = block.states[0];
    float* const exp_avg_sq = block.states[1];
    const ds_kernels::AdamScalars s = scalars;

#pragma omp simd
    for (std::size_t i = 0; i < block.n; ++i) {
        float g = grad[i] * s.scale;
        float p = param[i];
        if constexpr (decoupled) {
            p = p * s.decay;
        } else {
            g = __builtin_fmaf(p, s.decay, g);
        }
        const float m = lerp(exp_avg[i], g, s.grad_weight);
        const float v = __builtin_fmaf(s.one_minus_beta2 * g, g, exp_avg_sq[i] * s.beta2);
        exp_avg[i] = m;
        exp_avg_sq[i] = v;
        param[i] = p + s.minus_step_size * m / (__builtin_sqrtf(v) + s.eps);
    }
}

}  // namespace
