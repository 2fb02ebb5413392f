// Python functions of norms.
#include <tuple>

#include "column_sums.h"
#include "kernels.h"
#include "parallel.h"

namespace py = pybind11;

namespace ds_kernels {
namespace {

using Shape = std::tuple<std::size_t, std::size_t>;  // rows, columns

void norm(const Kernels& kernels, std::tuple<Address, Address, Address, Address> inputs,
          std::tuple<Address, Address, Address, Address> outputs, Shape shape, double eps, int format,
          bool centered, int threads) {
    const auto [x, residual, weight, bias] = inputs;
    const auto [out, sum, mean, scale] = outputs;
    const auto [rows, columns] = shape;
    const NormArgs args{pointer<const void>(x), pointer<const void>(residual), pointer<const void>(weight),
                        pointer<const void>(bias), pointer<void>(out), pointer<void>(sum),
                        pointer<float>(mean), pointer<float>(scale), columns, eps};
    const NormKernel kernel = kernels.table.norms.norm[format][centered];
    const py::gil_scoped_release unlocked;
    for_slices(rows, columns, threads, [&](std::size_t begin, std::size_t end) { kernel(args, begin, end); });
}

void norm_backward(const Kernels& kernels, std::tuple<Address, Address, Address, Address, Address, Address> inputs,
                   std::tuple<Address, Address, Address> outputs, Shape shape, int format, bool centered,
                   int threads) {
    const auto [grad, grad_sum, x, weight, mean, scale] = inputs;
    const auto [grad_x, grad_weight, grad_bias] = outputs;
    const auto [rows, columns] = shape;
    const NormBackwardArgs args{pointer<const void>(grad),  pointer<const void>(grad_sum), pointer<const void>(x),
                                pointer<const void>(weight), pointer<const float>(mean),   pointer<const float>(scale),
                                pointer<void>(grad_x),      columns};
    const NormBackwardKernel kernel = kernels.table.norms.norm_backward[format][centered];
    const py::gil_scoped_release unlocked;
    if (weight == 0) {
        return for_slices(rows, columns, threads,
                          [&](std::size_t begin, std::size_t end) { kernel(args, begin, end, nullptr); });
    }
    std::vector<void*> outs{pointer<void>(grad_weight)};
    if (centered) {
        outs.push_back(pointer<void>(grad_bias));
    }
    sum_columns(kernels, rows, columns, threads, outs, format,
                [&](std::size_t begin, std::size_t end, float* sums) { kernel(args, begin, end, sums); });
}

}  // namespace

void bind_norms(py::class_<Kernels>& kernels) { kernels.def("norm", &norm).def("norm_backward", &norm_backward); }

}  // namespace ds_kernels
