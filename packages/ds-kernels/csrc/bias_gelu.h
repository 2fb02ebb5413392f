// gelu(x + bias) and its derivative, each in one pass over memory.
#pragma once

#include <cstddef>

#include "activation_table.h"
#include "column_sum.h"
#include "float_math.h"
#include "row_walk.h"

namespace {

// x times the normal cdf.
template <bool fine>
struct GeluErf {
    static float value(float x) {
        const Normal at = normal<fine>(x);
        return __builtin_fmaf(-at.away, at.tail, at_least(x, 0.0f));
    }
    static float slope(float x) {
        const Normal at = normal<fine>(x);
        const float below = __builtin_fmaf(at.away * -Normal::kDensity, at.bell, at.tail);  // the slope at -|x|
        return x < 0.0f ? below : 1.0f - below;
    }
};

// x (1 + tanh(u)) / 2 = x sigmoid(2 u), u a cubic in x. Up to 10 the power is finite; from there on, the sigmoid is 0 or 1.
template <bool fine>
struct GeluTanh {
    static constexpr float kLinear = 0x1.988454p+0f;  // 2 sqrt(2 / pi)
    static constexpr float kCubic = 0x1.2444f2p-4f;   // 0.044715 of it
    static float value(float x) {
        const float low = at_least(x, -10.0f), t = at_most(low, 10.0f);
        return low / (1.0f + exp_within<fine, -2>(t * __builtin_fmaf(kCubic, t * t, kLinear)));
    }
    static float slope(float x) {
        const float t = at_least(at_most(x, 10.0f), -10.0f), square = t * t;
        const float e = exp_within<fine, -2>(t * __builtin_fmaf(kCubic, square, kLinear));
        // 1 - s would cancel where e * s does not.
        const float s = 1.0f / (1.0f + e);
        const float inner = t * __builtin_fmaf(3.0f * kCubic, square, kLinear);
        return __builtin_fmaf(s * (e * s), inner, s);
    }
};

template <class Format, template <bool> class Gelu, bool has_bias>
void bias_gelu(const ds_kernels::BiasGeluArgs& args, std::size_t begin, std::size_t end) {
    using Storage = typename Format::Storage;
    const auto* const x = static_cast<const Storage*>(args.x);
    const auto* const bias = static_cast<const Storage*>(args.bias);
    auto* const out = static_cast<Storage*>(args.out);
    while (begin < end) {
        const std::size_t column = has_bias ? begin % args.columns : 0;
        const std::size_t rest = has_bias ? args.columns - column : end - begin;
        const std::size_t n = end - begin < rest ? end - begin : rest;
        const auto value = [=](std::size_t i) {
            float z = Format::widen(x[begin + i]);
            if constexpr (has_bias) z += Format::widen(bias[column + i]);
            out[begin + i] = Format::narrow(Gelu<Format::kFine>::value(z));
        };
        for_row(n, value);
        begin += n;
    }
}

template <class Format, template <bool> class Gelu, bool has_bias>
void bias_gelu_backward(const ds_kernels::BiasGeluArgs& args, std::size_t begin, std::size_t end, float* sums) {
    using Storage = typename Format::Storage;
    const auto* const grad = static_cast<const Storage*>(args.grad);
    const auto* const x = static_cast<const Storage*>(args.x);
    const auto* const bias = static_cast<const Storage*>(args.bias);
    auto* const out = static_cast<Storage*>(args.out);
    if constexpr (has_bias) {
        sum_block(begin, end, args.columns, sums,
                  [=](std::size_t row, std::size_t column, std::size_t width, float* sum) {
                      const std::size_t at = row * args.columns + column;
                      const auto differentiate = [=](std::size_t i) {
                          const float z = Format::widen(x[at + i]) + Format::widen(bias[column + i]);
                          const float g = Format::widen(grad[at + i]) * Gelu<Format::kFine>::slope(z);
                          sum[i] += g;
                          out[at + i] = Format::narrow(g);
                      };
                      for_row(width, differentiate, Fetch<Storage, 2>{{grad + at, x + at}, kAhead<Storage>});
                  });
    } else {
        const auto differentiate = [=](std::size_t i) {
            const float slope = Gelu<Format::kFine>::slope(Format::widen(x[begin + i]));
            out[begin + i] = Format::narrow(Format::widen(grad[begin + i]) * slope);
        };
        for_row(end - begin, differentiate, Fetch<Storage, 2>{{grad + begin, x + begin}, kAhead<Storage>});
    }
}

}  // namespace
