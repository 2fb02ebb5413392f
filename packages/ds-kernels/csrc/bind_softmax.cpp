// Python functions of the softmax.
#include <memory>
#include <tuple>

#include "dropout_key.h"
#include "kernels.h"
#include "parallel.h"

namespace py = pybind11;

namespace ds_kernels {
namespace {

using Shape = std::tuple<std::size_t, std::size_t, std::size_t, std::size_t>;  // batch, heads, queries, keys
using Strides = std::tuple<std::size_t, std::size_t, std::size_t>;             // of the mask
using Form = std::tuple<double, bool>;                                         // scale, causal

template <class Kernel, class Args>
void for_rows(Kernel kernel, const Args& args, std::size_t rows, int threads) {
    for_slices(rows, args.keys, threads, [&](std::size_t begin, std::size_t end) {
        const std::unique_ptr<float[]> row(new float[args.keys]);
        kernel(args, begin, end, row.get());
    });
}

void softmax(const Kernels& kernels, std::tuple<Address, Address, Address, Address> tensors, Shape shape,
             Strides strides, Form form, KeyNumbers key, int format, int threads) {
    const auto [scores, mask, out, dropped] = tensors;
    const auto [batch, heads, queries, keys] = shape;
    const auto [stride_0, stride_1, stride_2] = strides;
    const auto [scale, causal] = form;
    const SoftmaxArgs args{pointer<const void>(scores), pointer<const void>(mask), pointer<void>(out),
                           pointer<void>(dropped),      heads,                     queries,
                           keys,                        {stride_0, stride_1, stride_2},
                           static_cast<float>(scale),   causal,                    key_of(key)};
    const SoftmaxKernel kernel = kernels.table.softmaxes.softmax[format];
    const py::gil_scoped_release unlocked;
    for_rows(kernel, args, batch * heads * queries, threads);
}

void softmax_backward(const Kernels& kernels, std::tuple<Address, Address, Address> tensors, Shape shape, Form form,
                      KeyNumbers key, int format, int threads) {
    const auto [grad, probabilities, out] = tensors;
    const auto [batch, heads, queries, keys] = shape;
    const auto [scale, causal] = form;
    const SoftmaxBackwardArgs args{pointer<const void>(grad), pointer<const void>(probabilities),
                                   pointer<void>(out),        queries,
                                   keys,                      static_cast<float>(scale),
                                   causal,                    key_of(key)};
    const SoftmaxBackwardKernel kernel = kernels.table.softmaxes.softmax_backward[format];
    const py::gil_scoped_release unlocked;
    for_rows(kernel, args, batch * heads * queries, threads);
}

}  // namespace

void bind_softmax(py::class_<Kernels>& kernels) {
    kernels.def("softmax", &softmax).def("softmax_backward", &softmax_backward);
}

}  // namespace ds_kernels
