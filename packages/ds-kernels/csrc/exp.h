// exp(x) for x <= 0, as softmax needs it: within 1 unit in the last place, the same bits on every instruction set.
//
// Below -87.3, where float32 has no normal numbers, the result is 0. NaN stays NaN.
#pragma once

#include <cstdint>

#include "float_format.h"

namespace {

inline float exp_of_nonpositive(float x) {
    constexpr float kSmallest = -87.33654f;   // log of the smallest normal number
    constexpr float kRound = 12582912.0f;     // 1.5 * 2^23: adding it rounds to an integer, in the low bits
    constexpr float kLn2High = 0.693359375f;  // few bits: its products with such integers are exact
    constexpr float kLn2Low = -2.12194440e-4f;
    const float shifted = __builtin_fmaf(x, 1.44269504f, kRound);
    const float n = shifted - kRound;
    const float r = __builtin_fmaf(-n, kLn2Low, __builtin_fmaf(-n, kLn2High, x));
    // Cephes' polynomial for |r| <= ln(2) / 2.
    float p = __builtin_fmaf(1.9875691500e-4f, r, 1.3981999507e-3f);
    p = __builtin_fmaf(p, r, 8.3334519073e-3f);
    p = __builtin_fmaf(p, r, 4.1665795894e-2f);
    p = __builtin_fmaf(p, r, 1.6666665459e-1f);
    p = __builtin_fmaf(p, r, 5.0000001201e-1f);
    p = __builtin_fmaf(p, r * r, r + 1.0f);
    const float power = as_float((as_bits(shifted) - as_bits(kRound) + 127u) << 23);
    return x < kSmallest ? 0.0f : p * power;
}

}  // namespace
