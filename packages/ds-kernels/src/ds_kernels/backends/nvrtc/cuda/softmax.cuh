// softmax(scores * scale + mask) of rows, then dropout, and its derivative. One block takes one row; see row_walk.cuh.
//
// Where all is masked the row is zeros: the exponentials are zeros then, and so is their sum.
#pragma once

#include "philox.cuh"
#include "row_walk.cuh"

namespace ds_kernels {

// Rows are numbered over [batch, heads, queries]; a row has `keys` scores.
struct SoftmaxArgs {
    const void* scores;
    const void* mask;  // added to the scaled scores; null: none
    void* out;         // probabilities
    void* dropped;     // of which some are dropped; null where none is
    Size heads;
    Size queries;
    Size keys;
    Size mask_strides[3];  // of batch, heads and queries, in elements
    DropoutKey key;
    float scale;
    int causal;
};

struct SoftmaxBackwardArgs {
    const void* grad;  // of the dropped probabilities
    const void* probabilities;
    void* out;  // the gradient of the scores
    Size keys;
    DropoutKey key;
    float scale;
};

constexpr unsigned kMinusInfinity = 0xff800000u;

// What each key's score is for the exponential; minus infinity for keys that are not seen.
template <class Format>
struct MaskedScores {
    using Storage = typename Format::Storage;
    const Storage* scores;
    const Storage* mask;
    Size seen;
    float scale;

    __device__ MaskedScores(const SoftmaxArgs& args)
        : scores(static_cast<const Storage*>(args.scores) + Size(blockIdx.x) * args.keys),
          mask(static_cast<const Storage*>(args.mask)),
          seen(args.keys),
          scale(args.scale) {
        const Size query = blockIdx.x % args.queries, head = blockIdx.x / args.queries % args.heads;
        const Size batch = blockIdx.x / args.queries / args.heads;
        if (mask != nullptr) {
            mask += batch * args.mask_strides[0] + head * args.mask_strides[1] + query * args.mask_strides[2];
        }
        if (args.causal != 0 && query + 1 < seen) seen = query + 1;
    }

    __device__ Packet at(Size column, bool whole, int count) const {
        const float lowest = __uint_as_float(kMinusInfinity);
        Packet u{{lowest, lowest, lowest, lowest}};
        if (column >= seen) {
            return u;
        }
        const Packet s = load<Format>(scores + column, whole, count);
        const Packet m = load_or<Format>(mask, column, whole, count, 0.0f);
#pragma unroll
        for (int i = 0; i < kPacket; ++i) {
            if (i < count && column + i < seen) u.at[i] = s.at[i] * scale + m.at[i];
        }
        return u;
    }
};

template <class Format, int threads>
__device__ inline void softmax(const SoftmaxArgs& args) {
    using Storage = typename Format::Storage;
    const MaskedScores<Format> masked(args);
    const bool aligned = args.keys % kPacket == 0 && packet_aligned<Format>(masked.scores) &&
                         packet_aligned<Format>(masked.mask) && aligned_or_null<Format>(args.out) &&
                         aligned_or_null<Format>(args.dropped);
    const RowWalk<threads> walk{args.keys, aligned};
    const Size row = Size(blockIdx.x) * args.keys;
    Packet kept[kKept];
    float most = __uint_as_float(kMinusInfinity);
    walk.each([&](Size column, int k, bool whole, int count) {
        const Packet u = masked.at(column, whole, count);
        if (k < kKept) kept[k] = u;
#pragma unroll
        for (int i = 0; i < kPacket; ++i) most = Largest::of(most, u.at[i]);
    });
    most = block_joined<Largest, threads>(most);
    const float level = most == __uint_as_float(kMinusInfinity) ? 0.0f : most;
    const auto exponentials = [&](Size column, int k, bool whole, int count) {
        Packet u = k < kKept ? kept[k] : masked.at(column, whole, count);
#pragma unroll
        for (int i = 0; i < kPacket; ++i) u.at[i] = expf(u.at[i] - level);
        return u;
    };
    float sum = 0.0f;
    walk.each([&](Size column, int k, bool whole, int count) {
        const Packet e = exponentials(column, k, whole, count);
#pragma unroll
        for (int i = 0; i < kPacket; ++i) sum += e.at[i];
    });
    sum = block_sum<threads>(sum);
    const float share = sum == 0.0f ? 0.0f : 1.0f / sum;
    const Size seed = args.key.seed == nullptr ? 0 : *args.key.seed;
    walk.each([&](Size column, int k, bool whole, int count) {
        Packet y = exponentials(column, k, whole, count);
#pragma unroll
        for (int i = 0; i < kPacket; ++i) y.at[i] *= share;
        store<Format>(static_cast<Storage*>(args.out) + row + column, y, whole, count);
        if (args.dropped != nullptr) {
            y = drop(args.key, seed, row + column, y);
            store<Format>(static_cast<Storage*>(args.dropped) + row + column, y, whole, count);
        }
    });
}

// With g the gradient of the probabilities y: y * (g - sum(g * y)), times the scores' scale.
template <class Format, int threads>
__device__ inline void softmax_backward(const SoftmaxBackwardArgs& args) {
    using Storage = typename Format::Storage;
    const bool aligned = args.keys % kPacket == 0 && aligned_or_null<Format>(args.grad) &&
                         aligned_or_null<Format>(args.probabilities) && aligned_or_null<Format>(args.out);
    const RowWalk<threads> walk{args.keys, aligned};
    const Size row = Size(blockIdx.x) * args.keys;
    const Size seed = args.key.seed == nullptr ? 0 : *args.key.seed;
    const auto* const grad = static_cast<const Storage*>(args.grad) + row;
    const auto* const probabilities = static_cast<const Storage*>(args.probabilities) + row;
    const auto inner = [&](Size column, bool whole, int count) {
        return drop(args.key, seed, row + column, load<Format>(grad + column, whole, count));
    };
    Packet kept_y[kKept], kept_g[kKept];
    float along = 0.0f;
    walk.each([&](Size column, int k, bool whole, int count) {
        const Packet y = load<Format>(probabilities + column, whole, count), g = inner(column, whole, count);
        if (k < kKept) kept_y[k] = y, kept_g[k] = g;
#pragma unroll
        for (int i = 0; i < kPacket; ++i) along = fmaf(g.at[i], y.at[i], along);
    });
    along = block_sum<threads>(along);
    walk.each([&](Size column, int k, bool whole, int count) {
        const Packet y = k < kKept ? kept_y[k] : load<Format>(probabilities + column, whole, count);
        Packet g = k < kKept ? kept_g[k] : inner(column, whole, count);
#pragma unroll
        for (int i = 0; i < kPacket; ++i) g.at[i] = y.at[i] * (g.at[i] - along) * args.scale;
        store<Format>(static_cast<Storage*>(args.out) + row + column, g, whole, count);
    });
}

}  // namespace ds_kernels
