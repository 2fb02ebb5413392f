// residual + dropout(x + bias) and its derivative: one pass over memory each, what is dropped computed, never stored.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dropout_table.h"
#include "float_format.h"
#include "philox.h"

namespace {

// Calls body(i, column, width) on the parts of the elements begin ... begin + n that lie in one row; i counts from begin.
template <class Body>
inline void for_columns(std::size_t begin, std::size_t n, std::size_t columns, const Body& body) {
    std::size_t column = begin % columns;
    for (std::size_t i = 0; i < n; column = 0) {
        const std::size_t width = n - i < columns - column ? n - i : columns - column;
        body(i, column, width);
        i += width;
    }
}

template <class Format, bool has_bias>
void bias_dropout(const ds_kernels::BiasDropoutArgs& args, std::size_t begin, std::size_t end) {
    using Storage = typename Format::Storage;
    const auto* const bias = static_cast<const Storage*>(args.bias);
    const std::uint32_t threshold = args.key.threshold;
    const float scale = args.key.scale;
    for_numbers(args.key, begin, end, [&](std::size_t at, std::size_t n, const std::uint16_t* numbers) {
        const auto* const x = static_cast<const Storage*>(args.x) + at;
        const auto* const residual = static_cast<const Storage*>(args.residual) + at;
        auto* const out = static_cast<Storage*>(args.out) + at;
        const auto row = [=](std::size_t first, std::size_t column, std::size_t width) {
#pragma omp simd
            for (std::size_t i = 0; i < width; ++i) {
                float value = Format::widen(x[first + i]);
                if constexpr (has_bias) value += Format::widen(bias[column + i]);
                const float scaled = value * scale;
                const float kept = numbers[first + i] < threshold ? 0.0f : scaled;
                out[first + i] = Format::narrow(Format::widen(residual[first + i]) + kept);
            }
        };
        if constexpr (has_bias) {
            for_columns(at, n, args.columns, row);
        } else {
            row(0, 0, n);
        }
    });
}

template <class Format, bool has_bias>
void bias_dropout_backward(const ds_kernels::BiasDropoutArgs& args, std::size_t begin, std::size_t end, float* sums) {
    using Storage = typename Format::Storage;
    const std::size_t weight = has_bias ? args.columns : 1;
    const std::uint32_t threshold = args.key.threshold;
    const float scale = args.key.scale;
    if constexpr (has_bias) {
        for (std::size_t i = 0; i < args.columns; ++i) sums[i] = 0.0f;
    }
    const auto batch = [&](std::size_t at, std::size_t n, const std::uint16_t* numbers) {
        const auto* const grad = static_cast<const Storage*>(args.x) + at;
        auto* const out = static_cast<Storage*>(args.out) + (args.out == nullptr ? 0 : at);
        const auto row = [=](std::size_t first, std::size_t column, std::size_t width) {
#pragma omp simd
            for (std::size_t i = 0; i < width; ++i) {
                const float scaled = Format::widen(grad[first + i]) * scale;
                const float kept = numbers[first + i] < threshold ? 0.0f : scaled;
                if constexpr (has_bias) sums[column + i] += kept;
                out[first + i] = Format::narrow(kept);
            }
        };
        const auto row_sums = [=](std::size_t first, std::size_t column, std::size_t width) {
#pragma omp simd
            for (std::size_t i = 0; i < width; ++i) sums[column + i] += Format::widen(grad[first + i]);
        };
        if constexpr (!has_bias) {
            row(0, 0, n);
        } else if (out == nullptr) {
            for_columns(at, n, args.columns, row_sums);
        } else {
            for_columns(at, n, args.columns, row);
        }
    };
    for_numbers(args.key, begin * weight, end * weight, batch);
}

}  // namespace
