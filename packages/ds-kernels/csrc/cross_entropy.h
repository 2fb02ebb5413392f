// Softmax cross-entropy of rows of logits, and its gradient written over them.
//
// A row is read three times: maximum, sum of exponentials, gradient. It is short enough to stay in the cache. Sums run in
// fixed lanes over fixed blocks, so that no bit depends on the width of vectors.
#pragma once

#include <cstddef>
#include <cstdint>

#include "exp.h"
#include "float_format.h"
#include "loss_table.h"

namespace {

constexpr std::size_t kLanes = 64;
constexpr std::size_t kSumBlock = 4096;  // columns that are summed in float32 before they go on in float64

inline double lane_tree(float* sums) {
    for (std::size_t half = kLanes / 2; half > 0; half /= 2) {
        for (std::size_t i = 0; i < half; ++i) sums[i] += sums[i + half];
    }
    return sums[0];
}

// Calls body(lane, column) on all columns; full rounds of the lanes are vectors.
template <class Body>
inline void for_lanes(std::size_t begin, std::size_t end, const Body& body) {
    std::size_t at = begin;
    for (; at + kLanes <= end; at += kLanes) {
#pragma omp simd
        for (std::size_t lane = 0; lane < kLanes; ++lane) body(lane, at + lane);
    }
    for (std::size_t lane = 0; at + lane < end; ++lane) body(lane, at + lane);
}

// NaN is passed over here, and comes back in every sum.
template <class Format>
inline float row_max(const typename Format::Storage* row, std::size_t columns) {
    float most[kLanes];
    for (float& value : most) value = -__builtin_inff();
    for_lanes(0, columns, [&](std::size_t lane, std::size_t i) {
        const float value = Format::widen(row[i]);
        most[lane] = value > most[lane] ? value : most[lane];
    });
    float all = most[0];
    for (const float value : most) all = value > all ? value : all;
    return all;
}

template <class Format>
inline double row_sum_exp(const typename Format::Storage* row, std::size_t columns, float max) {
    double total = 0;
    for (std::size_t at = 0; at < columns; at += kSumBlock) {
        float sums[kLanes] = {};
        for_lanes(at, columns - at < kSumBlock ? columns : at + kSumBlock, [&](std::size_t lane, std::size_t i) {
            sums[lane] += exp_of_nonpositive(Format::widen(row[i]) - max);
        });
        total += lane_tree(sums);
    }
    return total;
}

template <class Format>
inline double row_sum(const typename Format::Storage* row, std::size_t columns) {
    double total = 0;
    for (std::size_t at = 0; at < columns; at += kSumBlock) {
        float sums[kLanes] = {};
        for_lanes(at, columns - at < kSumBlock ? columns : at + kSumBlock,
                  [&](std::size_t lane, std::size_t i) { sums[lane] += Format::widen(row[i]); });
        total += lane_tree(sums);
    }
    return total;
}

// exp(logit - max) * slope - offset everywhere, and less `one` at the target.
template <class Format>
inline void row_gradient(typename Format::Storage* row, std::size_t columns, std::size_t target, float max,
                         double slope, double offset, double one) {
    const double at_target = exp_of_nonpositive(Format::widen(row[target]) - max) * slope - offset - one;
    const float a = static_cast<float>(slope), b = static_cast<float>(-offset);
#pragma omp simd
    for (std::size_t i = 0; i < columns; ++i) {
        row[i] = Format::narrow(__builtin_fmaf(exp_of_nonpositive(Format::widen(row[i]) - max), a, b));
    }
    row[target] = Format::narrow(static_cast<float>(at_target));
}

template <class Format>
void cross_entropy(const ds_kernels::CrossEntropyArgs& args, std::size_t begin, std::size_t end) {
    using Storage = typename Format::Storage;
    const std::size_t columns = args.columns;
    for (std::size_t i = begin; i < end; ++i) {
        Storage* const row = static_cast<Storage*>(args.logits) + i * columns;
        if (args.target[i] == args.ignore_index) {
            args.losses[i] = 0.0f;
            if (args.differentiate) std::memset(row, 0, columns * sizeof(Storage));
            continue;
        }
        const auto target = static_cast<std::size_t>(args.target[i]);
        const float max = row_max<Format>(row, columns);
        const double sum_exp = row_sum_exp<Format>(row, columns, max);
        const double log_sum_exp = max + __builtin_log(sum_exp);
        double loss = log_sum_exp - (1 - args.label_smoothing) * Format::widen(row[target]);
        if (args.label_smoothing != 0) loss -= args.label_smoothing * row_sum<Format>(row, columns) / columns;
        args.losses[i] = static_cast<float>(loss + args.z_loss * log_sum_exp * log_sum_exp);
        if (args.differentiate) {
            const double scale = args.scales == nullptr ? 1.0 : args.scales[i];
            row_gradient<Format>(row, columns, target, max, scale * (1 + 2 * args.z_loss * log_sum_exp) / sum_exp,
                                 scale * args.label_smoothing / columns, scale * (1 - args.label_smoothing));
        }
    }
}

}  // namespace
