// How ranks go through a collective together: what is common to all of them. See collectives.cpp for each.
#include "channel.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <stdexcept>
#include <system_error>

#include "waiting.h"

namespace ds_comm {
namespace {

using Clock = std::chrono::steady_clock;

constexpr long kSliceMs = 20;  // how long a rank sleeps before it looks whether its peers live

// Numbers as in calls.py.
const char* const kVerbs[] = {"all_gather", "broadcast",  "gather", "barrier",       "all_to_all",
                              "scatter",    "all_reduce", "reduce", "reduce_scatter"};

std::string listed(const std::vector<std::string>& names) {
    std::string text;
    for (const std::string& name : names) {
        text += (text.empty() ? "" : ", ") + name;
    }
    return text;
}

}  // namespace

Channel::Channel(int fd, Layout layout, Settings settings)
    : layout_(layout),
      settings_(std::move(settings)),
      owner_(getpid()),
      rank_(std::size_t(settings_.rank)),
      size_(layout.ranks) {
    void* const memory = mmap(nullptr, layout_.bytes(), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED) {
        throw std::system_error(errno, std::generic_category(),
                                "cannot map " + std::to_string(layout_.bytes()) + " bytes of shared memory");
    }
    base_ = static_cast<char*>(memory);
    for (const int watch : settings_.watches) {
        polled_.push_back({watch, POLLIN, 0});  // poll() passes over negative ones
    }
}

Channel::~Channel() { close(); }

void Channel::close() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (base_ == nullptr) {
        return;
    }
    // a forked child's copy is not this rank
    if (broken_.empty() && getpid() == owner_) {
        leave(kLeft, -1);
    }
    munmap(base_, layout_.bytes());
    base_ = nullptr;
    broken_ = "this process group has been destroyed";
}

void Channel::set_timeout(double seconds) {
    const std::lock_guard<std::mutex> lock(mutex_);
    settings_.timeout = seconds;
}

void Channel::leave(State state, int culprit) {
    Header& own = header(rank_);
    own.culprit.store(culprit);
    own.state.store(state);
    for (Counter* const counter : {&own.put, &own.reduced, &own.taken}) {
        wake(*counter);
    }
}

void Channel::guarded(Call call, const std::function<void()>& body) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!broken_.empty()) {
        throw std::runtime_error(broken_);
    }
    if (getpid() != owner_) {
        throw std::runtime_error("this process was forked from " + settings_.names[rank_] +
                                 " and is no rank of its process group: make a group in each process");
    }
    call_ = call;
    culprit_ = -1;
    const auto give_up = [&](const std::string& reason) {
        broken_ = "this process group cannot be used any more: " + reason;
        leave(kFailed, culprit_);
    };
    try {
        body();
    } catch (const std::exception& error) {
        give_up(error.what());
        throw;
    } catch (const Interrupted&) {
        give_up("a signal ended one of its collectives");
        throw;
    }
    ++number_;
}

// Chunks #

void Channel::run(const std::vector<std::size_t>& given, const std::vector<std::size_t>& expected,
                  const Steps& steps) {
    Header& own = header(rank_);
    put(steps, 0);
    write_card(given);
    publish(own.put, first_ + 1);
    await_all(&Header::put, first_ + 1);
    const std::size_t chunks = num_chunks(expected, steps.piece);
    const std::size_t lag = steps.reduce ? 2 : 1;  // of the last step
    for (std::size_t at = 1; at < chunks + lag; ++at) {
        if (at < chunks) {
            put(steps, at);
            publish(own.put, first_ + std::uint32_t(at) + 1);
        }
        if (steps.reduce && at <= chunks) {
            const auto count = first_ + std::uint32_t(at);
            await_all(&Header::put, count);
            steps.reduce(at - 1);
            publish(own.reduced, count);
        }
        if (at >= lag) {
            const auto count = first_ + std::uint32_t(at - lag) + 1;
            await_all(steps.reduce ? &Header::reduced : &Header::put, count);
            steps.take(at - lag);
            publish(own.taken, count);
        }
    }
    first_ += std::uint32_t(chunks);
    own.reduced.value.store(first_, std::memory_order_relaxed);  // nobody waits for it where nothing is reduced
}

void Channel::put(const Steps& steps, std::size_t chunk) {
    // the slot is free when all have taken what lay in it a round ago
    await_all(&Header::taken, first_ + std::uint32_t(chunk) + 1 - std::uint32_t(layout_.slots));
    steps.put(chunk);
}

void Channel::write_card(const std::vector<std::size_t>& given) {
    Card& own = card(rank_);
    own.verb = call_.verb;
    own.format = call_.format;
    own.reduction = call_.reduction;
    own.root = call_.root;
    own.longest = 0;
    for (std::size_t peer = 0; peer < size_; ++peer) {
        own.pieces()[peer] = given[peer];
        own.longest = std::max<std::uint64_t>(own.longest, given[peer]);
    }
}

std::size_t Channel::num_chunks(const std::vector<std::size_t>& expected, std::size_t piece) const {
    std::size_t longest = 1;  // the card takes a chunk in any case
    for (std::size_t peer = 0; peer < size_; ++peer) {
        check(peer, expected[peer]);
        longest = std::max<std::size_t>(longest, card(peer).longest);
    }
    return (longest + piece - 1) / piece;
}

void Channel::check(std::size_t peer, std::size_t expected) const {
    const Card& theirs = card(peer);
    const Card& own = card(rank_);
    const std::string where = " (collective " + std::to_string(number_) + " of this group)";
    const auto verb = [](const Card& card) {
        const std::string name = kVerbs[card.verb];
        return card.root < 0 ? name : name + " with root " + std::to_string(card.root);
    };
    if (theirs.verb != own.verb || theirs.root != own.root) {
        throw std::runtime_error(settings_.names[peer] + " calls " + verb(theirs) + " where " + settings_.names[rank_] +
                                 " calls " + verb(own) + where + ": all ranks make the same calls in the same order");
    }
    if (theirs.format != own.format || theirs.reduction != own.reduction) {
        throw std::runtime_error(settings_.names[peer] + " and " + settings_.names[rank_] + " call " + verb(own) +
                                 " with different " + (theirs.format != own.format ? "data types" : "reductions") +
                                 where);
    }
    if (theirs.pieces()[rank_] != expected) {
        throw std::runtime_error(settings_.names[peer] + " gives " + std::to_string(theirs.pieces()[rank_]) +
                                 " bytes to " + verb(own) + " where " + settings_.names[rank_] + " expects " +
                                 std::to_string(expected) + where);
    }
}

// Waiting #

void Channel::await_all(Counter Header::* counter, std::uint32_t target) {
    for (std::size_t distance = 1; distance < size_; ++distance) {
        const std::size_t peer = (rank_ + distance) % size_;
        int spins = settings_.spins;
        while (!reached(header(peer).*counter, target)) {
            if (spins-- <= 0) {
                sleep_until(counter, peer, target);
                break;
            }
            pause_briefly();
        }
    }
}

void Channel::sleep_until(Counter Header::* counter, std::size_t peer, std::uint32_t target) {
    const auto deadline = Clock::now() + std::chrono::duration<double>(settings_.timeout);
    while (true) {
        sleep_on(header(peer).*counter, target, kSliceMs);
        if (reached(header(peer).*counter, target)) {
            return;
        }
        look_at_peers(counter, target);
        if (settings_.interrupted()) {
            throw Interrupted{};
        }
        if (Clock::now() > deadline) {
            late(counter, target);
        }
    }
}

void Channel::look_at_peers(Counter Header::* counter, std::uint32_t target) {
    poll(polled_.data(), nfds_t(polled_.size()), 0);
    for (std::size_t peer = 0; peer < size_; ++peer) {
        const std::uint32_t state = header(peer).state.load();
        const bool ended = polled_[peer].revents != 0;
        // in this order: a rank that has done its part may be gone
        if ((state == kPresent && !ended) || peer == rank_ || reached(header(peer).*counter, target)) {
            continue;
        }
        const std::string& name = settings_.names[peer];
        const std::string where = std::string(" while ") + settings_.names[rank_] + " waits for it in " +
                                  kVerbs[call_.verb] + " (collective " + std::to_string(number_) + " of this group)";
        const int culprit = header(peer).culprit.load();
        culprit_ = int(peer);
        if (state == kFailed && culprit >= 0) {
            culprit_ = culprit;
            throw std::runtime_error(name + " has given up" + where + ": it was waiting for " +
                                     settings_.names[std::size_t(culprit)] + ", whose own output may say why");
        }
        if (state == kFailed) {
            throw std::runtime_error(name + " has given up" + where + ": its own output says why");
        }
        if (state == kLeft) {
            throw std::runtime_error(name + " has destroyed this process group" + where);
        }
        throw std::runtime_error(name + " has ended" + where + ": its own output says why");
    }
}

void Channel::late(Counter Header::* counter, std::uint32_t target) {
    std::vector<std::string> names;
    for (std::size_t peer = 0; peer < size_; ++peer) {
        if (peer != rank_ && !reached(header(peer).*counter, target)) {
            names.push_back(settings_.names[peer]);
            culprit_ = int(peer);
        }
    }
    std::string seconds = std::to_string(settings_.timeout);
    seconds.erase(seconds.find_last_not_of('0') + 1);
    seconds.erase(seconds.find_last_not_of('.') + 1);
    const bool joined = counter != &Header::put;
    throw std::runtime_error("timed out: " + settings_.names[rank_] + " waited " + seconds + " s for " + listed(names) +
                             " in " + kVerbs[call_.verb] + " (collective " + std::to_string(number_) +
                             " of this group): " + (joined ? "joined, but did not go on" : "not joined"));
}

}  // namespace ds_comm
