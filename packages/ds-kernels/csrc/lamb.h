// The two phases of LAMB over a block: moments and squared norms, then the step.
//
// The direction u = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * p is computed in both, by the
// same operations: writing it and reading it back would move as many bytes, and need memory.
#pragma once

#include <cstddef>

#include "adam.h"
#include "float_format.h"
#include "optimizer_table.h"

namespace {

inline float lamb_direction(float p, float m, float v, const ds_kernels::LambScalars& s) {
    return __builtin_fmaf(s.weight_decay, p, s.moment_factor * m / (__builtin_sqrtf(v) + s.eps));
}

// Squares of a block are added along the tree of chunk_sumsq.h: in leaves of 64 elements, i meets i + 32, then sums 16, 8,
// 4, 2 and 1 apart meet; then leaves meet. Squares are taken in the loop that updates the moments, so that they pass
// while roots and quotients are waited for.
constexpr std::size_t kHalfLeaf = 32;
constexpr std::size_t kLeaves = ds_kernels::kStepBlock / (2 * kHalfLeaf);

// Adds up the rows of a block, each along the tree of a leaf; all rows take one step at a time, so that they overlap.
inline double sum_of_leaves(double (*rows)[kHalfLeaf]) {
    for (std::size_t apart = kHalfLeaf / 2; apart >= 4; apart /= 2) {
        for (std::size_t leaf = 0; leaf < kLeaves; ++leaf) {
            double* const sums = rows[leaf];
#pragma omp simd
            for (std::size_t i = 0; i < apart; ++i) {
                sums[i] += sums[i + apart];
            }
        }
    }
    double leaf[kLeaves];
    for (std::size_t i = 0; i < kLeaves; ++i) {
        leaf[i] = (rows[i][0] + rows[i][2]) + (rows[i][1] + rows[i][3]);
    }
    static_assert(kLeaves == 8, "the tree below has eight leaves");
    return ((leaf[0] + leaf[1]) + (leaf[2] + leaf[3])) + ((leaf[4] + leaf[5]) + (leaf[6] + leaf[7]));
}

struct LambSquares {
    double weight;
    double direction;
};

// Updates the moments of element i; returns the squares of its weight and direction.
inline LambSquares lamb_moments_at(const ds_kernels::StepBlock& block, const ds_kernels::LambScalars& s, std::size_t i) {
    const float g = block.grad[i] * s.scale;
    const float p = block.param[i];
    const float m = lerp(block.states[0][i], g, s.grad_weight);
    const float v = __builtin_fmaf(s.one_minus_beta2 * g, g, block.states[1][i] * s.beta2);
    block.states[0][i] = m;
    block.states[1][i] = v;
    const double weight = p;
    const double direction = lamb_direction(p, m, v, s);
    return {weight * weight, direction * direction};
}

// The part of a block that one leaf covers: n elements, 64 but at the end of an array.
inline void lamb_moments_of_leaf(const ds_kernels::StepBlock& block, const ds_kernels::LambScalars& s, std::size_t n,
                                 double* weights, double* directions) {
    const std::size_t pairs = n > kHalfLeaf ? n - kHalfLeaf : 0;
#pragma omp simd
    for (std::size_t i = 0; i < pairs; ++i) {
        const LambSquares low = lamb_moments_at(block, s, i);
        const LambSquares high = lamb_moments_at(block, s, i + kHalfLeaf);
        weights[i] = low.weight + high.weight;
        directions[i] = low.direction + high.direction;
    }
    const std::size_t lone = n < kHalfLeaf ? n : kHalfLeaf;
#pragma omp simd
    for (std::size_t i = pairs; i < lone; ++i) {
        const LambSquares low = lamb_moments_at(block, s, i);
        weights[i] = low.weight;
        directions[i] = low.direction;
    }
}

// The sums of squares of parameters and directions go to squares[0] and squares[1].
inline void lamb_moments(const ds_kernels::StepBlock& block, const ds_kernels::LambScalars& scalars, double* squares) {
    const ds_kernels::LambScalars s = scalars;
    constexpr std::size_t kLeaf = 2 * kHalfLeaf;
    alignas(64) double weights[kLeaves][kHalfLeaf];
    alignas(64) double directions[kLeaves][kHalfLeaf];
    if (block.n < ds_kernels::kStepBlock) {
        for (std::size_t leaf = 0; leaf < kLeaves; ++leaf) {
            for (std::size_t i = 0; i < kHalfLeaf; ++i) {
                weights[leaf][i] = directions[leaf][i] = 0.0;
            }
        }
    }
    for (std::size_t leaf = 0; leaf * kLeaf < block.n; ++leaf) {
        const std::size_t at = leaf * kLeaf;
        const ds_kernels::StepBlock rest{block.param + at, block.grad + at, {block.states[0] + at, block.states[1] + at},
                                         block.n - at};
        if (rest.n >= kLeaf) {
            lamb_moments_of_leaf(rest, s, kLeaf, weights[leaf], directions[leaf]);  // a constant: unrolled
        } else {
            lamb_moments_of_leaf(rest, s, rest.n, weights[leaf], directions[leaf]);
        }
    }
    squares[0] = sum_of_leaves(weights);
    squares[1] = sum_of_leaves(directions);
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
