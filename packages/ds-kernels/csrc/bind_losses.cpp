// Python functions that compute losses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "kernels.h"
#include "parallel.h"

namespace py = pybind11;

namespace ds_kernels {
namespace {

using CrossEntropyTerms = std::tuple<std::int64_t, double, double>;  // ignore_index, label_smoothing, z_loss

void cross_entropy(const Kernels& kernels, Address logits, Address target, Address scales, Address losses,
                   std::size_t rows, std::size_t columns, int format, bool differentiate, int threads,
                   const CrossEntropyTerms& terms) {
    const auto [ignore_index, label_smoothing, z_loss] = terms;
    const CrossEntropyArgs args{pointer<void>(logits),
                                pointer<const std::int64_t>(target),
                                pointer<const float>(scales),
                                pointer<float>(losses),
                                columns,
                                differentiate,
                                ignore_index,
                                label_smoothing,
                                z_loss};
    const CrossEntropyKernel kernel = kernels.table.losses.cross_entropy[format];
    const py::gil_scoped_release unlocked;
    for_slices(rows, columns, threads, [&](std::size_t begin, std::size_t end) { kernel(args, begin, end); });
}

}  // namespace

void bind_losses(py::class_<Kernels>& kernels) { kernels.def("cross_entropy", &cross_entropy); }

}  // namespace ds_kernels
