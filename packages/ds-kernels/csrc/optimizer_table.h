// Optimizer steps over blocks of float32: what each instruction set provides.
#pragma once

#include <cstddef>

namespace ds_kernels {

// Elements that are stepped at a time. Arrays in other formats are decoded into buffers of this length, which stay in
// the first-level cache; so each of them is read and written once, and a step knows nothing of formats.
constexpr std::size_t kStepBlock = 512;

struct StepBlock {
    float* param;
    const float* grad;
    float* states[2];
    std::size_t n;  // at most kStepBlock
};

// All scalars below are computed in float64 and rounded to float32 once.

// Of the linear interpolation in adam.h: from the old value to the gradient.
struct LerpWeight {
    float value;       // coefficient of the difference
    unsigned from_end; // all ones: back from the gradient; zero: on from the old value
};

struct AdamScalars {
    float scale;           // factor on the gradient
    float decay;           // decoupled: 1 - lr * weight_decay, factor on the parameter; else weight_decay
    LerpWeight grad_weight;
    float beta2;
    float one_minus_beta2;
    float eps;             // eps * sqrt(1 - beta2^step)
    float minus_step_size; // -lr / (1 - beta1^step) * sqrt(1 - beta2^step)
};

struct LionScalars {
    float scale;
    float decay;  // 1 - lr * weight_decay
    LerpWeight direction_weight;
    LerpWeight moment_weight;
    float minus_lr;
};

struct AdagradScalars {
    float scale;
    float weight_decay;
    float eps;
    float minus_lr;
};

struct SgdScalars {
    float scale;
    float weight_decay;
    float momentum;     // 0 in the first step
    float grad_weight;  // 1 - dampening; 1 in the first step
    float look_ahead;   // momentum
    float minus_lr;
};

struct LambScalars {
    float scale;
    LerpWeight grad_weight;
    float beta2;
    float one_minus_beta2;
    float eps;            // eps * sqrt(1 - beta2^step)
    float moment_factor;  // sqrt(1 - beta2^step) / (1 - beta1^step)
    float weight_decay;
    float minus_lr;       // -lr * ratio
};

struct OptimizerTable {
    void (*adam[2])(const StepBlock&, const AdamScalars&);  // [decoupled]
    void (*lion)(const StepBlock&, const LionScalars&);
    void (*adagrad)(const StepBlock&, const AdagradScalars&);
    void (*sgd[3])(const StepBlock&, const SgdScalars&);  // plain, with momentum, with Nesterov's
    void (*lamb_moments)(const StepBlock&, const LambScalars&, double* squares);
    void (*lamb_step)(const StepBlock&, const LambScalars&);
};

}  // namespace ds_kernels
