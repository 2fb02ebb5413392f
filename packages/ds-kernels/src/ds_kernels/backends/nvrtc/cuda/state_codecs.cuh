// How the tensors of a step lie in memory: four neighbouring elements become floats, and back.
//
// A codec has the name of the format it stores; the numbers and bits are those of csrc/state_codecs.h. The groups of
// [Note: Codes of 8 bits] there are held by eight neighbouring threads.
#pragma once

#include "packet.cuh"

namespace ds_kernels {

struct Operand {
    void* data;
    void* extra;  // what the codec keeps beside the data
};

struct None {};    // there is no such tensor
struct Split {};   // bfloat16, with the 16 bits that complete it to a float32 in `extra`
struct Signed {};  // int8 with a bfloat16 scale for each group in `extra`
struct Roots {};   // uint8, of the roots

constexpr unsigned kGroupThreads = 8;
constexpr Size kGroup = kGroupThreads * kPacket;

// Codec<Format>::kGrouped: all threads of a warp must take part. `whole`, `count`: see packet.cuh.
template <class Format>
struct Codec {
    static constexpr bool kGrouped = false;
    using Storage = typename Format::Storage;

    __device__ static bool aligned(const Operand& at) { return packet_aligned<Format>(static_cast<Storage*>(at.data)); }
    __device__ static Packet read(const Operand& from, Size at, bool whole, int count) {
        return load<Format>(static_cast<const Storage*>(from.data) + at, whole, count);
    }
    __device__ static void write(const Operand& to, Size at, const Packet& packet, bool whole, int count) {
        store<Format>(static_cast<Storage*>(to.data) + at, packet, whole, count);
    }
};

template <>
struct Codec<None> {
    static constexpr bool kGrouped = false;

    __device__ static bool aligned(const Operand&) { return true; }
    __device__ static Packet read(const Operand&, Size, bool, int) { return Packet{}; }
    __device__ static void write(const Operand&, Size, const Packet&, bool, int) {}
};

template <class Stored>
__device__ inline void read_stored(const Stored* from, Stored* to, bool whole, int count) {
    if (whole) {
        load_aligned(from, to);
    } else {
#pragma unroll
        for (int k = 0; k < kPacket; ++k) to[k] = k < count ? from[k] : Stored(0);
    }
}

template <class Stored>
__device__ inline void write_stored(Stored* to, const Stored* from, bool whole, int count) {
    if (whole) {
        store_aligned(to, from);
    } else {
#pragma unroll
        for (int k = 0; k < kPacket; ++k) {
            if (k < count) to[k] = from[k];
        }
    }
}

// Bits below a zero and above an infinity do not count; see csrc/state_codecs.h.
__device__ inline unsigned joined(unsigned short high, unsigned short low) {
    const unsigned size = high & 0x7fffu;
    const int given = short(low);
    const bool counts = !((size == 0 && given < 0) || (size == 0x7f80u && given > 0));
    return (unsigned(high) << 16) + unsigned(counts ? given : 0);
}

template <>
struct Codec<Split> {
    static constexpr bool kGrouped = false;
    using Half = unsigned short;

    __device__ static bool aligned(const Operand& at) {
        return packet_aligned<BFloat16>(static_cast<Half*>(at.data)) &&
               packet_aligned<BFloat16>(static_cast<Half*>(at.extra));
    }
    __device__ static Packet read(const Operand& from, Size at, bool whole, int count) {
        Half high[kPacket], low[kPacket];
        read_stored(static_cast<const Half*>(from.data) + at, high, whole, count);
        read_stored(static_cast<const Half*>(from.extra) + at, low, whole, count);
        Packet packet;
#pragma unroll
        for (int k = 0; k < kPacket; ++k) {
            packet.at[k] = __uint_as_float(joined(high[k], low[k]));
        }
        return packet;
    }
    __device__ static void write(const Operand& to, Size at, const Packet& packet, bool whole, int count) {
        Half high[kPacket], low[kPacket];
#pragma unroll
        for (int k = 0; k < kPacket; ++k) {
            const float x = packet.at[k];
            const unsigned bits = x == x ? __float_as_uint(x) : 0x7fc00000u;
            high[k] = Half((bits + 0x8000u) >> 16);
            low[k] = Half(bits);
        }
        write_stored(static_cast<Half*>(to.data) + at, high, whole, count);
        write_stored(static_cast<Half*>(to.extra) + at, low, whole, count);
    }
};

struct GroupScale {
    float value;    // 1 instead of 0, so that one can divide by it
    unsigned mask;  // 0 where all codes of the group are 0
};

// The scale of the group of this thread's four elements, of which the first writes it.
__device__ inline GroupScale store_group_scale(const Packet& packet, bool root, void* scales, Size at, int count) {
    unsigned largest = 0;
#pragma unroll
    for (int k = 0; k < kPacket; ++k) largest = larger(largest, k < count ? magnitude_bits(packet.at[k]) : 0u);
#pragma unroll
    for (int apart = kGroupThreads / 2; apart > 0; apart /= 2) {
        largest = larger(largest, __shfl_xor_sync(~0u, largest, apart));
    }
    const float size = __uint_as_float(largest);
    const unsigned short stored = BFloat16::narrow(root ? sqrtf(size) : size);
    const unsigned exponent = stored & 0x7f80u;
    const bool infinite = exponent == 0x7f80u, zero = exponent == 0;
    if (at % kGroup == 0 && count > 0) {
        static_cast<unsigned short*>(scales)[at / kGroup] = infinite ? 0x7fc0u : zero ? 0u : stored;
    }
    return infinite || zero ? GroupScale{1.0f, 0u} : GroupScale{BFloat16::widen(stored), ~0u};
}

constexpr float kRounder = 0x1.8p23f;  // adding it leaves the nearest integer, ties to even, in the low bits

// Four codes of a byte each, the first in the lowest byte.
struct Codes {
    static constexpr bool kGrouped = true;

    __device__ static bool aligned(const Operand& at) { return reinterpret_cast<Size>(at.data) % kPacket == 0; }
    __device__ static unsigned read(const Operand& from, Size at, bool whole, int count) {
        const auto* const codes = static_cast<const unsigned char*>(from.data) + at;
        if (whole) {
            return *reinterpret_cast<const unsigned*>(codes);
        }
        unsigned four = 0;
#pragma unroll
        for (int k = 0; k < kPacket; ++k) four |= k < count ? unsigned(codes[k]) << (8 * k) : 0u;
        return four;
    }
    __device__ static void write(const Operand& to, Size at, unsigned four, bool whole, int count) {
        auto* const codes = static_cast<unsigned char*>(to.data) + at;
        if (whole) {
            *reinterpret_cast<unsigned*>(codes) = four;
        } else {
#pragma unroll
            for (int k = 0; k < kPacket; ++k) {
                if (k < count) codes[k] = (unsigned char)(four >> (8 * k));
            }
        }
    }
    __device__ static float scale(const Operand& from, Size at, int count) {
        return count > 0 ? BFloat16::widen(static_cast<const unsigned short*>(from.extra)[at / kGroup]) : 0.0f;
    }
};

template <>
struct Codec<Signed> : Codes {
    __device__ static Packet read(const Operand& from, Size at, bool whole, int count) {
        const unsigned four = Codes::read(from, at, whole, count);
        const float s = scale(from, at, count);
        Packet packet;
#pragma unroll
        for (int k = 0; k < kPacket; ++k) {
            const float q = float(int(four << (24 - 8 * k)) >> 24);
            packet.at[k] = s * (q / (254.0f - magnitude(q)));
        }
        return packet;
    }
    __device__ static void write(const Operand& to, Size at, const Packet& packet, bool whole, int count) {
        const GroupScale s = store_group_scale(packet, false, to.extra, at, count);
        unsigned four = 0;
#pragma unroll
        for (int k = 0; k < kPacket; ++k) {
            const float code = 254.0f * (packet.at[k] / (s.value + magnitude(packet.at[k])));
            four |= (__float_as_uint(code + kRounder) & s.mask & 0xffu) << (8 * k);
        }
        Codes::write(to, at, four, whole, count);
    }
};

template <>
struct Codec<Roots> : Codes {
    __device__ static Packet read(const Operand& from, Size at, bool whole, int count) {
        const unsigned four = Codes::read(from, at, whole, count);
        const float unit = scale(from, at, count) / 255.0f;
        Packet packet;
#pragma unroll
        for (int k = 0; k < kPacket; ++k) {
            const float root = unit * float(int(four >> (8 * k) & 0xffu));
            packet.at[k] = root * root;
        }
        return packet;
    }
    __device__ static void write(const Operand& to, Size at, const Packet& packet, bool whole, int count) {
        const GroupScale s = store_group_scale(packet, true, to.extra, at, count);
        const float factor = 255.0f / s.value;
        unsigned four = 0;
#pragma unroll
        for (int k = 0; k < kPacket; ++k) {
            const float code = sqrtf(packet.at[k]) * factor;
            const float below = code < 255.0f ? code : 255.0f;
            const unsigned nearest = __float_as_uint(below + kRounder) & 0xffu;
            four |= (larger(nearest, packet.at[k] > 0.0f ? 1u : 0u) & s.mask) << (8 * k);
        }
        Codes::write(to, at, four, whole, count);
    }
};

}  // namespace ds_kernels
