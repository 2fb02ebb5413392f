// Python functions that step optimizers.
#include <pybind11/stl.h>

#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "step_blocks.h"

namespace py = pybind11;

namespace ds_kernels {
namespace {

using PyOperand = std::tuple<Address, Address, int>;  // data, extra, codec
// param, grad, states, copy; zero_grad; elements; threads
using PyArrays = std::tuple<PyOperand, PyOperand, std::vector<PyOperand>, PyOperand, bool, std::size_t, int>;
constexpr Written kAll{true, true};

Operand operand(const PyOperand& from) {
    return {pointer<void>(std::get<0>(from)), pointer<void>(std::get<1>(from)), std::get<2>(from)};
}

StepArrays unpacked(const PyArrays& from) {
    StepArrays arrays{};
    arrays.param = operand(std::get<0>(from));
    arrays.grad = operand(std::get<1>(from));
    for (std::size_t i = 0; i < std::get<2>(from).size(); ++i) {
        arrays.states[i] = operand(std::get<2>(from)[i]);
    }
    arrays.copy = operand(std::get<3>(from));
    arrays.zero_grad = std::get<4>(from);
    return arrays;
}

template <class Step>
void run(const Kernels& kernels, const PyArrays& given, Written written, const Step& step) {
    const StepArrays arrays = unpacked(given);
    const py::gil_scoped_release unlocked;
    for_slices(std::get<5>(given), 1, std::get<6>(given), [&](std::size_t begin, std::size_t end) {
        for_blocks(kernels.table.states, arrays, written, begin, end, step);
    });
}

// All arithmetic on the plain numbers is in double precision, as in torch; each result is rounded once.

LerpWeight lerp_weight(double beta) {
    const float weight = static_cast<float>(1.0 - beta);
    const bool from_end = weight >= 0.5f;
    return {from_end ? weight - 1.0f : weight, from_end ? ~0u : 0u};
}

// step, lr, beta1, beta2, eps, weight_decay, scale, decoupled; see AdamHyper.
using AdamNumbers = std::tuple<double, double, double, double, double, double, double, bool>;

void adam(const Kernels& kernels, const PyArrays& arrays, const AdamNumbers& numbers) {
    const auto [step, lr, beta1, beta2, eps, weight_decay, scale, decoupled] = numbers;
    const double bias2_root = std::sqrt(1.0 - std::pow(beta2, step));
    AdamScalars s;
    s.scale = static_cast<float>(scale);
    s.decay = static_cast<float>(decoupled ? 1.0 - lr * weight_decay : weight_decay);
    s.grad_weight = lerp_weight(beta1);
    s.beta2 = static_cast<float>(beta2);
    s.one_minus_beta2 = static_cast<float>(1.0 - beta2);
    s.eps = static_cast<float>(eps * bias2_root);
    s.minus_step_size = static_cast<float>(-(lr / (1.0 - std::pow(beta1, step))) * bias2_root);
    const auto kernel = kernels.table.optimizers.adam[decoupled];
    run(kernels, arrays, kAll, [&](const StepBlock& block, std::size_t) { kernel(block, s); });
}

// lr, beta1, beta2, weight_decay, scale; see LionHyper.
using LionNumbers = std::tuple<double, double, double, double, double>;

void lion(const Kernels& kernels, const PyArrays& arrays, const LionNumbers& numbers) {
    const auto [lr, beta1, beta2, weight_decay, scale] = numbers;
    const LionScalars s{static_cast<float>(scale), static_cast<float>(1.0 - lr * weight_decay), lerp_weight(beta1),
                        lerp_weight(beta2), static_cast<float>(-lr)};
    const auto kernel = kernels.table.optimizers.lion;
    run(kernels, arrays, kAll, [&](const StepBlock& block, std::size_t) { kernel(block, s); });
}

// step, lr, lr_decay, eps, weight_decay, scale; see AdagradHyper.
using AdagradNumbers = std::tuple<double, double, double, double, double, double>;

void adagrad(const Kernels& kernels, const PyArrays& arrays, const AdagradNumbers& numbers) {
    const auto [step, lr, lr_decay, eps, weight_decay, scale] = numbers;
    const AdagradScalars s{static_cast<float>(scale), static_cast<float>(weight_decay), static_cast<float>(eps),
                           static_cast<float>(-lr / (1.0 + (step - 1.0) * lr_decay))};
    const auto kernel = kernels.table.optimizers.adagrad;
    run(kernels, arrays, kAll, [&](const StepBlock& block, std::size_t) { kernel(block, s); });
}

// lr, momentum, dampening, weight_decay, nesterov, first, scale; see SgdHyper.
using SgdNumbers = std::tuple<double, double, double, double, bool, bool, double>;

void sgd(const Kernels& kernels, const PyArrays& arrays, const SgdNumbers& numbers) {
    const auto [lr, momentum, dampening, weight_decay, nesterov, first, scale] = numbers;
    const SgdScalars s{static_cast<float>(scale),
                       static_cast<float>(weight_decay),
                       static_cast<float>(first ? 0.0 : momentum),
                       static_cast<float>(first ? 1.0 : 1.0 - dampening),
                       static_cast<float>(momentum),
                       static_cast<float>(-lr)};
    const auto kernel = kernels.table.optimizers.sgd[momentum == 0.0 ? 0 : nesterov ? 2 : 1];
    run(kernels, arrays, kAll, [&](const StepBlock& block, std::size_t) { kernel(block, s); });
}

// step, lr * ratio, beta1, beta2, eps, weight_decay, scale; see LambHyper.
using LambNumbers = std::tuple<double, double, double, double, double, double, double>;

LambScalars rounded(const LambNumbers& numbers) {
    const auto [step, lr, beta1, beta2, eps, weight_decay, scale] = numbers;
    const double bias2_root = std::sqrt(1.0 - std::pow(beta2, step));
    LambScalars s;
    s.scale = static_cast<float>(scale);
    s.grad_weight = lerp_weight(beta1);
    s.beta2 = static_cast<float>(beta2);
    s.one_minus_beta2 = static_cast<float>(1.0 - beta2);
    s.eps = static_cast<float>(eps * bias2_root);
    s.moment_factor = static_cast<float>(bias2_root / (1.0 - std::pow(beta1, step)));
    s.weight_decay = static_cast<float>(weight_decay);
    s.minus_lr = static_cast<float>(-lr);
    return s;
}

// Adds up every other number along the tree over blocks in backends/plain/sums.py.
double tree_sum(const double* sums, std::size_t blocks) {
    if (blocks == 1) {
        return sums[0];
    }
    if (blocks % 2 == 1) {
        return tree_sum(sums, blocks - 1) + sums[2 * (blocks - 1)];
    }
    return tree_sum(sums, blocks / 2) + tree_sum(sums + blocks, blocks / 2);
}

// Returns the sums of squares of parameters and directions.
std::pair<double, double> lamb_moments(const Kernels& kernels, const PyArrays& given, const LambNumbers& numbers) {
    const StepArrays arrays = unpacked(given);
    const LambScalars s = rounded(numbers);
    const auto kernel = kernels.table.optimizers.lamb_moments;
    const std::size_t numel = std::get<5>(given);
    const std::size_t num_blocks = (numel + kStepBlock - 1) / kStepBlock;
    if (num_blocks == 0) {
        return {0.0, 0.0};
    }
    const py::gil_scoped_release unlocked;
    std::vector<double> squares(2 * num_blocks);
    // Slices of whole blocks: the sums of a block do not depend on the number of threads.
    for_slices(num_blocks, kStepBlock, std::get<6>(given), [&](std::size_t begin, std::size_t end) {
        for_blocks(kernels.table.states, arrays, {false, true}, begin * kStepBlock, std::min(numel, end * kStepBlock),
                   [&](const StepBlock& block, std::size_t at) {
                       kernel(block, s, squares.data() + at / kStepBlock * 2);
                   });
    });
    return {tree_sum(squares.data(), num_blocks), tree_sum(squares.data() + 1, num_blocks)};
}

void lamb_step(const Kernels& kernels, const PyArrays& arrays, const LambNumbers& numbers) {
    const LambScalars s = rounded(numbers);
    const auto kernel = kernels.table.optimizers.lamb_step;
    run(kernels, arrays, {true, false}, [&](const StepBlock& block, std::size_t) { kernel(block, s); });
}

}  // namespace

void bind_optimizers(py::class_<Kernels>& kernels) {
    kernels.def("adam", &adam)
        .def("lion", &lion)
        .def("adagrad", &adagrad)
        .def("sgd", &sgd)
        .def("lamb_moments", &lamb_moments)
        .def("lamb_step", &lamb_step);
}

}  // namespace ds_kernels
