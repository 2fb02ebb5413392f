// One Adam or AdamW step over an array, in one pass over memory.
//
// Operations and their order are those of csrc/adam.h, the fused multiply-adds are explicit and nothing else is
// contracted, so the bits are those of the CPU. A thread steps four neighbouring elements.
#pragma once

#include "packet.cuh"

namespace ds_kernels {

// The numbers of one step, rounded to float32 once; see AdamScalars in csrc/optimizer_table.h.
struct AdamScalars {
    float scale;
    float decay;
    float grad_weight;
    unsigned from_grad;
    float beta2;
    float one_minus_beta2;
    float eps;
    float minus_step_size;
};

struct AdamArgs {
    float* param;
    const void* grad;
    float* exp_avg;
    float* exp_avg_sq;
    void* copy;
    Size numel;
    AdamScalars scalars;
};

template <bool decoupled>
__device__ inline void adam_element(const AdamScalars& s, float g, float& param, float& exp_avg, float& exp_avg_sq) {
    g = g * s.scale;
    float p = param;
    if constexpr (decoupled) {
        p = p * s.decay;
    } else {
        g = fmaf(p, s.decay, g);
    }
    // Linear interpolation from whichever end is nearer, so that both ends are hit exactly.
    const float old_m = exp_avg;
    const float m = fmaf(s.grad_weight, g - old_m, s.from_grad ? g : old_m);
    const float v = fmaf(s.one_minus_beta2 * g, g, exp_avg_sq * s.beta2);
    param = p + s.minus_step_size * m / (sqrtf(v) + s.eps);
    exp_avg = m;
    exp_avg_sq = v;
}

// Copy = Float32 stands for "no copy": the parameter itself is the float32 one.
template <class Grad, class Copy, bool decoupled>
__device__ inline void adamw(const AdamArgs& args) {
    constexpr bool has_copy = sizeof(typename Copy::Storage) < sizeof(float);
    const Size begin = thread_index() * kPacket;
    if (begin >= args.numel) {
        return;
    }
    const auto* const grad = static_cast<const typename Grad::Storage*>(args.grad);
    auto* const copy = static_cast<typename Copy::Storage*>(args.copy);
    const int count = args.numel - begin < kPacket ? int(args.numel - begin) : kPacket;
    const bool aligned = packet_aligned<Float32>(args.param) && packet_aligned<Grad>(grad) &&
                         packet_aligned<Float32>(args.exp_avg) && packet_aligned<Float32>(args.exp_avg_sq) &&
                         packet_aligned<Copy>(copy);
    const bool whole = aligned && count == kPacket;

    Packet p = load<Float32>(args.param + begin, whole, count);
    const Packet g = load<Grad>(grad + begin, whole, count);
    Packet m = load<Float32>(args.exp_avg + begin, whole, count);
    Packet v = load<Float32>(args.exp_avg_sq + begin, whole, count);
#pragma unroll
    for (int k = 0; k < kPacket; ++k) {
        adam_element<decoupled>(args.scalars, g.at[k], p.at[k], m.at[k], v.at[k]);
    }
    store<Float32>(args.exp_avg + begin, m, whole, count);
    store<Float32>(args.exp_avg_sq + begin, v, whole, count);
    store<Float32>(args.param + begin, p, whole, count);
    if constexpr (has_copy) {
        store<Copy>(copy + begin, p, whole, count);
    }
}

}  // namespace ds_kernels
