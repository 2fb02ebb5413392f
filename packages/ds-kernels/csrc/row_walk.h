// Walks over one row in whole vectors, and fetches meanwhile what comes later: memory would else lie idle.
//
// Include only from isa_*.cpp, behind the target pragma; see float_format.h.
#pragma once

#include <cstddef>

namespace {

constexpr std::size_t kSumLanes = 64;  // elements at a time, running sums: whole vectors of every instruction set

// Fetches nothing.
struct NoFetch {
    void operator()(std::size_t) const {}
};

// Fetches of some arrays the kSumLanes elements that lie `ahead` elements further on.
template <class Storage, std::size_t count>
struct Fetch {
    const Storage* arrays[count];  // null: nothing
    std::size_t ahead;

    void operator()(std::size_t first) const {
        constexpr std::size_t kLine = 64 / sizeof(Storage);
        for (const Storage* const array : arrays) {
            if (array == nullptr) continue;
            for (std::size_t i = 0; i < kSumLanes; i += kLine) __builtin_prefetch(array + ahead + first + i);
        }
    }
};

// Far enough for memory to answer in time where arrays are walked through once.
template <class Storage>
constexpr std::size_t kAhead = 2048 / sizeof(Storage);

// Calls each(i) for 0 <= i < n; before each whole stretch of kSumLanes elements, fetch(its beginning).
template <class Each, class Fetching = NoFetch>
inline void for_row(std::size_t n, const Each& each, const Fetching& fetch = {}) {
    const std::size_t whole = n / kSumLanes * kSumLanes;
    for (std::size_t first = 0; first < whole; first += kSumLanes) {
        fetch(first);
#pragma omp simd
        for (std::size_t lane = 0; lane < kSumLanes; ++lane) each(first + lane);
    }
#pragma omp simd
    for (std::size_t i = whole; i < n; ++i) each(i);
}

}  // namespace
