// Python module: kernels on raw addresses. No torch headers, so one binary serves every torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "isa.h"
#include "kernels.h"

namespace py = pybind11;

namespace ds_kernels {
namespace {

Kernels kernels_of(const std::string& isa) {
    std::string names;
    for (const KernelTable* table : supported_kernels()) {
        if (isa == table->name) {
            return Kernels{*table};
        }
        names += (names.empty() ? "" : ", ") + std::string(table->name);
    }
    throw std::invalid_argument("isa must be one this processor runs (" + names + "); got '" + isa + "'");
}

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
    module.doc() = "CPU kernels on raw addresses; use them through ds_kernels.";
    module.def("isas", &ds_kernels::isas, "Instruction sets this processor runs, fastest first.");
    // Local: a vendored copy of this module may be loaded beside it.
    py::class_<ds_kernels::Kernels> kernels(module, "Kernels", py::module_local());
    kernels.def(py::init(&ds_kernels::kernels_of));
    ds_kernels::bind_activations(kernels);
    ds_kernels::bind_codecs(kernels);
    ds_kernels::bind_dropout(kernels);
    ds_kernels::bind_losses(kernels);
    ds_kernels::bind_norms(kernels);
    ds_kernels::bind_optimizers(kernels);
    ds_kernels::bind_reductions(kernels);
    ds_kernels::bind_softmax(kernels);
}
