// LayerNorm and RMSNorm of the rows of x + residual, forward and backward.
//
// One block takes one row; see row_walk.cuh. The gradients of weight and bias are sums over rows: a kernel of their own
// goes down slabs of rows as in column_tile.cuh. All sums have a fixed order.
#pragma once

#include "row_walk.cuh"

namespace ds_kernels {

struct NormArgs {
    const void* x;
    const void* residual;  // null: none
    const void* weight;    // null: ones
    const void* bias;      // null: zeros
    void* out;
    void* total;   // x + residual, rounded; null without residual
    float* mean;   // of each row; RMSNorm: null
    float* scale;  // of each row
    Size columns;
    float eps;
};

struct NormBackwardArgs {
    const void* grad;
    const void* grad_sum;  // of x + residual from elsewhere; null: none
    const void* x;         // what was normalized
    const void* weight;    // null: ones
    const float* mean;     // RMSNorm: null
    const float* scale;
    void* grad_x;
    Size columns;
};

struct NormWeightsArgs {
    const void* grad;
    const void* x;
    const float* mean;  // RMSNorm: null
    const float* scale;
    float* weight_grad;  // [slabs, columns]
    float* bias_grad;    // [slabs, columns]; null: none
    Size rows;
    Size columns;
    Size slab;  // rows of a slab
};

template <class Format, bool layer, int threads>
__device__ inline void norm(const NormArgs& args) {
    using Storage = typename Format::Storage;
    const Size row = Size(blockIdx.x) * args.columns;
    const bool aligned = args.columns % kPacket == 0 && aligned_or_null<Format>(args.x) &&
                         aligned_or_null<Format>(args.residual) && aligned_or_null<Format>(args.weight) &&
                         aligned_or_null<Format>(args.bias) && aligned_or_null<Format>(args.out) &&
                         aligned_or_null<Format>(args.total);
    const RowWalk<threads> walk{args.columns, aligned};
    const void* const again = args.residual == nullptr ? args.x : args.total;
    auto* const total = static_cast<Storage*>(args.total);
    auto* const out = static_cast<Storage*>(args.out);
    Packet kept[kKept];
    float sum = 0.0f, squares = 0.0f;
    walk.each([&](Size column, int k, bool whole, int count) {
        Packet u = load_or<Format>(args.x, row + column, whole, count, 0.0f);
        if (args.residual != nullptr) {
            const Packet r = load_or<Format>(args.residual, row + column, whole, count, 0.0f);
#pragma unroll
            for (int i = 0; i < kPacket; ++i) u.at[i] = Format::widen(Format::narrow(u.at[i] + r.at[i]));
            store<Format>(total + row + column, u, whole, count);
        }
        if (k < kKept) kept[k] = u;
#pragma unroll
        for (int i = 0; i < kPacket; ++i) {
            sum += u.at[i];
            squares = fmaf(u.at[i], u.at[i], squares);
        }
    });
    const auto numbers = [&](Size column, int k, bool whole, int count) {
        return k < kKept ? kept[k] : load_or<Format>(again, row + column, whole, count, 0.0f);
    };
    const float length = float(args.columns);
    float mean = 0.0f;
    if constexpr (layer) {
        mean = block_sum<threads>(sum) / length;
        squares = 0.0f;
        walk.each([&](Size column, int k, bool whole, int count) {
            const Packet u = numbers(column, k, whole, count);
#pragma unroll
            for (int i = 0; i < kPacket; ++i) {
                const float centered = i < count ? u.at[i] - mean : 0.0f;
                squares = fmaf(centered, centered, squares);
            }
        });
    }
    const float scale = 1.0f / sqrtf(block_sum<threads>(squares) / length + args.eps);
    walk.each([&](Size column, int k, bool whole, int count) {
        Packet u = numbers(column, k, whole, count);
        const Packet w = load_or<Format>(args.weight, column, whole, count, 1.0f);
        const Packet b = load_or<Format>(args.bias, column, whole, count, 0.0f);
#pragma unroll
        for (int i = 0; i < kPacket; ++i) u.at[i] = fmaf((u.at[i] - mean) * scale, w.at[i], b.at[i]);
        store<Format>(out + row + column, u, whole, count);
    });
    if (threadIdx.x == 0) {
        if constexpr (layer) args.mean[blockIdx.x] = mean;
        args.scale[blockIdx.x] = scale;
    }
}

template <class Format, bool layer, int threads>
__device__ inline void norm_backward(const NormBackwardArgs& args) {
    const Size row = Size(blockIdx.x) * args.columns;
    const bool aligned = args.columns % kPacket == 0 && aligned_or_null<Format>(args.grad) &&
                         aligned_or_null<Format>(args.grad_sum) && aligned_or_null<Format>(args.x) &&
                         aligned_or_null<Format>(args.weight) && aligned_or_null<Format>(args.grad_x);
    const RowWalk<threads> walk{args.columns, aligned};
    const float mean = layer ? args.mean[blockIdx.x] : 0.0f;
    const float scale = args.scale[blockIdx.x];
    Packet kept_x[kKept], kept_inner[kKept];
    float sum = 0.0f, projected = 0.0f;
    const auto normalized = [&](Size column, bool whole, int count) {
        Packet u = load_or<Format>(args.x, row + column, whole, count, 0.0f);
#pragma unroll
        for (int i = 0; i < kPacket; ++i) u.at[i] = i < count ? (u.at[i] - mean) * scale : 0.0f;
        return u;
    };
    const auto inner_of = [&](Size column, bool whole, int count) {
        Packet g = load_or<Format>(args.grad, row + column, whole, count, 0.0f);
        const Packet w = load_or<Format>(args.weight, column, whole, count, 1.0f);
#pragma unroll
        for (int i = 0; i < kPacket; ++i) g.at[i] *= w.at[i];
        return g;
    };
    walk.each([&](Size column, int k, bool whole, int count) {
        const Packet u = normalized(column, whole, count), g = inner_of(column, whole, count);
        if (k < kKept) kept_x[k] = u, kept_inner[k] = g;
#pragma unroll
        for (int i = 0; i < kPacket; ++i) {
            sum += i < count ? g.at[i] : 0.0f;
            projected = fmaf(g.at[i], u.at[i], projected);
        }
    });
    const float length = float(args.columns);
    const float along_mean = layer ? block_sum<threads>(sum) / length : 0.0f;
    const float along_x = block_sum<threads>(projected) / length;
    walk.each([&](Size column, int k, bool whole, int count) {
        const Packet u = k < kKept ? kept_x[k] : normalized(column, whole, count);
        Packet g = k < kKept ? kept_inner[k] : inner_of(column, whole, count);
        const Packet other = load_or<Format>(args.grad_sum, row + column, whole, count, 0.0f);
#pragma unroll
        for (int i = 0; i < kPacket; ++i) {
            g.at[i] = fmaf(fmaf(-u.at[i], along_x, g.at[i] - along_mean), scale, other.at[i]);
        }
        store<Format>(static_cast<typename Format::Storage*>(args.grad_x) + row + column, g, whole, count);
    });
}

template <class Format, bool layer>
__device__ inline void norm_weights(const NormWeightsArgs& args) {
    constexpr unsigned kAcross = 32, kDown = 8;
    __shared__ float sums[2][kDown][kAcross * kPacket];
    const unsigned across = threadIdx.x % kAcross, down = threadIdx.x / kAcross;
    const Size column = (Size(blockIdx.x) * kAcross + across) * kPacket;
    const int left = column < args.columns ? (args.columns - column < kPacket ? int(args.columns - column) : kPacket) : 0;
    const bool whole = args.columns % kPacket == 0 && left == kPacket && aligned_or_null<Format>(args.grad) &&
                       aligned_or_null<Format>(args.x);
    const Size begin = blockIdx.y * args.slab;
    const Size end = begin + args.slab < args.rows ? begin + args.slab : args.rows;
    Packet weight_sum{}, bias_sum{};
    for (Size row = begin + down; row < end; row += kDown) {
        const Packet g = load_or<Format>(args.grad, row * args.columns + column, whole, left, 0.0f);
        const Packet u = load_or<Format>(args.x, row * args.columns + column, whole, left, 0.0f);
        const float mean = layer ? args.mean[row] : 0.0f, scale = args.scale[row];
#pragma unroll
        for (int i = 0; i < kPacket; ++i) {
            weight_sum.at[i] = fmaf(g.at[i], (u.at[i] - mean) * scale, weight_sum.at[i]);
            bias_sum.at[i] += g.at[i];
        }
    }
#pragma unroll
    for (int i = 0; i < kPacket; ++i) {
        sums[0][down][across * kPacket + i] = weight_sum.at[i];
        sums[1][down][across * kPacket + i] = bias_sum.at[i];
    }
    __syncthreads();
    // 256 threads for 2 * 128 sums of 8 rows, in the order of a binary tree
    const unsigned which = threadIdx.x / (kAcross * kPacket), place = threadIdx.x % (kAcross * kPacket);
    const auto& lines = sums[which];
    const float sum = ((lines[0][place] + lines[1][place]) + (lines[2][place] + lines[3][place])) +
                      ((lines[4][place] + lines[5][place]) + (lines[6][place] + lines[7][place]));
    float* const out = which == 0 ? args.weight_grad : args.bias_grad;
    const Size at = Size(blockIdx.x) * kAcross * kPacket + place;
    if (out != nullptr && at < args.columns) {
        out[blockIdx.y * args.columns + at] = sum;
    }
}

}  // namespace ds_kernels
