// The kernels of one instruction set, as Python holds them; each family binds its functions in a file of its own.
//
// Callers have checked formats, lengths and devices; see backends/. The lock is released while kernels run.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "kernel_table.h"

namespace ds_kernels {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

struct Kernels {
    const KernelTable& table;
};

void bind_activations(pybind11::class_<Kernels>& kernels);
void bind_codecs(pybind11::class_<Kernels>& kernels);
void bind_dropout(pybind11::class_<Kernels>& kernels);
void bind_losses(pybind11::class_<Kernels>& kernels);
void bind_norms(pybind11::class_<Kernels>& kernels);
void bind_optimizers(pybind11::class_<Kernels>& kernels);
void bind_reductions(pybind11::class_<Kernels>& kernels);
void bind_softmax(pybind11::class_<Kernels>& kernels);

}  // namespace ds_kernels
