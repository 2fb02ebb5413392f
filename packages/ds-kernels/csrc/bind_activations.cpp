// Python functions of activations.
#include "column_sums.h"
#include "kernels.h"
#include "parallel.h"

namespace py = pybind11;

namespace ds_kernels {
namespace {

void bias_gelu(const Kernels& kernels, Address x, Address bias, Address out, std::size_t rows, std::size_t columns,
               int format, bool tanh, int threads) {
    const BiasGeluArgs args{nullptr, pointer<const void>(x), pointer<const void>(bias), pointer<void>(out), columns};
    const BiasGeluKernel kernel = kernels.table.activations.bias_gelu[format][tanh][bias != 0];
    const py::gil_scoped_release unlocked;
    for_slices(rows * columns, 1, threads, [&](std::size_t begin, std::size_t end) { kernel(args, begin, end); });
}

void bias_gelu_backward(const Kernels& kernels, Address grad, Address x, Address bias, Address grad_x,
                        Address grad_bias, std::size_t rows, std::size_t columns, int format, bool tanh, int threads) {
    const BiasGeluArgs args{pointer<const void>(grad), pointer<const void>(x), pointer<const void>(bias),
                            pointer<void>(grad_x), columns};
    const BiasGeluBackwardKernel kernel = kernels.table.activations.bias_gelu_backward[format][tanh][bias != 0];
    const py::gil_scoped_release unlocked;
    if (bias == 0) {
        return for_slices(rows * columns, 1, threads,
                          [&](std::size_t begin, std::size_t end) { kernel(args, begin, end, nullptr); });
    }
    sum_columns(kernels, rows, columns, threads, {pointer<void>(grad_bias)}, format,
                [&](std::size_t begin, std::size_t end, float* sums) { kernel(args, begin, end, sums); });
}

void bias_swiglu(const Kernels& kernels, Address x, Address bias, Address out, std::size_t rows, std::size_t columns,
                 int format, int threads) {
    const BiasSwigluArgs args{nullptr, pointer<const void>(x), pointer<const void>(bias), pointer<void>(out), columns};
    const BiasSwigluKernel kernel = kernels.table.activations.bias_swiglu[format][bias != 0];
    const py::gil_scoped_release unlocked;
    for_slices(rows * columns, 1, threads, [&](std::size_t begin, std::size_t end) { kernel(args, begin, end); });
}

void bias_swiglu_backward(const Kernels& kernels, Address grad, Address x, Address bias, Address grad_x,
                          Address grad_bias, std::size_t rows, std::size_t columns, int format, int threads) {
    const BiasSwigluArgs args{pointer<const void>(grad), pointer<const void>(x), pointer<const void>(bias),
                              pointer<void>(grad_x), columns};
    const BiasSwigluBackwardKernel kernel = kernels.table.activations.bias_swiglu_backward[format][bias != 0];
    const py::gil_scoped_release unlocked;
    if (bias == 0) {
        return for_slices(rows * columns, 1, threads,
                          [&](std::size_t begin, std::size_t end) { kernel(args, begin, end, nullptr); });
    }
    sum_columns(kernels, rows, 2 * columns, threads, {pointer<void>(grad_bias)}, format,
                [&](std::size_t begin, std::size_t end, float* sums) { kernel(args, begin, end, sums); });
}

void math(const Kernels& kernels, int function, bool fine, Address x, Address out, std::size_t n) {
    const StrictFloat guard;
    kernels.table.activations.math[fine][function](pointer<const float>(x), pointer<float>(out), n);
}

}  // namespace

void bind_activations(py::class_<Kernels>& kernels) {
    kernels.def("bias_gelu", &bias_gelu).def("bias_gelu_backward", &bias_gelu_backward);
    kernels.def("bias_swiglu", &bias_swiglu).def("bias_swiglu_backward", &bias_swiglu_backward).def("math", &math);
}

}  // namespace ds_kernels
