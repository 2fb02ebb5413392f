// silu(gate) * value after a bias over rows, forward and backward, in one pass over memory. Tiles as in column_tile.cuh,
// of the output's columns; a row of x is the gate's columns, then the value's.
#pragma once

#include "column_tile.cuh"

namespace ds_kernels {

struct BiasSwigluArgs {
    const void* grad;  // of the result; forward: null
    const void* x;     // rows of twice the columns
    const void* bias;  // null: none
    void* out;         // forward: the result; backward: the gradient of x
    float* bias_grad;  // [slabs, 2 columns]; null: none
    Size rows;
    Size columns;      // of the result
    Size slab;         // rows of a slab
};

template <class Format, bool backward>
__device__ inline void bias_swiglu(const BiasSwigluArgs& args) {
    using Storage = typename Format::Storage;
    const TilePlace place(args.rows, args.columns, args.slab);
    const Size n = args.columns, column = place.column;
    const int left = place.left;
    const auto* const grad = static_cast<const Storage*>(args.grad);
    const auto* const x = static_cast<const Storage*>(args.x);
    const auto* const bias = static_cast<const Storage*>(args.bias);
    auto* const out = static_cast<Storage*>(args.out);
    const bool whole = n % kPacket == 0 && left == kPacket && packet_aligned<Format>(grad) &&
                       packet_aligned<Format>(x) && packet_aligned<Format>(bias) && packet_aligned<Format>(out);

    const Packet gate_bias = bias == nullptr ? Packet{} : load<Format>(bias + column, whole, left);
    const Packet value_bias = bias == nullptr ? Packet{} : load<Format>(bias + n + column, whole, left);
    Packet gate_sum{}, value_sum{};
    for (Size row = place.begin + place.down; row < place.end; row += kTileRows) {
        const Size at = row * n + column, twice = at + row * n;
        Packet gate = load<Format>(x + twice, whole, left);
        Packet value = load<Format>(x + twice + n, whole, left);
        Packet above{};
        if constexpr (backward) above = load<Format>(grad + at, whole, left);
#pragma unroll
        for (int k = 0; k < kPacket; ++k) {
            const float g = gate.at[k] + gate_bias.at[k], v = value.at[k] + value_bias.at[k];
            if constexpr (backward) {
                const float s = 1.0f / (1.0f + expf(-g));
                gate.at[k] = above.at[k] * v * (s * fmaf(g, 1.0f - s, 1.0f));
                value.at[k] = above.at[k] * (g * s);
                gate_sum.at[k] += gate.at[k];
                value_sum.at[k] += value.at[k];
            } else {
                gate.at[k] = g / (1.0f + expf(-g)) * v;
            }
        }
        if constexpr (backward) {
            store<Format>(out + twice, gate, whole, left);
            store<Format>(out + twice + n, value, whole, left);
        } else {
            store<Format>(out + at, gate, whole, left);
        }
    }
    if constexpr (backward) {
        if (args.bias_grad != nullptr) {
            float* const line = args.bias_grad + blockIdx.y * 2 * n + column;
            add_tile_rows(place, gate_sum, line);
            add_tile_rows(place, value_sum, line + n);
        }
    }
}

}  // namespace ds_kernels
