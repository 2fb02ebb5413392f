// Runs a step over arrays in any codec, block by block: decode, step, encode, all in one pass over memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "state_table.h"
#include "optimizer_table.h"

namespace ds_kernels {

struct Operand {
    void* data;   // null: there is none
    void* extra;  // what the codec keeps beside the data
    int codec;
};

struct StepArrays {
    Operand param;
    Operand grad;
    Operand states[2];
    Operand copy;  // written only
    bool zero_grad;
};

// Which of param and states a step writes.
struct Written {
    bool param;
    bool states;
};

constexpr int kPlainCodec = 0;  // float32: used in place

inline float* decoded(const StateTable& codecs, const Operand& from, float* buffer, std::size_t at, std::size_t n) {
    if (from.data == nullptr) {
        return nullptr;
    }
    if (from.codec == kPlainCodec) {
        return static_cast<float*>(from.data) + at;
    }
    codecs.decode[from.codec](from.data, from.extra, buffer, at, n);
    return buffer;
}

inline void encode(const StateTable& codecs, const float* block, const Operand& to, std::size_t at, std::size_t n) {
    if (to.data != nullptr && to.codec != kPlainCodec) {
        codecs.encode[to.codec](block, to.data, to.extra, at, n);
    }
}

// Calls step(block, at) on consecutive blocks of begin ... end; `begin` is a multiple of 64.
template <class Step>
void for_blocks(const StateTable& codecs, const StepArrays& arrays, Written written, std::size_t begin,
                std::size_t end, const Step& step) {
    constexpr std::size_t kApart = 80;  // a few cache lines, so that buffers do not contend for the same sets
    alignas(64) float buffers[4][kStepBlock + kApart];
    for (std::size_t at = begin; at < end; at += kStepBlock) {
        const std::size_t n = std::min(end - at, kStepBlock);
        const StepBlock block{decoded(codecs, arrays.param, buffers[0], at, n),
                              decoded(codecs, arrays.grad, buffers[1], at, n),
                              {decoded(codecs, arrays.states[0], buffers[2], at, n),
                               decoded(codecs, arrays.states[1], buffers[3], at, n)},
                              n};
        step(block, at);
        if (written.param) {
            encode(codecs, block.param, arrays.param, at, n);
            encode(codecs, block.param, arrays.copy, at, n);
        }
        if (written.states) {
            encode(codecs, block.states[0], arrays.states[0], at, n);
            encode(codecs, block.states[1], arrays.states[1], at, n);
        }
        if (arrays.zero_grad) {
            const std::size_t size = arrays.grad.codec == kPlainCodec ? sizeof(float) : sizeof(std::uint16_t);
            std::memset(static_cast<char*>(arrays.grad.data) + at * size, 0, n * size);
        }
    }
}

}  // namespace ds_kernels
