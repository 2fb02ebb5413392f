// The memory that the ranks of one group share: for each rank a header, and a ring of slots that only it writes.
//
// A chunk of a collective goes through the slot of the same number (modulo the ring) of every rank. Counters say how far
// a rank has come; they count chunks from the group's beginning, wrap around, and are compared by their difference.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace ds_comm {

constexpr std::size_t kLine = 64;    // bytes that a processor moves at once
constexpr std::size_t kPage = 4096;  // each rank's memory begins on a page of its own

// A number that one rank raises and others wait for.
struct alignas(kLine) Counter {
    std::atomic<std::uint32_t> value;
    std::atomic<std::uint32_t> sleepers;  // at least as many as sleep on `value`; a killed one is never taken off
};

enum State : std::uint32_t {
    kPresent = 0,
    kLeft = 1,    // has destroyed its group
    kFailed = 2,  // an error ended one of its collectives: what it shares is undefined
};

struct Header {
    Counter put;      // chunks whose data lie in the rank's slot
    Counter reduced;  // chunks of which the rank's slot holds its part of the result
    Counter taken;    // chunks of which the rank has read all it needs of others' slots
    alignas(kLine) std::atomic<std::uint32_t> state;
    std::atomic<std::int32_t> culprit;  // of a rank that failed: which rank it was waiting for; -1: none
};

static_assert(std::atomic<std::uint32_t>::is_always_lock_free, "futexes are words");
static_assert(sizeof(Header) <= kPage, "one page");

// What a rank believes the collective to be; stands in front of the data of its first chunk.
struct Card {
    std::int32_t verb;
    std::int32_t format;     // of elements
    std::int32_t reduction;  // -1: none
    std::int32_t root;       // -1: none
    std::uint64_t longest;   // bytes of the longest piece that the rank gives to one other

    // Bytes for each rank follow.
    std::uint64_t* pieces() { return reinterpret_cast<std::uint64_t*>(this + 1); }
    const std::uint64_t* pieces() const { return reinterpret_cast<const std::uint64_t*>(this + 1); }
};

constexpr std::size_t round_up(std::size_t n, std::size_t unit) { return (n + unit - 1) / unit * unit; }

// Where things lie in the segment.
struct Layout {
    std::size_t ranks;
    std::size_t slots;       // of each rank
    std::size_t slot_bytes;  // of data in each

    std::size_t card_bytes() const { return round_up(sizeof(Card) + ranks * sizeof(std::uint64_t), kLine); }
    std::size_t stride() const { return card_bytes() + round_up(slot_bytes, kLine); }
    std::size_t rank_bytes() const { return round_up(kPage + slots * stride(), kPage); }
    std::size_t bytes() const { return ranks * rank_bytes(); }

    std::size_t header(std::size_t rank) const { return rank * rank_bytes(); }
    std::size_t card(std::size_t rank, std::uint32_t chunk) const {
        return header(rank) + kPage + chunk % slots * stride();
    }
    std::size_t data(std::size_t rank, std::uint32_t chunk) const { return card(rank, chunk) + card_bytes(); }
};

}  // namespace ds_comm
