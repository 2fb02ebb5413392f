// Runs CUDA kernels on the CPU, one block after the other, for tests of what they compute: not of speed, not of races.
//
// A thread of a block is a fiber; one that waits lets the next one run. Kernels get here by defining
// DS_KERNELS_DEVICE_HEADER; see cuda/kernel.cuh of ds-kernels.
#pragma once

// C headers only: each kernel is compiled by itself, and those of C++ would take most of the time.
#include <stddef.h>
#include <string.h>
#include <ucontext.h>

extern "C" {
float erff(float) noexcept;
float expf(float) noexcept;
float fmaf(float, float, float) noexcept;
float sqrtf(float) noexcept;
float tanhf(float) noexcept;
}

#define __device__
#define __shared__ static  // one block at a time
#define __launch_bounds__(...)

namespace on_host {

struct Index {
    unsigned x = 0, y = 0, z = 0;
};

struct Fiber {
    static constexpr size_t kStack = 64 * 1024;
    ucontext_t context;
    char* stack = new char[kStack];
    bool done = false;
    ~Fiber() { delete[] stack; }
};

struct Block {
    ucontext_t scheduler;
    Fiber* fibers;
    unsigned threads;
    unsigned running = 0;
    void (*body)(const void*);
    const void* args;
};

inline Block* block = nullptr;
inline Index thread_index, block_index, block_size, grid_size;

inline void wait() { swapcontext(&block->fibers[block->running].context, &block->scheduler); }

inline void run_fiber() {
    block->body(block->args);
    block->fibers[block->running].done = true;
    wait();
}

inline unsigned threads_of(unsigned threads, unsigned = 0) { return threads; }

// All threads up to where they wait, again and again, until all are done.
inline void run_block() {
    for (unsigned i = 0; i < block->threads; ++i) {
        Fiber& fiber = block->fibers[i];
        fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack;
        fiber.context.uc_stack.ss_size = Fiber::kStack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run_fiber, 0);
    }
    for (bool alive = true; alive;) {
        alive = false;
        for (unsigned i = 0; i < block->threads; ++i) {
            if (!block->fibers[i].done) {
                block->running = thread_index.x = i;
                swapcontext(&block->scheduler, &block->fibers[i].context);
                alive = true;
            }
        }
    }
}

inline void run(unsigned threads, unsigned blocks_x, unsigned blocks_y, void (*body)(const void*), const void* args) {
    Block own{};
    own.fibers = new Fiber[threads];
    own.threads = threads;
    own.body = body;
    own.args = args;
    block = &own;
    block_size = {threads, 1, 1};
    grid_size = {blocks_x, blocks_y, 1};
    for (unsigned y = 0; y < blocks_y; ++y) {
        for (unsigned x = 0; x < blocks_x; ++x) {
            block_index = {x, y, 0};
            run_block();
        }
    }
    delete[] own.fibers;
    block = nullptr;
}

}  // namespace on_host

#define threadIdx on_host::thread_index
#define blockIdx on_host::block_index
#define blockDim on_host::block_size
#define gridDim on_host::grid_size

inline void __syncthreads() { on_host::wait(); }
inline void __syncwarp() { on_host::wait(); }  // every thread of the block must get here

// Every thread of the block must get here, as often as every other: true of whole warps that do the same.
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    static T slots[1024];
    const unsigned self = threadIdx.x;
    slots[self] = value;
    on_host::wait();
    const T other = slots[self ^ unsigned(mask)];
    on_host::wait();
    return other;
}

inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float rsqrtf(float value) { return 1.0f / sqrtf(value); }

#define DS_KERNELS_ENTRY(name, bounds, Args, ...)                                                               \
    extern "C" void name(const Args* args, unsigned blocks_x, unsigned blocks_y) {                              \
        on_host::run(on_host::threads_of bounds, blocks_x, blocks_y,                                            \
                     [](const void* given) { __VA_ARGS__(*static_cast<const Args*>(given)); }, args);           \
    }
