// Collectives of one group of ranks through shared memory.
//
// Every rank runs the same sequence of chunks. For each chunk it puts its data into its slot, possibly reduces its part of
// everybody's, and takes what it needs; it waits for the others before each of these, never in between. A step lags one
// chunk behind the step before it, so that ranks that do not run at the same time (more ranks than cores) wait seldom.
#pragma once

#include <poll.h>
#include <sys/types.h>

#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include "fold_table.h"
#include "segment.h"

namespace ds_comm {

// What a collective is, as far as all ranks have to agree.
struct Call {
    std::int32_t verb;       // see kVerbs in channel.cpp
    std::int32_t format;     // of elements, see fold_table.h; others only have to be equal
    std::int32_t reduction;  // see fold_table.h; -1: none
    std::int32_t root;       // -1: none
};

// A signal's handler has raised an exception while a rank was waiting.
struct Interrupted {};

struct Settings {
    int rank;
    std::vector<int> watches;        // a descriptor for each rank that poll() reports when it has ended; -1: itself
    std::vector<std::string> names;  // of ranks, in messages
    int spins;                       // looks at a counter before going to sleep
    double timeout;                  // seconds
    std::function<bool()> interrupted;
};

class Channel {
public:
    // Maps the segment in `fd`, which stays the caller's.
    Channel(int fd, Layout layout, Settings settings);
    Channel(const Channel&) = delete;
    Channel& operator=(const Channel&) = delete;
    ~Channel();

    // Gives `in` to all: what comes from rank r, of `out_bytes[r]` bytes, goes to `outs[r]`; null: not wanted.
    void share(Call call, const char* in, std::size_t bytes, const std::vector<char*>& outs,
               const std::vector<std::size_t>& out_bytes);

    // Gives `ins[r]` to rank r, and takes `outs[r]` from it; nothing of 0 bytes.
    void exchange(Call call, const std::vector<const char*>& ins, const std::vector<std::size_t>& in_bytes,
                  const std::vector<char*>& outs, const std::vector<std::size_t>& out_bytes);

    // Reduces everybody's `in` into `out`; null: not wanted. They may be the same.
    void all_reduce(Call call, const char* in, char* out, std::size_t numel, std::size_t item);

    // Reduces everybody's `ins[rank]` into `out`.
    void reduce_scatter(Call call, const std::vector<const char*>& ins, char* out, std::size_t numel, std::size_t item);

    void set_timeout(double seconds);

    // Tells the others that this rank has left, and gives the memory back. Again is nothing.
    void close();

private:
    using Step = std::function<void(std::size_t chunk)>;

    struct Steps {
        Step put;
        Step reduce;  // may be none
        Step take;
        std::size_t piece;  // bytes of the longest part of one piece that goes into a chunk
    };

    Header& header(std::size_t rank) const { return *reinterpret_cast<Header*>(base_ + layout_.header(rank)); }
    char* data(std::size_t rank, std::size_t chunk) const {
        return base_ + layout_.data(rank, first_ + std::uint32_t(chunk));
    }
    Card& card(std::size_t rank) const { return *reinterpret_cast<Card*>(base_ + layout_.card(rank, first_)); }

    void guarded(Call call, const std::function<void()>& body);
    void run(const std::vector<std::size_t>& given, const std::vector<std::size_t>& expected, const Steps& steps);
    void put(const Steps& steps, std::size_t chunk);
    void write_card(const std::vector<std::size_t>& given);
    std::size_t num_chunks(const std::vector<std::size_t>& expected, std::size_t piece) const;
    void check(std::size_t peer, std::size_t expected) const;
    void reduce_at_once(Call call, const char* in, char* out, std::size_t numel, std::size_t item);
    void reduce_by_slices(Call call, const char* in, char* out, std::size_t numel, std::size_t item);

    void await_all(Counter Header::* counter, std::uint32_t target);
    void sleep_until(Counter Header::* counter, std::size_t peer, std::uint32_t target);
    void look_at_peers(Counter Header::* counter, std::uint32_t target);
    [[noreturn]] void late(Counter Header::* counter, std::uint32_t target);
    void leave(State state, int culprit);
    Fold fold_of(Call call) const;

    std::mutex mutex_;  // one collective at a time
    char* base_ = nullptr;
    Layout layout_;
    Settings settings_;
    pid_t owner_;  // the process that made it
    std::size_t rank_;
    std::size_t size_;
    std::vector<pollfd> polled_;
    const FoldTable& folds_ = best_folds();
    std::uint32_t first_ = 0;  // the collective's first chunk, counted from the group's beginning
    std::uint64_t number_ = 0;
    Call call_{};
    int culprit_ = -1;
    std::string broken_;  // why this group cannot be used any more
};

}  // namespace ds_comm
