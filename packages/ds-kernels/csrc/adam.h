// One Adam or AdamW step over a slice, in one pass over memory.
//
// The operations, their order and the three fused multiply-adds are those of torch's own fused CPU kernel, so that
// results agree with it, but for the bias of the second moment: it multiplies eps and the step size instead of dividing
// each element's root, and one division less shows where data are in the cache. Every element is computed by itself: its
// result does not depend on where it lies.
#pragma once

#include <cstddef>
#include <type_traits>

#include "float_format.h"
#include "optimizer_table.h"

namespace {

// Copy = Float32 stands for "no copy": the parameter itself is the float32 one.
template <class Grad, class Copy, bool decoupled>
void adam(const ds_kernels::AdamArgs& args, std::size_t begin, std::size_t end) {
    float* const param = args.param;
    const auto* const grad = static_cast<const typename Grad::Storage*>(args.grad);
    float* const exp_avg = args.exp_avg;
    float* const exp_avg_sq = args.exp_avg_sq;
    auto* const copy = static_cast<typename Copy::Storage*>(args.copy);
    const ds_kernels::AdamScalars s = args.scalars;

#pragma omp simd
    for (std::size_t i = begin; i < end; ++i) {
        float g = Grad::widen(grad[i]) * s.scale;
        float p = param[i];
        if constexpr (decoupled) {
            p = p * s.decay;
        } else {
            g = __builtin_fmaf(p, s.decay, g);
        }
        // Linear interpolation from whichever end is nearer, so that both ends are hit exactly. A bit mask
        // instead of a condition: GCC does not vectorize a choice that is the same for all elements.
        const float old_m = exp_avg[i];
        const float nearer = as_float((as_bits(g) & s.from_grad) | (as_bits(old_m) & ~s.from_grad));
        const float m = __builtin_fmaf(s.grad_weight, g - old_m, nearer);
        const float v = __builtin_fmaf(s.one_minus_beta2 * g, g, exp_avg_sq[i] * s.beta2);
        p = p + s.minus_step_size * m / (__builtin_sqrtf(v) + s.eps);

        exp_avg[i] = m;
        exp_avg_sq[i] = v;
        param[i] = p;
        if constexpr (!std::is_same_v<Copy, Float32>) {
            copy[i] = Copy::narrow(p);
        }
    }
}

}  // namespace
