// gelu(x + bias) and its derivative, each in one pass over memory.
#pragma once

#include <cstddef>

#include "activation_table.h"
#include "column_sum.h"
#include "float_math.h"

namespace {

// x times the normal cdf.
struct GeluErf {
    static float value(float x) { return x * normal(x).cdf; }
    static float slope(float x) {
        const Normal at = normal(x);
        return __builtin_fmaf(x, at.pdf, at.cdf);
    }
};

// x (1 + tanh(u)) / 2 = x sigmoid(2 u), u a cubic in x.
struct GeluTanh {
    static constexpr float kLinear = 0x1.988454p+0f;  // 2 sqrt(2 / pi)
    static constexpr float kCubic = 0x1.2444f2p-4f; // 0.044715 of it
    static float value(float x) {
        // Beyond 20 the sigmoid is 0 or 1; the cube of a large number would overflow.
        const float t = at_least(at_most(x, 20.0f), -20.0f);
        return x * sigmoid(t * __builtin_fmaf(kCubic, t * t, kLinear));
    }
    static float slope(float x) {
        // Up to 10 the power is finite; 1 - s would cancel where e * s does not.
        const float t = at_least(at_most(x, 10.0f), -10.0f);
        const float e = exp(-t * __builtin_fmaf(kCubic, t * t, kLinear));
        const float s = 1.0f / (1.0f + e);
        const float inner = t * __builtin_fmaf(3.0f * kCubic, t * t, kLinear);
        return __builtin_fmaf(s * (e * s), inner, s);
    }
};

template <class Format, class Gelu, bool has_bias>
void bias_gelu(const ds_kernels::BiasGeluArgs& args, std::size_t begin, std::size_t end) {
    const auto* const x = static_cast<const typename Format::Storage*>(args.x);
    const auto* const bias = static_cast<const typename Format::Storage*>(args.bias);
    auto* const out = static_cast<typename Format::Storage*>(args.out);
    while (begin < end) {
        const std::size_t column = has_bias ? begin % args.columns : 0;
        const std::size_t rest = has_bias ? args.columns - column : end - begin;
        const std::size_t n = end - begin < rest ? end - begin : rest;
#pragma omp simd
        for (std::size_t i = 0; i < n; ++i) {
            float z = Format::widen(x[begin + i]);
            if constexpr (has_bias) z += Format::widen(bias[column + i]);
            out[begin + i] = Format::narrow(Gelu::value(z));
        }
        begin += n;
    }
}

template <class Format, class Gelu, bool has_bias>
void bias_gelu_backward(const ds_kernels::BiasGeluArgs& args, std::size_t begin, std::size_t end, float* sums) {
    const auto* const grad = static_cast<const typename Format::Storage*>(args.grad);
    const auto* const x = static_cast<const typename Format::Storage*>(args.x);
    const auto* const bias = static_cast<const typename Format::Storage*>(args.bias);
    auto* const out = static_cast<typename Format::Storage*>(args.out);
    if constexpr (has_bias) {
        sum_block(begin, end, args.columns, sums,
                  [=](std::size_t row, std::size_t column, std::size_t width, float* sum) {
                      const std::size_t at = row * args.columns + column;
#pragma omp simd
                      for (std::size_t i = 0; i < width; ++i) {
                          const float z = Format::widen(x[at + i]) + Format::widen(bias[column + i]);
                          const float g = Format::widen(grad[at + i]) * Gelu::slope(z);
                          sum[i] += g;
                          out[at + i] = Format::narrow(g);
                      }
                  });
    } else {
#pragma omp simd
        for (std::size_t i = begin; i < end; ++i) {
            out[i] = Format::narrow(Format::widen(grad[i]) * Gelu::slope(Format::widen(x[i])));
        }
    }
}

}  // namespace
