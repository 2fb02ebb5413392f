// What a block's elements become: for each code its digits, their values, and how the scale fits the block.
//
// Sixteen threads hold a block, four of the 64 lanes of a sum each: thread t has the elements 4t ... 4t + 3 of every 64.
// Operations and their order are those of csrc/block_codes.h, so bytes are those of the CPU.
#pragma once

#include "packet.cuh"

namespace ds_kernels {

constexpr int kTeam = 16;
constexpr int kRow = kTeam * kPacket;  // the lanes of a sum

// How one block is coded.
struct Fit {
    float scale;      // value of the digit that stands for 1
    float inverse;    // of the scale; 0 where that would overflow
    float threshold;  // ternary: smaller magnitudes become 0
};

// Sum of value(x) over a block's rows: in 64 lanes, which then meet 32, 16, ..., 1 apart. `x`: this thread's first.
template <class Value>
__device__ inline float lane_sum(const float* x, int rows, const Value& value) {
    Packet sum{};
    for (int row = 0; row < rows; ++row) {
#pragma unroll
        for (int k = 0; k < kPacket; ++k) sum.at[k] += value(x[row * kRow + k]);
    }
#pragma unroll
    for (int apart = kTeam / 2; apart > 0; apart /= 2) {
#pragma unroll
        for (int k = 0; k < kPacket; ++k) sum.at[k] += __shfl_xor_sync(~0u, sum.at[k], apart);
    }
    return (sum.at[0] + sum.at[2]) + (sum.at[1] + sum.at[3]);
}

// One bit: the sign. The scale is the mean magnitude.
struct Sign {
    static constexpr unsigned kDigits = 8;  // of a byte
    static constexpr unsigned kBase = 2;

    __device__ static Fit fit(const float* x, int rows, int numel) {
        const float sum = lane_sum(x, rows, [](float value) { return magnitude(value); });
        return {sum / float(numel), 0.0f, 0.0f};
    }
    __device__ static unsigned digit(float x, const Fit&) { return x >= 0.0f ? 1u : 0u; }
    __device__ static float value(unsigned digit) { return float(2 * int(digit) - 1); }
};

// -1, 0 or 1. Magnitudes up to 0.7 of their mean become 0; the scale is the mean of the others.
struct Ternary {
    static constexpr unsigned kDigits = 5;
    static constexpr unsigned kBase = 3;

    __device__ static Fit fit(const float* x, int rows, int numel) {
        const float mean = lane_sum(x, rows, [](float value) { return magnitude(value); }) / float(numel);
        const float threshold = 0.7f * mean;
        const float rest = lane_sum(
            x, rows, [=](float value) { return magnitude(value) > threshold ? magnitude(value) : 0.0f; });
        // Exact, as a sum of at most 1,024 ones.
        const float kept = lane_sum(x, rows, [=](float value) { return magnitude(value) > threshold ? 1.0f : 0.0f; });
        return {kept > 0.0f ? rest / kept : mean, 0.0f, threshold};
    }
    __device__ static unsigned digit(float x, const Fit& fit) {
        return 1u + (x > fit.threshold ? 1u : 0u) - (x < -fit.threshold ? 1u : 0u);
    }
    __device__ static float value(unsigned digit) { return float(int(digit) - 1); }
};

// Integers -levels ... levels in two's complement, rounded to the nearest, ties to even.
template <unsigned bits>
struct Int {
    static constexpr unsigned kDigits = 8 / bits;
    static constexpr unsigned kBase = 1u << bits;
    static constexpr float kLevels = float((1u << (bits - 1)) - 1u);

    // Magnitudes are compared as integers, so that NaN is larger than all else and shows in the scale.
    __device__ static Fit fit(const float* x, int rows, int) {
        unsigned largest = 0;
        for (int row = 0; row < rows; ++row) {
#pragma unroll
            for (int k = 0; k < kPacket; ++k) largest = larger(largest, magnitude_bits(x[row * kRow + k]));
        }
#pragma unroll
        for (int apart = kTeam / 2; apart > 0; apart /= 2) {
            largest = larger(largest, __shfl_xor_sync(~0u, largest, apart));
        }
        return {__uint_as_float(largest) / kLevels, 0.0f, 0.0f};
    }
    __device__ static unsigned digit(float x, const Fit& fit) {
        constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
        float scaled = x * fit.inverse;
        scaled = scaled < kLevels ? scaled : kLevels;  // also NaN
        scaled = scaled > -kLevels ? scaled : -kLevels;
        return (__float_as_uint(scaled + kRound) - __float_as_uint(kRound)) & (kBase - 1u);
    }
    __device__ static float value(unsigned digit) {
        constexpr unsigned kSign = kBase / 2;
        return float(int(digit ^ kSign) - int(kSign));
    }
};

}  // namespace ds_kernels
