// Splits work over OpenMP threads so that no result depends on how many there are.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstddef>

#include "kernel_table.h"

#if defined(DS_KERNELS_X86)
#include <xmmintrin.h>
#endif

namespace ds_kernels {

// Holds the thread to round-to-nearest with subnormals kept. Without it results would depend on the number of
// threads: torch.set_flush_denormal, for one, changes the calling thread only.
class StrictFloat {
  public:
#if defined(DS_KERNELS_X86)
    StrictFloat() : saved_(_mm_getcsr()) { _mm_setcsr(kDefaultControl); }
    ~StrictFloat() { _mm_setcsr(saved_); }
    StrictFloat(const StrictFloat&) = delete;
    StrictFloat& operator=(const StrictFloat&) = delete;

  private:
    static constexpr unsigned kDefaultControl = 0x1f80;  // all exceptions masked, nothing else set
    unsigned saved_;
#else
    StrictFloat() {}
#endif
};

// Calls body(begin, end) on contiguous slices that cover 0 ... count; an item is `weight` elements.
template <class Body>
void for_slices(std::size_t count, std::size_t weight, int threads, const Body& body) {
    constexpr std::size_t kElementsPerThread = 16384;  // below, starting a thread costs more than it saves
    constexpr std::size_t kCacheLine = 64;             // in elements of any format: two threads never share a line
    const std::size_t useful = count * weight / kElementsPerThread;
    const int team = static_cast<int>(std::min<std::size_t>(useful, threads > 0 ? threads : 1));
    if (team <= 1) {
        const StrictFloat guard;
        body(std::size_t{0}, count);
        return;
    }
#pragma omp parallel num_threads(team)
    {
        const StrictFloat guard;
        const std::size_t size = omp_get_num_threads();
        const std::size_t index = omp_get_thread_num();
        const std::size_t granule = weight >= kCacheLine ? 1 : kCacheLine;
        const std::size_t slice = ((count + size - 1) / size + granule - 1) / granule * granule;
        const std::size_t begin = std::min(count, index * slice);
        const std::size_t end = std::min(count, begin + slice);
        if (begin < end) {
            body(begin, end);
        }
    }
}

}  // namespace ds_kernels
