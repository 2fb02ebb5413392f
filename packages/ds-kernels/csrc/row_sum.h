// Sum of numbers computed from the elements of one row, in an order that depends on the row's length alone.
//
// Include only from isa_*.cpp, behind the target pragma; see float_format.h.
#pragma once

#include <cstddef>

namespace {

constexpr std::size_t kSumLanes = 64;  // running sums: whole vectors of every instruction set

// Element i goes to running sum i % kSumLanes; the running sums meet in a tree.
template <class Term>
inline float row_sum(std::size_t n, const Term& term) {
    float sum[kSumLanes] = {};
    const std::size_t whole = n / kSumLanes * kSumLanes;
    for (std::size_t first = 0; first < whole; first += kSumLanes) {
#pragma omp simd
        for (std::size_t lane = 0; lane < kSumLanes; ++lane) sum[lane] += term(first + lane);
    }
    for (std::size_t i = whole; i < n; ++i) sum[i - whole] += term(i);
    for (std::size_t half = kSumLanes / 2; half > 0; half /= 2) {
        for (std::size_t lane = 0; lane < half; ++lane) sum[lane] += sum[lane + half];
    }
    return sum[0];
}

}  // namespace
