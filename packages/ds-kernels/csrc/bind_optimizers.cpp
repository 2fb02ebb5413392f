// Python functions that step optimizers.
#include <pybind11/stl.h>

#include <cmath>
#include <tuple>

#include "kernels.h"
#include "parallel.h"

namespace py = pybind11;

namespace ds_kernels {
namespace {

// step, lr, beta1, beta2, eps, weight_decay, scale, decoupled; see AdamHyper.
using AdamNumbers = std::tuple<double, double, double, double, double, double, double, bool>;

// All arithmetic on the plain numbers is in double precision, as in torch; each result is rounded once.
AdamScalars rounded(const AdamNumbers& numbers) {
    const auto [step, lr, beta1, beta2, eps, weight_decay, scale, decoupled] = numbers;
    const float weight = static_cast<float>(1.0 - beta1);
    const bool from_grad = weight >= 0.5f;
    AdamScalars s;
    s.scale = static_cast<float>(scale);
    s.decay = static_cast<float>(decoupled ? 1.0 - lr * weight_decay : weight_decay);
    s.grad_weight = from_grad ? weight - 1.0f : weight;
    s.from_grad = from_grad ? ~0u : 0u;
    s.beta2 = static_cast<float>(beta2);
    s.one_minus_beta2 = static_cast<float>(1.0 - beta2);
    const double bias2_root = std::sqrt(1.0 - std::pow(beta2, step));
    s.eps = static_cast<float>(eps * bias2_root);
    s.minus_step_size = static_cast<float>(-(lr / (1.0 - std::pow(beta1, step))) * bias2_root);
    return s;
}

void adam(const Kernels& kernels, Address param, Address grad, Address exp_avg, Address exp_avg_sq, Address copy,
          std::size_t numel, int grad_format, int copy_format, int threads, const AdamNumbers& numbers) {
    const AdamArgs args{pointer<float>(param),      pointer<const void>(grad), pointer<float>(exp_avg),
                        pointer<float>(exp_avg_sq), pointer<void>(copy),       rounded(numbers)};
    const AdamKernel kernel = kernels.table.optimizers.adam[grad_format][copy_format][std::get<7>(numbers)];
    const py::gil_scoped_release unlocked;
    for_slices(numel, 1, threads, [&](std::size_t begin, std::size_t end) { kernel(args, begin, end); });
}

}  // namespace

void bind_optimizers(py::class_<Kernels>& kernels) { kernels.def("adam", &adam); }

}  // namespace ds_kernels
