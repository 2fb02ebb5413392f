// Python functions that code messages in blocks.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "kernels.h"
#include "parallel.h"

namespace py = pybind11;

namespace ds_kernels {
namespace {

using LayoutNumbers = std::tuple<int, std::size_t, int>;  // code, block, format of the scales

BlockLayout layout_of(const LayoutNumbers& numbers, std::size_t numel) {
    const std::size_t block = std::get<1>(numbers);
    return {numel, block, (numel + block - 1) / block, std::get<2>(numbers)};
}

void encode(const Kernels& kernels, Address x, Address error, Address payload, std::size_t numel, int format,
            const LayoutNumbers& numbers, int threads) {
    const BlockLayout layout = layout_of(numbers, numel);
    const EncodeKernel kernel = kernels.table.codecs.encode[std::get<0>(numbers)][format];
    const py::gil_scoped_release unlocked;
    for_slices(layout.num_blocks, layout.block, threads, [&](std::size_t begin, std::size_t end) {
        kernel(pointer<const void>(x), pointer<float>(error), pointer<std::uint8_t>(payload), layout, begin, end);
    });
}

void decode(const Kernels& kernels, Address out, Address payload, std::size_t numel, int format,
            const LayoutNumbers& numbers, int threads) {
    const BlockLayout layout = layout_of(numbers, numel);
    const DecodeKernel kernel = kernels.table.codecs.decode[std::get<0>(numbers)][format];
    const py::gil_scoped_release unlocked;
    for_slices(layout.num_blocks, layout.block, threads, [&](std::size_t begin, std::size_t end) {
        kernel(pointer<void>(out), pointer<const std::uint8_t>(payload), layout, begin, end);
    });
}

void accumulate(const Kernels& kernels, Address out, Address payload, std::size_t numel, const LayoutNumbers& numbers,
                double weight, int threads) {
    const BlockLayout layout = layout_of(numbers, numel);
    const AccumulateKernel kernel = kernels.table.codecs.accumulate[std::get<0>(numbers)];
    const py::gil_scoped_release unlocked;
    for_slices(layout.num_blocks, layout.block, threads, [&](std::size_t begin, std::size_t end) {
        kernel(pointer<float>(out), pointer<const std::uint8_t>(payload), layout, static_cast<float>(weight), begin,
               end);
    });
}

}  // namespace

void bind_codecs(py::class_<Kernels>& kernels) {
    kernels.def("block_encode", &encode).def("block_decode", &decode).def("block_accumulate", &accumulate);
}

}  // namespace ds_kernels
