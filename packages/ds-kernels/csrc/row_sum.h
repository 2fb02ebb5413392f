// Sums of numbers computed from the elements of one row, in an order that depends on the row's length alone.
//
// Include only from isa_*.cpp, behind the target pragma; see float_format.h.
#pragma once

#include <cstddef>

#include "row_walk.h"

namespace {

// Two numbers, added as one.
struct Pair {
    float first, second;
};

// Running sums meet in a tree.
inline float lanes_sum(float* sum) {
    for (std::size_t half = kSumLanes / 2; half > 0; half /= 2) {
        for (std::size_t lane = 0; lane < half; ++lane) sum[lane] += sum[lane + half];
    }
    return sum[0];
}

// The sum of term(i), 0 <= i < n. Element i goes to running sum i % kSumLanes.
template <class Term>
inline float row_sum(std::size_t n, const Term& term) {
    float sum[kSumLanes] = {};
    const std::size_t whole = n / kSumLanes * kSumLanes;
    for (std::size_t first = 0; first < whole; first += kSumLanes) {
#pragma omp simd
        for (std::size_t lane = 0; lane < kSumLanes; ++lane) sum[lane] += term(first + lane);
    }
    for (std::size_t i = whole; i < n; ++i) sum[i - whole] += term(i);
    return lanes_sum(sum);
}

// The sums of both numbers of term(i).
template <class Term>
inline Pair row_sums(std::size_t n, const Term& term) {
    float first_sum[kSumLanes] = {}, second_sum[kSumLanes] = {};
    const std::size_t whole = n / kSumLanes * kSumLanes;
    for (std::size_t first = 0; first < whole; first += kSumLanes) {
#pragma omp simd
        for (std::size_t lane = 0; lane < kSumLanes; ++lane) {
            const Pair pair = term(first + lane);
            first_sum[lane] += pair.first;
            second_sum[lane] += pair.second;
        }
    }
    for (std::size_t i = whole; i < n; ++i) {
        const Pair pair = term(i);
        first_sum[i - whole] += pair.first;
        second_sum[i - whole] += pair.second;
    }
    return {lanes_sum(first_sum), lanes_sum(second_sum)};
}

}  // namespace
