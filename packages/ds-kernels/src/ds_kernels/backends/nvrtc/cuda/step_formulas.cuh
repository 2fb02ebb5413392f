// What a step does to one element: Adam, Lion, Adagrad, SGD and LAMB.
//
// Operations and their order are those of csrc/{adam,elementwise_steps,lamb}.h, the fused multiply-adds are explicit and
// nothing else is contracted, so the bits are those of the CPU. The scalars are those of csrc/optimizer_table.h:
// computed in float64, rounded to float32 once.
#pragma once

#include "formats.cuh"

namespace ds_kernels {

struct LerpWeight {
    float value;
    unsigned from_end;  // 0: on from the old value
};

// Linear interpolation from whichever end is nearer, so that both ends are hit exactly.
__device__ inline float lerp(float from, float to, const LerpWeight& weight) {
    return fmaf(weight.value, to - from, weight.from_end ? to : from);
}

// What a step writes, unless it says otherwise.
struct Step {
    static constexpr bool kWritesParam = true;
    static constexpr bool kWritesStates = true;
    static constexpr bool kSquares = false;  // sums of squares of parameter and direction
};

struct AdamScalars {
    float scale;
    float decay;
    LerpWeight grad_weight;
    float beta2;
    float one_minus_beta2;
    float eps;
    float minus_step_size;
};

template <bool decoupled>
struct AdamStep : Step {
    using Scalars = AdamScalars;

    __device__ static void element(const Scalars& s, float g, float& param, float& exp_avg, float& exp_avg_sq) {
        g = g * s.scale;
        float p = param;
        if constexpr (decoupled) {
            p = p * s.decay;
        } else {
            g = fmaf(p, s.decay, g);
        }
        const float m = lerp(exp_avg, g, s.grad_weight);
        const float v = fmaf(s.one_minus_beta2 * g, g, exp_avg_sq * s.beta2);
        param = p + s.minus_step_size * m / (sqrtf(v) + s.eps);
        exp_avg = m;
        exp_avg_sq = v;
    }
};
using Adam = AdamStep<false>;
using AdamW = AdamStep<true>;

struct LionScalars {
    float scale;
    float decay;
    LerpWeight direction_weight;
    LerpWeight moment_weight;
    float minus_lr;
};

struct Lion : Step {
    using Scalars = LionScalars;

    __device__ static void element(const Scalars& s, float g, float& param, float& exp_avg, float&) {
        g = g * s.scale;
        const float m = exp_avg;
        const float c = lerp(m, g, s.direction_weight);
        // The step with the sign of c; 0 for 0, and NaN for NaN.
        const float size = __uint_as_float(__float_as_uint(s.minus_lr) ^ (__float_as_uint(c) & 0x80000000u));
        const float step = c != 0.0f ? size : 0.0f;
        param = param * s.decay + (c == c ? step : c);
        exp_avg = lerp(m, g, s.moment_weight);
    }
};

struct AdagradScalars {
    float scale;
    float weight_decay;
    float eps;
    float minus_lr;
};

struct Adagrad : Step {
    using Scalars = AdagradScalars;

    __device__ static void element(const Scalars& s, float g, float& param, float& sum, float&) {
        g = fmaf(param, s.weight_decay, g * s.scale);
        sum = fmaf(g, g, sum);
        param = param + s.minus_lr * g / (sqrtf(sum) + s.eps);
    }
};

struct SgdScalars {
    float scale;
    float weight_decay;
    float momentum;
    float grad_weight;
    float look_ahead;
    float minus_lr;
};

template <bool with_momentum, bool nesterov>
struct SgdStep : Step {
    using Scalars = SgdScalars;

    __device__ static void element(const Scalars& s, float g, float& param, float& buffer, float&) {
        g = fmaf(param, s.weight_decay, g * s.scale);
        if constexpr (with_momentum) {
            buffer = fmaf(s.grad_weight, g, buffer * s.momentum);
            g = nesterov ? fmaf(s.look_ahead, buffer, g) : buffer;
        }
        param = fmaf(s.minus_lr, g, param);
    }
};
using Sgd = SgdStep<false, false>;
using SgdMomentum = SgdStep<true, false>;
using SgdNesterov = SgdStep<true, true>;

struct LambScalars {
    float scale;
    LerpWeight grad_weight;
    float beta2;
    float one_minus_beta2;
    float eps;
    float moment_factor;
    float weight_decay;
    float minus_lr;
};

__device__ inline float lamb_direction(const LambScalars& s, float p, float m, float v) {
    return fmaf(s.weight_decay, p, s.moment_factor * m / (sqrtf(v) + s.eps));
}

struct LambMoments : Step {
    using Scalars = LambScalars;
    static constexpr bool kWritesParam = false;
    static constexpr bool kSquares = true;

    __device__ static void element(const Scalars& s, float g, float&, float& exp_avg, float& exp_avg_sq) {
        g = g * s.scale;
        exp_avg = lerp(exp_avg, g, s.grad_weight);
        exp_avg_sq = fmaf(s.one_minus_beta2 * g, g, exp_avg_sq * s.beta2);
    }
    __device__ static float direction(const Scalars& s, float p, float m, float v) { return lamb_direction(s, p, m, v); }
};

struct LambStep : Step {
    using Scalars = LambScalars;
    static constexpr bool kWritesStates = false;

    __device__ static void element(const Scalars& s, float, float& param, float& exp_avg, float& exp_avg_sq) {
        param = fmaf(s.minus_lr, lamb_direction(s, param, exp_avg, exp_avg_sq), param);
    }
};

}  // namespace ds_kernels
