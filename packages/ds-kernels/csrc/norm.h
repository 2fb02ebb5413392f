// layer_norm and rms_norm of rows, with an addition before, and their derivatives: one pass over memory each.
//
// A row is read several times while it is in a cache: mean, then the sum of squares of the deviations (which does not
// cancel), then the result.
#pragma once

#include <cstddef>

#include "column_sum.h"
#include "float_format.h"
#include "norm_table.h"
#include "row_sum.h"

namespace {

// The row to normalize: x, or x + residual, which is stored, and rounded to the format.
template <class Format>
struct NormRow {
    using Storage = typename Format::Storage;
    const Storage* x;
    const Storage* residual;  // or null
    Storage* sum;

    NormRow(const ds_kernels::NormArgs& args, std::size_t row)
        : x(static_cast<const Storage*>(args.x) + row * args.columns),
          residual(args.residual == nullptr ? nullptr : static_cast<const Storage*>(args.residual) + row * args.columns),
          sum(args.residual == nullptr ? nullptr : static_cast<Storage*>(args.sum) + row * args.columns) {}

    // The sum over the row of term(number). Afterwards the numbers are there.
    template <class Term>
    float first_sum(std::size_t n, const Term& term) const {
        if (residual == nullptr) {
            return row_sum(n, [=](std::size_t i) { return term(Format::widen(x[i])); });
        }
        return row_sum(n, [=](std::size_t i) {
            const Storage stored = Format::narrow(Format::widen(x[i]) + Format::widen(residual[i]));
            sum[i] = stored;
            return term(Format::widen(stored));
        });
    }

    const Storage* numbers() const { return residual == nullptr ? x : sum; }
};

template <class Format, bool has_weight, bool has_bias>
inline void write_normalized(const typename Format::Storage* x, const ds_kernels::NormArgs& args, std::size_t row,
                             float mean, float scale) {
    const auto* const weight = static_cast<const typename Format::Storage*>(args.weight);
    const auto* const bias = static_cast<const typename Format::Storage*>(args.bias);
    auto* const out = static_cast<typename Format::Storage*>(args.out) + row * args.columns;
    for_row(args.columns, [=](std::size_t i) {
        float y = (Format::widen(x[i]) - mean) * scale;
        if constexpr (has_weight) y *= Format::widen(weight[i]);
        if constexpr (has_bias) y += Format::widen(bias[i]);
        out[i] = Format::narrow(y);
    });
}

template <class Format, bool centered>
void norm(const ds_kernels::NormArgs& args, std::size_t begin, std::size_t end) {
    using Storage = typename Format::Storage;
    const std::size_t n = args.columns;
    for (std::size_t row = begin; row < end; ++row) {
        const NormRow<Format> at(args, row);
        const Storage* const x = at.numbers();
        float mean = 0.0f, squares = 0.0f;
        if constexpr (centered) {
            mean = at.first_sum(n, [](float u) { return u; }) / static_cast<float>(n);
            args.mean[row] = mean;
            squares = row_sum(n, [=](std::size_t i) {
                const float d = Format::widen(x[i]) - mean;
                return d * d;
            });
        } else {
            squares = at.first_sum(n, [](float u) { return u * u; });
        }
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
// grad_x = scale * (g - mean(g) - y * mean(g * y)); rms_norm lacks mean(g). The gradients of weight and bias,
// gradient * y and the gradient, are added to weight_sum and bias_sum.
template <class Format, bool centered, bool has_weight, bool has_grad_sum>
inline void row_backward(const ds_kernels::NormBackwardArgs& args, std::size_t row, std::size_t ahead,
                         float* weight_sum, float* bias_sum) {
    using Storage = typename Format::Storage;
    const std::size_t n = args.columns, at = row * n;
    const auto* const grad = static_cast<const Storage*>(args.grad) + at;
    const auto* const x = static_cast<const Storage*>(args.x) + at;
    const auto* const weight = static_cast<const Storage*>(args.weight);
    const auto* const grad_sum = has_grad_sum ? static_cast<const Storage*>(args.grad_sum) + at : nullptr;
    auto* const grad_x = static_cast<Storage*>(args.grad_x) + at;
    const float mean = centered ? args.mean[row] : 0.0f, scale = args.scale[row];
    const float count = static_cast<float>(n);
    const auto normalized = [=](std::size_t i) { return (Format::widen(x[i]) - mean) * scale; };
    const auto weighted = [=](std::size_t i, float g) { return has_weight ? g * Format::widen(weight[i]) : g; };
    float along, level = 0.0f;
    if constexpr (centered) {
        const Pair sums = row_sums(n, [=](std::size_t i) {
            const float g = weighted(i, Format::widen(grad[i]));
            return Pair{g * normalized(i), g};
        });
        along = sums.first / count;
        level = sums.second / count;
    } else {
        along = row_sum(n, [=](std::size_t i) { return weighted(i, Format::widen(grad[i])) * normalized(i); }) / count;
    }
    for_row(
        n,
        [=](std::size_t i) {
            const float gradient = Format::widen(grad[i]), y = normalized(i);
            float result = (weighted(i, gradient) - level - y * along) * scale;
            if constexpr (has_grad_sum) result += Format::widen(grad_sum[i]);
            if constexpr (has_weight) {
                // Both are read before one is written: where they lie 4096 bytes apart, a read waits for such a write.
                const float new_weight_sum = weight_sum[i] + gradient * y;
                if constexpr (centered) bias_sum[i] += gradient;
                weight_sum[i] = new_weight_sum;
            }
            grad_x[i] = Format::narrow(result);
        },
        Fetch<Storage, 3>{{grad, x, grad_sum}, ahead});
}

template <class Format, bool centered, bool has_weight>
inline void rows_backward(const ds_kernels::NormBackwardArgs& args, std::size_t begin, std::size_t end, float* sums) {
    const std::size_t n = args.columns;
    for (std::size_t row = begin; row < end; ++row) {
        const std::size_t ahead = row + 1 < end ? n : 0;  // after the last row: what is there already
        if (args.grad_sum == nullptr) {
            row_backward<Format, centered, has_weight, false>(args, row, ahead, sums, sums + n);
        } else {
            row_backward<Format, centered, has_weight, true>(args, row, ahead, sums, sums + n);
        }
    }
}

template <class Format, bool centered>
void norm_backward(const ds_kernels::NormBackwardArgs& args, std::size_t begin, std::size_t end, float* sums) {
    if (args.weight == nullptr) {
        return rows_backward<Format, centered, false>(args, begin, end, sums);
    }
    for (std::size_t i = 0; i < (centered ? 2 : 1) * args.columns; ++i) sums[i] = 0.0f;
    rows_backward<Format, centered, true>(args, begin, end, sums);
}

}  // namespace
