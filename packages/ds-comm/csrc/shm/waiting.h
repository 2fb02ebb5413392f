// Waiting for a counter in shared memory: a short spin, then sleep on a futex.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>
#include <cstdint>

#include "segment.h"

namespace ds_comm {

inline void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Whether `counter` has come to `target`; right as long as they are less than 2^31 apart.
inline bool reached(const Counter& counter, std::uint32_t target) {
    return std::int32_t(counter.value.load(std::memory_order_acquire) - target) >= 0;
}

inline void wake(Counter& counter) {
    syscall(SYS_futex, &counter.value, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

// Sequentially consistent, here and in sleep_on: either the sleeper sees the new value or we see the sleeper.
inline void publish(Counter& counter, std::uint32_t value) {
    counter.value.store(value, std::memory_order_seq_cst);
    if (counter.sleepers.load(std::memory_order_seq_cst) != 0) {
        wake(counter);
    }
}

// Returns when `counter` has changed, somebody has called wake, or some milliseconds have passed.
inline void sleep_on(Counter& counter, std::uint32_t target, long milliseconds) {
    counter.sleepers.fetch_add(1, std::memory_order_seq_cst);
    const std::uint32_t seen = counter.value.load(std::memory_order_seq_cst);
    if (std::int32_t(seen - target) < 0) {
        const timespec limit{milliseconds / 1000, milliseconds % 1000 * 1000000};
        syscall(SYS_futex, &counter.value, FUTEX_WAIT, seen, &limit, nullptr, 0);
    }
    counter.sleepers.fetch_sub(1, std::memory_order_seq_cst);
}

}  // namespace ds_comm
