// Python functions that sum along fixed trees.
#include <pybind11/stl.h>

#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace py = pybind11;

namespace ds_kernels {
namespace {

void tree_sum(const Kernels& kernels, Address out, const std::vector<Address>& pieces, std::size_t numel,
              int piece_format, int out_format, int threads) {
    std::vector<const void*> data;
    data.reserve(pieces.size());
    for (const Address piece : pieces) {
        data.push_back(pointer<const void>(piece));
    }
    const TreeSumKernel kernel = kernels.table.reductions.tree_sum[piece_format][out_format];
    const py::gil_scoped_release unlocked;
    for_slices(numel, 1, threads, [&](std::size_t begin, std::size_t end) {
        kernel(pointer<void>(out), data.data(), data.size(), begin, end);
    });
}

void chunk_sumsq(const Kernels& kernels, Address x, Address sums, std::size_t chunk, std::size_t num_chunks, int format,
                 int threads) {
    const ChunkSumsqKernel kernel = kernels.table.reductions.chunk_sumsq[format];
    const py::gil_scoped_release unlocked;
    for_slices(num_chunks, chunk, threads, [&](std::size_t begin, std::size_t end) {
        kernel(pointer<const void>(x), pointer<double>(sums), chunk, begin, end);
    });
}

}  // namespace

void bind_reductions(py::class_<Kernels>& kernels) {
    kernels.def("tree_sum", &tree_sum).def("chunk_sumsq", &chunk_sumsq);
}

}  // namespace ds_kernels
