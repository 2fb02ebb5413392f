// Python module: kernels on raw addresses. No torch headers, so one binary serves every torch version.
//
// The caller has checked formats, lengths and devices; see backends/cpu.py. The lock is released while they run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "isa.h"
#include "parallel.h"

namespace py = pybind11;

namespace ds_kernels {
namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

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

class Kernels {
  public:
    explicit Kernels(const std::string& isa) : table_(nullptr) {
        std::string names;
        for (const KernelTable* table : supported_kernels()) {
            if (isa == table->name) {
                table_ = table;
            }
            names += (names.empty() ? "" : ", ") + std::string(table->name);
        }
        if (table_ == nullptr) {
            throw std::invalid_argument("isa must be one this processor runs (" + names + "); got '" + isa + "'");
        }
    }

    void adam(Address param, Address grad, Address exp_avg, Address exp_avg_sq, Address copy, std::size_t numel,
              int grad_format, int copy_format, int threads, const AdamNumbers& numbers) const {
        const AdamArgs args{pointer<float>(param),      pointer<const void>(grad), pointer<float>(exp_avg),
                            pointer<float>(exp_avg_sq), pointer<void>(copy),       rounded(numbers)};
        const AdamKernel kernel = table_->adam[grad_format][copy_format][std::get<7>(numbers)];
        const py::gil_scoped_release unlocked;
        for_slices(numel, 1, threads, [&](std::size_t begin, std::size_t end) { kernel(args, begin, end); });
    }

    void tree_sum(Address out, const std::vector<Address>& pieces, std::size_t numel, int piece_format,
                  int out_format, int threads) const {
        std::vector<const void*> data;
        data.reserve(pieces.size());
        for (const Address piece : pieces) {
            data.push_back(pointer<const void>(piece));
        }
        const TreeSumKernel kernel = table_->tree_sum[piece_format][out_format];
        const py::gil_scoped_release unlocked;
        for_slices(numel, 1, threads, [&](std::size_t begin, std::size_t end) {
            kernel(pointer<void>(out), data.data(), data.size(), begin, end);
        });
    }

    void chunk_sumsq(Address x, Address sums, std::size_t chunk, std::size_t num_chunks, int format,
                     int threads) const {
        const ChunkSumsqKernel kernel = table_->chunk_sumsq[format];
        const py::gil_scoped_release unlocked;
        for_slices(num_chunks, chunk, threads, [&](std::size_t begin, std::size_t end) {
            kernel(pointer<const void>(x), pointer<double>(sums), chunk, begin, end);
        });
    }

  private:
    const KernelTable* table_;
};

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const KernelTable* table : supported_kernels()) {
        names.emplace_back(table->name);
    }
    return names;
}

}  // namespace
}  // namespace ds_kernels

PYBIND11_MODULE(_native, module) {
    using ds_kernels::Kernels;
    module.doc() = "CPU kernels on raw addresses; use them through ds_kernels.";
    module.def("isas", &ds_kernels::isas, "Instruction sets this processor runs, fastest first.");
    py::class_<Kernels>(module, "Kernels")
        .def(py::init<const std::string&>())
        .def("adam", &Kernels::adam)
        .def("tree_sum", &Kernels::tree_sum)
        .def("chunk_sumsq", &Kernels::chunk_sumsq);
}
