// What a block's elements become: for each code its digits, their values, and how the scale fits the block.
#pragma once

#include <cstddef>
#include <cstdint>

#include "float_format.h"

namespace {

constexpr std::size_t kCodeLanes = 64;  // sums of a block run in so many lanes, which then meet 32, 16, ..., 1 apart

// How one block is coded.
struct Fit {
    float scale;      // value of the digit that stands for 1
    float inverse;    // of the scale; 0 where that would overflow
    float threshold;  // ternary: smaller magnitudes become 0
};


// Sum of value(i) for i < n, a multiple of the lanes.
template <class Value>
inline float lane_sum(std::size_t n, const Value& value) {
    float sums[kCodeLanes] = {};
    for (std::size_t at = 0; at < n; at += kCodeLanes) {
#pragma omp simd
        for (std::size_t lane = 0; lane < kCodeLanes; ++lane) sums[lane] += value(at + lane);
    }
    for (std::size_t half = kCodeLanes / 2; half > 0; half /= 2) {
        for (std::size_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    }
    return sums[0];
}

// Compared as integers, so that NaN is larger than all else and shows in the scale.
inline float largest_magnitude(const float* x, std::size_t n) {
    std::uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (std::size_t i = 0; i < n; ++i) {
        const std::uint32_t bits = as_bits(x[i]) & kMagnitude;
        largest = bits > largest ? bits : largest;
    }
    return as_float(largest);
}

// One bit: the sign. The scale is the mean magnitude, which leaves the least error.
struct SignCode {
    static constexpr unsigned kDigits = 8;  // of a byte
    static constexpr unsigned kBase = 2;

    static Fit fit(const float* x, std::size_t padded, std::size_t numel) {
        const float sum = lane_sum(padded, [&](std::size_t i) { return magnitude(x[i]); });
        return {sum / static_cast<float>(numel), 0.0f, 0.0f};
    }
    static std::uint32_t digit(float x, const Fit&) { return x >= 0.0f ? 1u : 0u; }
    static float value(std::uint32_t digit) { return static_cast<float>(2 * static_cast<std::int32_t>(digit) - 1); }
};

// -1, 0 or 1, five to a byte. Magnitudes up to 0.7 of their mean become 0; the scale is the mean of the others.
struct TernaryCode {
    static constexpr unsigned kDigits = 5;
    static constexpr unsigned kBase = 3;

    static Fit fit(const float* x, std::size_t padded, std::size_t numel) {
        const float sum = lane_sum(padded, [&](std::size_t i) { return magnitude(x[i]); });
        const float mean = sum / static_cast<float>(numel);
        const float threshold = 0.7f * mean;
        const float rest =
            lane_sum(padded, [&](std::size_t i) { return magnitude(x[i]) > threshold ? magnitude(x[i]) : 0.0f; });
        std::uint32_t kept = 0;
#pragma omp simd reduction(+ : kept)
        for (std::size_t i = 0; i < padded; ++i) kept += magnitude(x[i]) > threshold ? 1u : 0u;
        // Nothing is kept of zeros, and of NaN and infinity, which the mean passes on.
        return {kept > 0 ? rest / static_cast<float>(kept) : mean, 0.0f, threshold};
    }
    static std::uint32_t digit(float x, const Fit& fit) {
        return 1u + (x > fit.threshold ? 1u : 0u) - (x < -fit.threshold ? 1u : 0u);
    }
    static float value(std::uint32_t digit) { return static_cast<float>(static_cast<std::int32_t>(digit) - 1); }
};

// Integers -levels ... levels in two's complement, rounded to the nearest, ties to even.
template <unsigned bits>
struct IntCode {
    static constexpr unsigned kDigits = 8 / bits;
    static constexpr unsigned kBase = 1u << bits;
    static constexpr float kLevels = static_cast<float>((1u << (bits - 1)) - 1u);

    static Fit fit(const float* x, std::size_t padded, std::size_t) {
        return {largest_magnitude(x, padded) / kLevels, 0.0f, 0.0f};
    }
    static std::uint32_t digit(float x, const Fit& fit) {
        constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
        float scaled = x * fit.inverse;
        scaled = scaled < kLevels ? scaled : kLevels;  // also NaN
        scaled = scaled > -kLevels ? scaled : -kLevels;
        return (as_bits(scaled + kRound) - as_bits(kRound)) & (kBase - 1u);
    }
    static float value(std::uint32_t digit) {
        constexpr std::uint32_t kSign = kBase / 2;
        return static_cast<float>(static_cast<std::int32_t>(digit ^ kSign) - static_cast<std::int32_t>(kSign));
    }
};

}  // namespace
