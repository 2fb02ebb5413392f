// silu(gate) * value after a bias, and its derivative, each in one pass over memory.
//
// A row of x is the gate's columns, then the value's; so are the bias and their gradients.
#pragma once

#include <cstddef>

#include "activation_table.h"
#include "column_sum.h"
#include "float_math.h"
#include "row_walk.h"

namespace {

// Calls part(row, column, width) for the stretches of rows that make up elements begin <= i < end of the output.
template <class Part>
inline void for_row_parts(std::size_t begin, std::size_t end, std::size_t columns, const Part& part) {
    while (begin < end) {
        const std::size_t column = begin % columns, rest = columns - column;
        const std::size_t width = end - begin < rest ? end - begin : rest;
        part(begin / columns, column, width);
        begin += width;
    }
}

template <class Format, bool has_bias>
void bias_swiglu(const ds_kernels::BiasSwigluArgs& args, std::size_t begin, std::size_t end) {
    using Storage = typename Format::Storage;
    const std::size_t n = args.columns;
    for_row_parts(begin, end, n, [&](std::size_t row, std::size_t column, std::size_t width) {
        const auto* const gate = static_cast<const Storage*>(args.x) + 2 * row * n + column;
        const auto* const bias = static_cast<const Storage*>(args.bias) + column;
        auto* const out = static_cast<Storage*>(args.out) + row * n + column;
        const auto value = [=](std::size_t i) {
            float g = Format::widen(gate[i]), v = Format::widen(gate[n + i]);
            if constexpr (has_bias) {
                g += Format::widen(bias[i]);
                v += Format::widen(bias[n + i]);
            }
            out[i] = Format::narrow(g / one_plus_exp_minus<Format::kFine>(g) * v);
        };
        for_row(width, value);
    });
}

// The gradients of one stretch of a row; with a bias they are added to sums[0 ... width) and to those n further on.
template <class Format, bool has_bias>
inline void differentiate_swiglu(const ds_kernels::BiasSwigluArgs& args, std::size_t row, std::size_t column,
                                 std::size_t width, float* sums) {
    using Storage = typename Format::Storage;
    const std::size_t n = args.columns;
    const auto* const grad = static_cast<const Storage*>(args.grad) + row * n + column;
    const auto* const gate = static_cast<const Storage*>(args.x) + 2 * row * n + column;
    const auto* const bias = static_cast<const Storage*>(args.bias) + column;
    auto* const out = static_cast<Storage*>(args.out) + 2 * row * n + column;
    const auto differentiate = [=](std::size_t i) {
        float g = Format::widen(gate[i]), v = Format::widen(gate[n + i]);
        if constexpr (has_bias) {
            g += Format::widen(bias[i]);
            v += Format::widen(bias[n + i]);
        }
        const float s = sigmoid<Format::kFine>(g), above = Format::widen(grad[i]);
        const float grad_gate = above * v * (s * __builtin_fmaf(g, 1.0f - s, 1.0f));
        const float grad_value = above * (g * s);
        if constexpr (has_bias) {
            // Both are read before one is written: where they lie 4096 bytes apart, a read waits for such a write.
            const float gate_sum = sums[i] + grad_gate, value_sum = sums[n + i] + grad_value;
            sums[i] = gate_sum;
            sums[n + i] = value_sum;
        }
        out[i] = Format::narrow(grad_gate);
        out[n + i] = Format::narrow(grad_value);
    };
    for_row(width, differentiate);
}

template <class Format, bool has_bias>
void bias_swiglu_backward(const ds_kernels::BiasSwigluArgs& args, std::size_t begin, std::size_t end, float* sums) {
    if constexpr (has_bias) {
        sum_block<2>(begin, end, args.columns, sums,
                     [&](std::size_t row, std::size_t column, std::size_t width, float* sum) {
                         differentiate_swiglu<Format, true>(args, row, column, width, sum);
                     });
    } else {
        for_row_parts(begin, end, args.columns, [&](std::size_t row, std::size_t column, std::size_t width) {
            differentiate_swiglu<Format, false>(args, row, column, width, nullptr);
        });
    }
}

}  // namespace
