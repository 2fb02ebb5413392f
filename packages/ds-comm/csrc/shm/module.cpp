// Python module: collectives on raw addresses. No torch headers, so one binary serves every torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <tuple>

#include "channel.h"

namespace py = pybind11;

namespace ds_comm {
namespace {

using Address = std::uintptr_t;
using Addresses = std::vector<Address>;
using Sizes = std::vector<std::size_t>;
using Agreed = std::tuple<int, int, int, int>;  // verb, format, reduction, root

template <class T>
std::vector<T*> pointers(const Addresses& addresses) {
    std::vector<T*> made;
    made.reserve(addresses.size());
    for (const Address address : addresses) {
        made.push_back(reinterpret_cast<T*>(address));
    }
    return made;
}

Call call_of(const Agreed& agreed) {
    return {std::get<0>(agreed), std::get<1>(agreed), std::get<2>(agreed), std::get<3>(agreed)};
}

bool interrupted() {
    const py::gil_scoped_acquire locked;
    return PyErr_CheckSignals() != 0;
}

// Runs without the interpreter's lock; what a signal's handler has raised goes on.
template <class Body>
void unlocked(const Body& body) {
    try {
        const py::gil_scoped_release released;
        body();
    } catch (const Interrupted&) {
        throw py::error_already_set();
    }
}

std::unique_ptr<Channel> open(int fd, int rank, std::tuple<std::size_t, std::size_t, std::size_t> layout,
                              std::vector<int> watches, std::vector<std::string> names, int spins, double timeout) {
    const auto [ranks, slots, slot_bytes] = layout;
    return std::make_unique<Channel>(
        fd, Layout{ranks, slots, slot_bytes},
        Settings{rank, std::move(watches), std::move(names), spins, timeout, &interrupted});
}

std::size_t segment_bytes(std::tuple<std::size_t, std::size_t, std::size_t> layout) {
    const auto [ranks, slots, slot_bytes] = layout;
    return Layout{ranks, slots, slot_bytes}.bytes();
}

void share(Channel& channel, const Agreed& agreed, Address in, std::size_t bytes, const Addresses& outs,
           const Sizes& out_bytes) {
    const auto to = pointers<char>(outs);
    unlocked([&] { channel.share(call_of(agreed), reinterpret_cast<const char*>(in), bytes, to, out_bytes); });
}

void exchange(Channel& channel, const Agreed& agreed, const Addresses& ins, const Sizes& in_bytes,
              const Addresses& outs, const Sizes& out_bytes) {
    const auto from = pointers<const char>(ins);
    const auto to = pointers<char>(outs);
    unlocked([&] { channel.exchange(call_of(agreed), from, in_bytes, to, out_bytes); });
}

void all_reduce(Channel& channel, const Agreed& agreed, Address in, Address out, std::size_t numel, std::size_t item) {
    unlocked([&] {
        channel.all_reduce(call_of(agreed), reinterpret_cast<const char*>(in), reinterpret_cast<char*>(out), numel,
                           item);
    });
}

void reduce_scatter(Channel& channel, const Agreed& agreed, const Addresses& ins, Address out, std::size_t numel,
                    std::size_t item) {
    const auto from = pointers<const char>(ins);
    unlocked([&] { channel.reduce_scatter(call_of(agreed), from, reinterpret_cast<char*>(out), numel, item); });
}

// For tests: one reduction, by the kernels of this processor or by those of any.
void fold(bool best, int format, int reduction, Address out, const Addresses& arrays, std::size_t numel) {
    const auto from = pointers<const void>(arrays);
    const FoldTable& folds = best ? best_folds() : kBaseFolds;
    const py::gil_scoped_release released;
    folds.by_format[format].by_reduction[reduction](reinterpret_cast<void*>(out), from.data(), from.size(), numel);
}

void close(Channel& channel) {
    const py::gil_scoped_release released;
    channel.close();
}

void set_timeout(Channel& channel, double seconds) {
    const py::gil_scoped_release released;
    channel.set_timeout(seconds);
}

}  // namespace
}  // namespace ds_comm

PYBIND11_MODULE(_shm, module) {
    module.doc() = "Collectives of one host's ranks on raw addresses; use them through ds_comm.shm.";
    module.def("segment_bytes", &ds_comm::segment_bytes, "Bytes of a segment of (ranks, slots, bytes of a slot).");
    module.def("fold", &ds_comm::fold, "Reduce arrays with the best kernels, or with those of any processor.");
    py::class_<ds_comm::Channel>(module, "Channel")
        .def(py::init(&ds_comm::open))
        .def("share", &ds_comm::share)
        .def("exchange", &ds_comm::exchange)
        .def("all_reduce", &ds_comm::all_reduce)
        .def("reduce_scatter", &ds_comm::reduce_scatter)
        .def("set_timeout", &ds_comm::set_timeout)
        .def("close", &ds_comm::close);
}
