// Codes blocks of floats into bytes and back, with error feedback, in one pass over memory.
//
// The layout is that of [Note: Payload] in backends/payload.py. Sixteen threads code a block: they read its elements in
// packets, and each makes every sixteenth byte, whose digits lie m elements apart; in between, the block is in shared
// memory. So accesses to memory are contiguous over neighbouring threads on both sides.
#pragma once

#include "block_codes.cuh"

namespace ds_kernels {

constexpr int kCodecThreads = 128;
constexpr int kTeams = kCodecThreads / kTeam;
// Behind each block: zeros for the digits of its last byte; and the two blocks of a warp are in different banks.
constexpr int kBehind = 16;

struct EncodeArgs {
    const void* x;
    float* error;  // null: what is lost is lost
    unsigned char* payload;
    Size numel;
    unsigned block;
};

struct DecodeArgs {
    void* out;
    const unsigned char* payload;
    Size numel;
    unsigned block;
    float weight;
};

// The block of this thread's team, and its place in the payload. A team beyond the last one has no elements.
template <class Code, class Scale>
struct Place {
    Size first;
    int numel;
    int rows;  // of 64
    int bytes;
    Size scale;
    Size codes;

    __device__ Place(Size all, unsigned block) {
        constexpr Size kScaleBytes = sizeof(typename Scale::Storage);
        const Size index = Size(blockIdx.x) * kTeams + threadIdx.x / kTeam;
        first = index * block;
        numel = first >= all ? 0 : all - first < block ? int(all - first) : int(block);
        rows = (numel + kRow - 1) / kRow;
        bytes = bytes_of(numel);
        scale = index * kScaleBytes;
        codes = (all + block - 1) / block * kScaleBytes + index * Size(bytes_of(int(block)));
    }
    __device__ static int bytes_of(int numel) { return (numel + int(Code::kDigits) - 1) / int(Code::kDigits); }
};

__device__ inline unsigned scale_bits(float stored) { return __float_as_uint(stored); }
__device__ inline unsigned scale_bits(unsigned short stored) { return stored; }
__device__ inline void scale_from(unsigned bits, float& stored) { stored = __uint_as_float(bits); }
__device__ inline void scale_from(unsigned bits, unsigned short& stored) { stored = (unsigned short)(bits); }

// Writes the scale, a byte a thread for it may lie anywhere, and returns what a reader will find.
template <class Scale>
__device__ inline float store_scale(unsigned char* to, float scale, bool exists) {
    constexpr unsigned kBytes = sizeof(typename Scale::Storage);
    constexpr float kLargest = 65504.0f;  // a larger scale would be infinite, and all it multiplies lost
    const bool saturates = kBytes == 2 && scale > kLargest && scale < __uint_as_float(0x7f800000u);
    const typename Scale::Storage stored = Scale::narrow(saturates ? kLargest : scale);
    const unsigned byte = threadIdx.x % kTeam;
    if (exists && byte < kBytes) to[byte] = (unsigned char)(scale_bits(stored) >> (8 * byte));
    return Scale::widen(stored);
}

template <class Scale>
__device__ inline float load_scale(const unsigned char* from, bool exists) {
    unsigned bits = 0;
#pragma unroll
    for (unsigned byte = 0; byte < sizeof(typename Scale::Storage); ++byte) {
        bits |= exists ? unsigned(from[byte]) << (8 * byte) : 0u;
    }
    typename Scale::Storage stored;
    scale_from(bits, stored);
    return Scale::widen(stored);
}

// How many of the four elements from `at` on there are.
__device__ inline int filled(int numel, int at) { return numel - at >= kPacket ? kPacket : numel > at ? numel - at : 0; }

// room: the most elements of a block.
template <class Code, class X, class Scale, int room>
__device__ inline void block_encode(const EncodeArgs& args) {
    constexpr float kSmallestNormal = 0x1p-126f;  // below, the inverse would be infinite
    __shared__ float blocks[kTeams][room + kBehind];
    const Place<Code, Scale> place(args.numel, args.block);
    const int thread = int(threadIdx.x % kTeam);
    float* const block = blocks[threadIdx.x / kTeam];
    const auto* const x = static_cast<const typename X::Storage*>(args.x) + place.first;
    float* const error = args.error == nullptr ? nullptr : args.error + place.first;
    const bool aligned = packet_aligned<X>(x) && packet_aligned<Float32>(error);

    for (int row = 0; row < place.rows; ++row) {
        const int at = row * kRow + thread * kPacket, count = filled(place.numel, at);
        const bool whole = aligned && count == kPacket;
        Packet packet = load<X>(x + at, whole, count);
        if (error != nullptr) {
            const Packet e = load<Float32>(error + at, whole, count);
#pragma unroll
            for (int k = 0; k < kPacket; ++k) packet.at[k] = packet.at[k] + e.at[k];
        }
#pragma unroll
        for (int k = 0; k < kPacket; ++k) block[at + k] = packet.at[k];
    }
    block[place.rows * kRow + thread] = 0.0f;
    __syncwarp();
    const Fit found = Code::fit(block + thread * kPacket, place.rows, place.numel);
    const float scale = store_scale<Scale>(args.payload + place.scale, found.scale, place.numel > 0);
    const Fit fit{scale, scale >= kSmallestNormal ? 1.0f / scale : 0.0f, found.threshold};
    unsigned char* const codes = args.payload + place.codes;
    for (int j = thread; j < place.bytes; j += kTeam) {
        unsigned code = 0, power = 1;
#pragma unroll
        for (unsigned k = 0; k < Code::kDigits; ++k) {
            float& element = block[k * unsigned(place.bytes) + unsigned(j)];
            const unsigned digit = Code::digit(element, fit);
            element = element - fit.scale * Code::value(digit);
            code += digit * power;
            power *= Code::kBase;
        }
        codes[j] = (unsigned char)(code);
    }
    __syncwarp();
    if (error == nullptr) {
        return;
    }
    for (int row = 0; row < place.rows; ++row) {
        const int at = row * kRow + thread * kPacket, count = filled(place.numel, at);
        const Packet left{{block[at], block[at + 1], block[at + 2], block[at + 3]}};
        store<Float32>(error + at, left, aligned && count == kPacket, count);
    }
}

// accumulate: what is decoded is added to what is there.
template <class Code, class Out, class Scale, int room, bool accumulate>
__device__ inline void block_decode(const DecodeArgs& args) {
    __shared__ float blocks[kTeams][room + kBehind];
    const Place<Code, Scale> place(args.numel, args.block);
    const int thread = int(threadIdx.x % kTeam);
    float* const block = blocks[threadIdx.x / kTeam];
    auto* const out = static_cast<typename Out::Storage*>(args.out) + place.first;
    const bool aligned = packet_aligned<Out>(out);

    const float scale = args.weight * load_scale<Scale>(args.payload + place.scale, place.numel > 0);
    const unsigned char* const codes = args.payload + place.codes;
    for (int j = thread; j < place.bytes; j += kTeam) {
        unsigned code = codes[j];
#pragma unroll
        for (unsigned k = 0; k < Code::kDigits; ++k) {
            block[k * unsigned(place.bytes) + unsigned(j)] = scale * Code::value(code % Code::kBase);
            code /= Code::kBase;
        }
    }
    __syncwarp();
    for (int row = 0; row < place.rows; ++row) {
        const int at = row * kRow + thread * kPacket, count = filled(place.numel, at);
        const bool whole = aligned && count == kPacket;
        Packet packet{{block[at], block[at + 1], block[at + 2], block[at + 3]}};
        if constexpr (accumulate) {
            const Packet before = load<Out>(out + at, whole, count);
#pragma unroll
            for (int k = 0; k < kPacket; ++k) packet.at[k] = before.at[k] + packet.at[k];
        }
        store<Out>(out + at, packet, whole, count);
    }
}

}  // namespace ds_kernels
