// layer_norm and rms_norm of rows, with an addition before, and their derivatives: one pass over memory each.
//
// A row is read several times while it is in the first-level cache: mean, then the sum of squares of the deviations
// (which does not cancel), then the result.
#pragma once

#include <cstddef>

#include "column_sum.h"
#include "float_format.h"
#include "norm_table.h"
#include "row_sum.h"

namespace {

// Adds the residual, if any, and returns the row to normalize: what was stored, rounded to the format.
template <class Format>
inline const typename Format::Storage* added(const ds_kernels::NormArgs& args, std::size_t row) {
    const std::size_t at = row * args.columns;
    const auto* const x = static_cast<const typename Format::Storage*>(args.x) + at;
    if (args.residual == nullptr) return x;
    const auto* const residual = static_cast<const typename Format::Storage*>(args.residual) + at;
    auto* const sum = static_cast<typename Format::Storage*>(args.sum) + at;
#pragma omp simd
    for (std::size_t i = 0; i < args.columns; ++i) {
        sum[i] = Format::narrow(Format::widen(x[i]) + Format::widen(residual[i]));
    }
    return sum;
}

template <class Format, bool has_weight, bool has_bias>
inline void write_normalized(const typename Format::Storage* x, const ds_kernels::NormArgs& args, std::size_t row,
                             float mean, float scale) {
    const auto* const weight = static_cast<const typename Format::Storage*>(args.weight);
    const auto* const bias = static_cast<const typename Format::Storage*>(args.bias);
    auto* const out = static_cast<typename Format::Storage*>(args.out) + row * args.columns;
#pragma omp simd
    for (std::size_t i = 0; i < args.columns; ++i) {
        float y = (Format::widen(x[i]) - mean) * scale;
        if constexpr (has_weight) y *= Format::widen(weight[i]);
        if constexpr (has_bias) y += Format::widen(bias[i]);
        out[i] = Format::narrow(y);
    }
}

template <class Format, bool centered>
void norm(const ds_kernels::NormArgs& args, std::size_t begin, std::size_t end) {
    const std::size_t n = args.columns;
    for (std::size_t row = begin; row < end; ++row) {
        const auto* const x = added<Format>(args, row);
        float mean = 0.0f;
        if constexpr (centered) {
            mean = row_sum(n, [=](std::size_t i) { return Format::widen(x[i]); }) / static_cast<float>(n);
            args.mean[row] = mean;
        }
        const float squares = row_sum(n, [=](std::size_t i) {
            const float d = Format::widen(x[i]) - mean;
            return d * d;
        });
        const double variance = static_cast<double>(squares) / static_cast<double>(n) + args.eps;
        const float scale = static_cast<float>(1.0 / __builtin_sqrt(variance));
        args.scale[row] = scale;
        if (args.weight == nullptr) {
            write_normalized<Format, false, false>(x, args, row, mean, scale);
        } else if (args.bias == nullptr) {
            write_normalized<Format, true, false>(x, args, row, mean, scale);
        } else {
            write_normalized<Format, true, true>(x, args, row, mean, scale);
        }
    }
}

// With y the normalized row before the weight and g the gradient times the weight:
// grad_x = scale * (g - mean(g) - y * mean(g * y)); rms_norm lacks mean(g).
template <class Format, bool centered, bool has_weight>
inline void row_backward(const ds_kernels::NormBackwardArgs& args, std::size_t row) {
    const std::size_t n = args.columns, at = row * n;
    const auto* const grad = static_cast<const typename Format::Storage*>(args.grad) + at;
    const auto* const x = static_cast<const typename Format::Storage*>(args.x) + at;
    const auto* const weight = static_cast<const typename Format::Storage*>(args.weight);
    const auto* const grad_sum = static_cast<const typename Format::Storage*>(args.grad_sum);
    auto* const grad_x = static_cast<typename Format::Storage*>(args.grad_x) + at;
    const float mean = centered ? args.mean[row] : 0.0f, scale = args.scale[row];
    const float count = static_cast<float>(n);
    const auto g = [=](std::size_t i) {
        return has_weight ? Format::widen(grad[i]) * Format::widen(weight[i]) : Format::widen(grad[i]);
    };
    const auto y = [=](std::size_t i) { return (Format::widen(x[i]) - mean) * scale; };
    const float along = row_sum(n, [=](std::size_t i) { return g(i) * y(i); }) / count;
    const float level = centered ? row_sum(n, g) / count : 0.0f;
    if (grad_sum == nullptr) {
#pragma omp simd
        for (std::size_t i = 0; i < n; ++i) grad_x[i] = Format::narrow((g(i) - level - y(i) * along) * scale);
    } else {
#pragma omp simd
        for (std::size_t i = 0; i < n; ++i) {
            const float other = Format::widen(grad_sum[at + i]);
            grad_x[i] = Format::narrow((g(i) - level - y(i) * along) * scale + other);
        }
    }
}

template <class Format, bool centered>
void norm_backward(const ds_kernels::NormBackwardArgs& args, std::size_t begin, std::size_t end, float* sums) {
    const std::size_t n = args.columns;
    const auto* const grad = static_cast<const typename Format::Storage*>(args.grad);
    const auto* const x = static_cast<const typename Format::Storage*>(args.x);
    if (args.weight == nullptr) {
        for (std::size_t row = begin; row < end; ++row) row_backward<Format, centered, false>(args, row);
        return;
    }
    float* const weight_sum = sums;
    float* const bias_sum = sums + n;
    for (std::size_t i = 0; i < (centered ? 2 * n : n); ++i) sums[i] = 0.0f;
    for (std::size_t row = begin; row < end; ++row) {
        row_backward<Format, centered, true>(args, row);
        const auto* const g = grad + row * n;
        const auto* const at = x + row * n;
        const float mean = centered ? args.mean[row] : 0.0f, scale = args.scale[row];
#pragma omp simd
        for (std::size_t i = 0; i < n; ++i) {
            const float gradient = Format::widen(g[i]);
            weight_sum[i] += gradient * ((Format::widen(at[i]) - mean) * scale);
            if constexpr (centered) bias_sum[i] += gradient;
        }
    }
}

}  // namespace
