// What each collective puts, reduces and takes.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "channel.h"

namespace ds_comm {
namespace {

// A part of a longer piece.
struct Part {
    std::size_t begin;
    std::size_t length;
};

Part part_of(std::size_t whole, std::size_t chunk, std::size_t step) {
    const std::size_t begin = std::min(chunk * step, whole);
    return {begin, std::min(step, whole - begin)};
}

void copy(char* to, const char* from, std::size_t bytes) {
    if (bytes != 0 && to != from) {
        std::memcpy(to, from, bytes);
    }
}

// Below so many bytes of all ranks together, everybody reduces everything: one wait less.
constexpr std::size_t kAtOnceBytes = 128 << 10;

}  // namespace

void Channel::share(Call call, const char* in, std::size_t bytes, const std::vector<char*>& outs,
                    const std::vector<std::size_t>& out_bytes) {
    guarded(call, [&] {
        const std::size_t step = layout_.slot_bytes;
        Steps steps;
        steps.piece = step;
        steps.put = [&](std::size_t chunk) {
            const Part part = part_of(bytes, chunk, step);
            copy(data(rank_, chunk), in + part.begin, part.length);
            if (outs[rank_] != nullptr) {
                copy(outs[rank_] + part.begin, in + part.begin, part.length);
            }
        };
        steps.take = [&](std::size_t chunk) {
            for (std::size_t distance = 1; distance < size_; ++distance) {
                const std::size_t peer = (rank_ + distance) % size_;
                if (outs[peer] != nullptr) {
                    const Part part = part_of(out_bytes[peer], chunk, step);
                    copy(outs[peer] + part.begin, data(peer, chunk), part.length);
                }
            }
        };
        run(std::vector<std::size_t>(size_, bytes), out_bytes, steps);
    });
}

void Channel::exchange(Call call, const std::vector<const char*>& ins, const std::vector<std::size_t>& in_bytes,
                       const std::vector<char*>& outs, const std::vector<std::size_t>& out_bytes) {
    guarded(call, [&] {
        const std::size_t step = layout_.slot_bytes / size_ / kLine * kLine;
        Steps steps;
        steps.piece = step;
        steps.put = [&](std::size_t chunk) {
            for (std::size_t peer = 0; peer < size_; ++peer) {
                const Part part = part_of(in_bytes[peer], chunk, step);
                char* const to = peer == rank_ ? outs[rank_] + part.begin : data(rank_, chunk) + peer * step;
                copy(to, ins[peer] + part.begin, part.length);
            }
        };
        steps.take = [&](std::size_t chunk) {
            for (std::size_t distance = 1; distance < size_; ++distance) {
                const std::size_t peer = (rank_ + distance) % size_;
                const Part part = part_of(out_bytes[peer], chunk, step);
                copy(outs[peer] + part.begin, data(peer, chunk) + rank_ * step, part.length);
            }
        };
        run(in_bytes, out_bytes, steps);
    });
}

void Channel::reduce_scatter(Call call, const std::vector<const char*>& ins, char* out, std::size_t numel,
                             std::size_t item) {
    const Fold fold = fold_of(call);
    guarded(call, [&] {
        const std::size_t step = layout_.slot_bytes / size_ / kLine * kLine;
        const std::size_t bytes = numel * item;
        Steps steps;
        steps.piece = step;
        steps.put = [&](std::size_t chunk) {
            const Part part = part_of(bytes, chunk, step);
            for (std::size_t peer = 0; peer < size_; ++peer) {
                if (peer != rank_) {
                    copy(data(rank_, chunk) + peer * step, ins[peer] + part.begin, part.length);
                }
            }
        };
        std::vector<const void*> arrays(size_);
        steps.take = [&](std::size_t chunk) {
            const Part part = part_of(bytes, chunk, step);
            for (std::size_t peer = 0; peer < size_; ++peer) {
                arrays[peer] = peer == rank_ ? ins[rank_] + part.begin : data(peer, chunk) + rank_ * step;
            }
            fold(out + part.begin, arrays.data(), size_, part.length / item);
        };
        const std::vector<std::size_t> pieces(size_, bytes);
        run(pieces, pieces, steps);
    });
}

void Channel::all_reduce(Call call, const char* in, char* out, std::size_t numel, std::size_t item) {
    if (numel * item * size_ <= std::min(kAtOnceBytes, layout_.slot_bytes)) {
        reduce_at_once(call, in, out, numel, item);
    } else {
        reduce_by_slices(call, in, out, numel, item);
    }
}

void Channel::reduce_at_once(Call call, const char* in, char* out, std::size_t numel, std::size_t item) {
    const Fold fold = fold_of(call);
    guarded(call, [&] {
        Steps steps;
        steps.piece = layout_.slot_bytes;
        steps.put = [&](std::size_t chunk) { copy(data(rank_, chunk), in, numel * item); };
        std::vector<const void*> arrays(size_);
        steps.take = [&](std::size_t chunk) {
            for (std::size_t peer = 0; peer < size_; ++peer) {
                arrays[peer] = data(peer, chunk);
            }
            if (out != nullptr) {
                fold(out, arrays.data(), size_, numel);
            }
        };
        const std::vector<std::size_t> pieces(size_, numel * item);
        run(pieces, pieces, steps);
    });
}

void Channel::reduce_by_slices(Call call, const char* in, char* out, std::size_t numel, std::size_t item) {
    const Fold fold = fold_of(call);
    guarded(call, [&] {
        const std::size_t step = layout_.slot_bytes / kLine * kLine;
        const std::size_t bytes = numel * item;
        const auto chunk_of = [&](std::size_t chunk) { return part_of(bytes, chunk, step); };
        const auto slice_of = [&](const Part& part, std::size_t rank) {
            return part_of(part.length, rank, round_up((part.length + size_ - 1) / size_, kLine));
        };
        Steps steps;
        steps.piece = step;
        steps.put = [&](std::size_t chunk) {
            const Part part = chunk_of(chunk);
            const Part own = slice_of(part, rank_);  // nobody else reads it
            const std::size_t end = own.begin + own.length;
            copy(data(rank_, chunk), in + part.begin, own.begin);
            copy(data(rank_, chunk) + end, in + part.begin + end, part.length - end);
        };
        std::vector<const void*> arrays(size_);
        steps.reduce = [&](std::size_t chunk) {
            const Part part = chunk_of(chunk);
            const Part own = slice_of(part, rank_);
            for (std::size_t peer = 0; peer < size_; ++peer) {
                arrays[peer] = (peer == rank_ ? in + part.begin : data(peer, chunk)) + own.begin;
            }
            char* const result = data(rank_, chunk) + own.begin;
            fold(result, arrays.data(), size_, own.length / item);
            if (out != nullptr) {
                copy(out + part.begin + own.begin, result, own.length);
            }
        };
        steps.take = [&](std::size_t chunk) {
            const Part part = chunk_of(chunk);
            for (std::size_t distance = 1; distance < size_ && out != nullptr; ++distance) {
                const std::size_t peer = (rank_ + distance) % size_;
                const Part slice = slice_of(part, peer);
                copy(out + part.begin + slice.begin, data(peer, chunk) + slice.begin, slice.length);
            }
        };
        const std::vector<std::size_t> pieces(size_, bytes);
        run(pieces, pieces, steps);
    });
}

Fold Channel::fold_of(Call call) const {
    const Fold fold = folds_.by_format[call.format].by_reduction[call.reduction];
    if (fold == nullptr) {
        throw std::invalid_argument("this reduction is not defined for this data type");
    }
    return fold;
}

}  // namespace ds_comm
