// residual + dropout(x + bias) over rows, forward and backward, in one pass over memory. Tiles as in column_tile.cuh.
#pragma once

#include "column_tile.cuh"
#include "philox.cuh"

namespace ds_kernels {

struct BiasDropoutArgs {
    const void* x;         // backward: the gradient of the result
    const void* bias;      // null: none
    const void* residual;  // forward only
    void* out;             // the result; backward: the gradient of x, null where it is that of the result
    float* bias_grad;      // [slabs, columns]; null: none
    Size rows;
    Size columns;
    Size slab;  // rows of a slab
    DropoutKey key;
};

template <class Format, bool backward>
__device__ inline void bias_dropout(const BiasDropoutArgs& args) {
    using Storage = typename Format::Storage;
    const TilePlace place(args.rows, args.columns, args.slab);
    const Size column = place.column;
    const int left = place.left;
    const auto* const x = static_cast<const Storage*>(args.x);
    const auto* const bias = static_cast<const Storage*>(args.bias);
    const auto* const residual = static_cast<const Storage*>(args.residual);
    auto* const out = static_cast<Storage*>(args.out);
    const bool whole = args.columns % kPacket == 0 && left == kPacket && packet_aligned<Format>(x) &&
                       packet_aligned<Format>(bias) && packet_aligned<Format>(residual) && packet_aligned<Format>(out);
    const Size seed = args.key.seed == nullptr ? 0 : *args.key.seed;

    const Packet b = bias == nullptr || left == 0 ? Packet{} : load<Format>(bias + column, whole, left);
    Packet sum{};
    for (Size row = place.begin + place.down; row < place.end && left > 0; row += kTileRows) {
        const Size at = row * args.columns + column;
        Packet u = load<Format>(x + at, whole, left);
        if constexpr (backward) {
            u = drop(args.key, seed, at, u);
#pragma unroll
            for (int k = 0; k < kPacket; ++k) sum.at[k] += u.at[k];
            if (out != nullptr) store<Format>(out + at, u, whole, left);
        } else {
            const Packet r = load<Format>(residual + at, whole, left);
            if (bias != nullptr) {
#pragma unroll
                for (int k = 0; k < kPacket; ++k) u.at[k] += b.at[k];
            }
            u = drop(args.key, seed, at, u);
#pragma unroll
            for (int k = 0; k < kPacket; ++k) u.at[k] += r.at[k];
            store<Format>(out + at, u, whole, left);
        }
    }
    if constexpr (backward) {
        if (args.bias_grad != nullptr) {
            add_tile_rows(place, sum, args.bias_grad + blockIdx.y * args.columns + column);
        }
    }
}

}  // namespace ds_kernels
