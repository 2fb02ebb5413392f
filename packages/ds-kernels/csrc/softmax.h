// softmax(scores * scale + mask) of rows, then dropout, and its derivative: one pass over memory each.
//
// A row is worked on in a buffer of float32 that stays in a cache. Where all is masked the row is zeros: the largest score
// is minus infinity then, the exponentials are zeros, and so is their sum.
#pragma once

#include <cstddef>
#include <cstdint>

#include "exp.h"
#include "float_format.h"
#include "philox.h"
#include "row_sum.h"
#include "softmax_table.h"

namespace {

// NaN is passed over here, and comes back in the sum of the exponentials.
inline float largest(const float* row, std::size_t n) {
    float most[kSumLanes];
    for (float& value : most) value = -__builtin_inff();
    const std::size_t whole = n / kSumLanes * kSumLanes;
    for (std::size_t first = 0; first < whole; first += kSumLanes) {
#pragma omp simd
        for (std::size_t lane = 0; lane < kSumLanes; ++lane) {
            const float value = row[first + lane];
            most[lane] = value > most[lane] ? value : most[lane];
        }
    }
    for (std::size_t i = whole; i < n; ++i) most[0] = row[i] > most[0] ? row[i] : most[0];
    for (const float value : most) most[0] = value > most[0] ? value : most[0];
    return most[0];
}

template <class Format>
inline void masked_scores(const ds_kernels::SoftmaxArgs& args, std::size_t index, std::size_t n, float* row) {
    using Storage = typename Format::Storage;
    const auto* const scores = static_cast<const Storage*>(args.scores) + index * args.keys;
    const float scale = args.scale;
    if (args.mask == nullptr) {
#pragma omp simd
        for (std::size_t i = 0; i < n; ++i) row[i] = Format::widen(scores[i]) * scale;
        return;
    }
    const std::size_t query = index % args.queries, head = index / args.queries % args.heads;
    const std::size_t batch = index / args.queries / args.heads;
    const auto* const mask = static_cast<const Storage*>(args.mask) + batch * args.mask_strides[0] +
                             head * args.mask_strides[1] + query * args.mask_strides[2];
#pragma omp simd
    for (std::size_t i = 0; i < n; ++i) row[i] = Format::widen(scores[i]) * scale + Format::widen(mask[i]);
}

// How many keys a query sees.
inline std::size_t seen_keys(std::size_t index, std::size_t queries, std::size_t keys, bool causal) {
    const std::size_t past = index % queries + 1;
    return causal && past < keys ? past : keys;
}

template <class Format>
inline void write_zeros(void* out, std::size_t begin, std::size_t end) {
    std::memset(static_cast<typename Format::Storage*>(out) + begin, 0, (end - begin) * sizeof(typename Format::Storage));
}

template <class Format>
void softmax(const ds_kernels::SoftmaxArgs& args, std::size_t begin, std::size_t end, float* row) {
    using Storage = typename Format::Storage;
    const std::uint32_t threshold = args.key.threshold;
    const float kept_scale = args.key.scale;
    for (std::size_t index = begin; index < end; ++index) {
        const std::size_t start = index * args.keys, n = seen_keys(index, args.queries, args.keys, args.causal);
        masked_scores<Format>(args, index, n, row);
        const float most = largest(row, n);
        const float level = most == -__builtin_inff() ? 0.0f : most;
#pragma omp simd
        for (std::size_t i = 0; i < n; ++i) row[i] = exp_of_nonpositive(row[i] - level);
        const float sum = row_sum(n, [=](std::size_t i) { return row[i]; });
        const float share = sum == 0.0f ? 0.0f : 1.0f / sum;
        auto* const out = static_cast<Storage*>(args.out) + start;
#pragma omp simd
        for (std::size_t i = 0; i < n; ++i) out[i] = Format::narrow(row[i] * share);
        write_zeros<Format>(args.out, start + n, start + args.keys);
        if (args.dropped == nullptr) continue;
        for_numbers(args.key, start, start + n, [=](std::size_t at, std::size_t m, const std::uint16_t* numbers) {
            auto* const dropped = static_cast<Storage*>(args.dropped) + at;
            const float* const part = row + (at - start);
#pragma omp simd
            for (std::size_t i = 0; i < m; ++i) {
                const float scaled = part[i] * share * kept_scale;
                dropped[i] = Format::narrow(numbers[i] < threshold ? 0.0f : scaled);
            }
        });
        write_zeros<Format>(args.dropped, start + n, start + args.keys);
    }
}

// With g the gradient of the probabilities y: y * (g - sum(g * y)), times the scores' scale.
template <class Format>
void softmax_backward(const ds_kernels::SoftmaxBackwardArgs& args, std::size_t begin, std::size_t end, float* row) {
    using Storage = typename Format::Storage;
    const std::uint32_t threshold = args.key.threshold;
    const float kept_scale = args.key.scale, scale = args.scale;
    for (std::size_t index = begin; index < end; ++index) {
        const std::size_t start = index * args.keys, n = seen_keys(index, args.queries, args.keys, args.causal);
        for_numbers(args.key, start, start + n, [=](std::size_t at, std::size_t m, const std::uint16_t* numbers) {
            const auto* const grad = static_cast<const Storage*>(args.grad) + at;
            float* const part = row + (at - start);
#pragma omp simd
            for (std::size_t i = 0; i < m; ++i) {
                const float scaled = Format::widen(grad[i]) * kept_scale;
                part[i] = numbers[i] < threshold ? 0.0f : scaled;
            }
        });
        const auto* const y = static_cast<const Storage*>(args.probabilities) + start;
        auto* const out = static_cast<Storage*>(args.out) + start;
        const float along = row_sum(n, [=](std::size_t i) { return row[i] * Format::widen(y[i]); });
#pragma omp simd
        for (std::size_t i = 0; i < n; ++i) out[i] = Format::narrow(Format::widen(y[i]) * (row[i] - along) * scale);
        write_zeros<Format>(args.out, start + n, start + args.keys);
    }
}

}  // namespace
