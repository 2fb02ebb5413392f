// gelu(x + bias) over rows, forward and backward, in one pass over memory. Tiles as in column_tile.cuh.
#pragma once

#include "column_tile.cuh"
#include "gelu.cuh"

namespace ds_kernels {

struct BiasGeluArgs {
    const void* grad;  // of the result; forward: null
    const void* x;
    const void* bias;  // null: none
    void* out;         // forward: the result; backward: the gradient of x
    float* bias_grad;  // [slabs, columns]; null: none
    Size rows;
    Size columns;
    Size slab;         // rows of a slab
};

template <class Format, class Gelu, bool backward>
__device__ inline void bias_gelu(const BiasGeluArgs& args) {
    using Storage = typename Format::Storage;
    const TilePlace place(args.rows, args.columns, args.slab);
    const Size column = place.column;
    const int left = place.left;
    const auto* const grad = static_cast<const Storage*>(args.grad);
    const auto* const x = static_cast<const Storage*>(args.x);
    const auto* const bias = static_cast<const Storage*>(args.bias);
    auto* const out = static_cast<Storage*>(args.out);
    const bool whole = args.columns % kPacket == 0 && left == kPacket && packet_aligned<Format>(grad) &&
                       packet_aligned<Format>(x) && packet_aligned<Format>(bias) && packet_aligned<Format>(out);

    const Packet b = bias == nullptr ? Packet{} : load<Format>(bias + column, whole, left);
    Packet sum{};
    for (Size row = place.begin + place.down; row < place.end; row += kTileRows) {
        const Size at = row * args.columns + column;
        Packet u = load<Format>(x + at, whole, left);
        Packet g{};
        if constexpr (backward) g = load<Format>(grad + at, whole, left);
#pragma unroll
        for (int k = 0; k < kPacket; ++k) {
            const float inside = u.at[k] + b.at[k];
            if constexpr (backward) {
                u.at[k] = g.at[k] * Gelu::slope(inside);
                sum.at[k] += u.at[k];
            } else {
                u.at[k] = Gelu::value(inside);
            }
        }
        store<Format>(out + at, u, whole, left);
    }
    if constexpr (backward) {
        if (args.bias_grad != nullptr) {
            add_tile_rows(place, sum, args.bias_grad + blockIdx.y * args.columns + column);
        }
    }
}

}  // namespace ds_kernels
