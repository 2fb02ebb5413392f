// Random numbers as a function of a seed and an element's place: Philox4x32 with 10 rounds.
//
// See [Note: Element numbers] in backends/plain/philox.py; the bits are those of csrc/philox.h. Four neighbours, a packet,
// need one counter, or two where they do not begin at a multiple of four.
#pragma once

#include "packet.cuh"

namespace ds_kernels {

struct DropoutKey {
    const Size* seed;    // null: nothing is dropped
    unsigned threshold;  // elements with a smaller number are dropped
    float scale;         // of those that stay
};

struct Counter {
    Size low, high;  // the 128 bits made of it
};

__device__ inline Counter philox(Size seed, Size counter) {
    unsigned c0 = unsigned(counter), c1 = unsigned(counter >> 32), c2 = 0, c3 = 0;
    unsigned k0 = unsigned(seed), k1 = unsigned(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const Size p0 = Size(c0) * 0xD2511F53u, p1 = Size(c2) * 0xCD9E8D57u;
        c0 = unsigned(p1 >> 32) ^ c1 ^ k0;
        c1 = unsigned(p1);
        c2 = unsigned(p0 >> 32) ^ c3 ^ k1;
        c3 = unsigned(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {Size(c1) << 32 | c0, Size(c3) << 32 | c2};
}

// Scales the packet of the elements from `first`, and puts zeros in the place of those that are dropped.
__device__ inline Packet drop(const DropoutKey& key, Size seed, Size first, Packet packet) {
    if (key.seed == nullptr) {
        return packet;
    }
    const unsigned skipped = unsigned(first % 8);
    const Counter here = philox(seed, first / 8);
    Size numbers = skipped < 4 ? here.low : here.high;
    if (const unsigned shift = skipped % 4 * 16; shift != 0) {
        const Size after = skipped < 4 ? here.high : philox(seed, first / 8 + 1).low;
        numbers = numbers >> shift | after << (64 - shift);
    }
#pragma unroll
    for (int k = 0; k < kPacket; ++k) {
        const float scaled = packet.at[k] * key.scale;
        packet.at[k] = unsigned(numbers >> 16 * k & 0xffffu) < key.threshold ? 0.0f : scaled;
    }
    return packet;
}

}  // namespace ds_kernels
