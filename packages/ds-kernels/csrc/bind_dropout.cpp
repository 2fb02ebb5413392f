// Python functions of dropout.
#include <tuple>

#include "column_sums.h"
#include "dropout_key.h"
#include "kernels.h"
#include "parallel.h"

namespace py = pybind11;

namespace ds_kernels {
namespace {

using Shape = std::tuple<std::size_t, std::size_t>;  // rows, columns

void bias_dropout(const Kernels& kernels, std::tuple<Address, Address, Address, Address> tensors, Shape shape,
                  KeyNumbers key, int format, int threads) {
    const auto [x, bias, residual, out] = tensors;
    const auto [rows, columns] = shape;
    const BiasDropoutArgs args{pointer<const void>(x), pointer<const void>(bias), pointer<const void>(residual),
                               pointer<void>(out),     columns,                   key_of(key)};
    const BiasDropoutKernel kernel = kernels.table.dropout.bias_dropout[format][bias != 0];
    const py::gil_scoped_release unlocked;
    for_slices(rows * columns, 1, threads, [&](std::size_t begin, std::size_t end) { kernel(args, begin, end); });
}

void bias_dropout_backward(const Kernels& kernels, std::tuple<Address, Address, Address> tensors, Shape shape,
                           KeyNumbers key, int format, int threads) {
    const auto [grad, grad_x, grad_bias] = tensors;
    const auto [rows, columns] = shape;
    const BiasDropoutArgs args{pointer<const void>(grad), nullptr, nullptr, pointer<void>(grad_x), columns,
                               key_of(key)};
    const BiasDropoutBackwardKernel kernel = kernels.table.dropout.bias_dropout_backward[format][grad_bias != 0];
    const py::gil_scoped_release unlocked;
    if (grad_bias == 0) {
        return for_slices(rows * columns, 1, threads,
                          [&](std::size_t begin, std::size_t end) { kernel(args, begin, end, nullptr); });
    }
    sum_columns(kernels, rows, columns, threads, {pointer<void>(grad_bias)}, format,
                [&](std::size_t begin, std::size_t end, float* sums) { kernel(args, begin, end, sums); });
}

}  // namespace

void bind_dropout(py::class_<Kernels>& kernels) {
    kernels.def("bias_dropout", &bias_dropout).def("bias_dropout_backward", &bias_dropout_backward);
}

}  // namespace ds_kernels
