// The two phases of LAMB over a block: moments and squared norms, then the step.
//
// The direction u = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * p is computed in both, by the
// same operations: writing it and reading it back would move as many bytes, and need memory.
#pragma once

#include <cstddef>

#include "adam.h"
#include "chunk_sumsq.h"
#include "float_format.h"
#include "optimizer_table.h"

namespace {

inline float lamb_direction(float p, float m, float v, const ds_kernels::LambScalars& s) {
    return __builtin_fmaf(s.weight_decay, p, s.moment_factor * m / (__builtin_sqrtf(v) + s.eps));
}

// Up to kSquareChunk elements; the sums of squares of parameters and directions go to squares[0] and squares[1].
inline void lamb_moments(const ds_kernels::StepBlock& block, const ds_kernels::LambScalars& scalars, double* squares) {
    const float* const param = block.param;
    const float* const grad = block.grad;
    float* const exp_avg = block.states[0];
    float* const exp_avg_sq = block.states[1];
    const ds_kernels::LambScalars s = scalars;
    float weights[ds_kernels::kStepBlock];
    float directions[ds_kernels::kStepBlock];

#pragma omp simd
    for (std::size_t i = 0; i < block.n; ++i) {
        const float g = grad[i] * s.scale;
        const float p = param[i];
        const float m = lerp(exp_avg[i], g, s.grad_weight);
        const float v = __builtin_fmaf(s.one_minus_beta2 * g, g, exp_avg_sq[i] * s.beta2);
        exp_avg[i] = m;
        exp_avg_sq[i] = v;
        weights[i] = p;
        directions[i] = lamb_direction(p, m, v, s);
    }
    for (std::size_t i = block.n; i < ds_kernels::kStepBlock; ++i) {
        weights[i] = directions[i] = 0.0f;
    }
    squares[0] = tree_sumsq<Float32>(weights, ds_kernels::kStepBlock / kSquareBlock);
    squares[1] = tree_sumsq<Float32>(directions, ds_kernels::kStepBlock / kSquareBlock);
}

inline void lamb_step(const ds_kernels::StepBlock& block, const ds_kernels::LambScalars& scalars) {
    float* const param = block.param;
    const float* const exp_avg = block.states[0];
    const float* const exp_avg_sq = block.states[1];
    const ds_kernels::LambScalars s = scalars;

#pragma omp simd
    for (std::size_t i = 0; i < block.n; ++i) {
        const float p = param[i];
        param[i] = __builtin_fmaf(s.minus_lr, lamb_direction(p, exp_avg[i], exp_avg_sq[i], s), p);
    }
}

}  // namespace
