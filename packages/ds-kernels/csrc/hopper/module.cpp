// Python functions of the kernels for Hopper: raw addresses in, as in csrc/module.cpp.
//
// The CUDA runtime is linked in and started by the first launch: importing and checking need neither a driver nor a GPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "call.h"

namespace py = pybind11;

namespace ds_kernels {
namespace {

using Address = std::uintptr_t;
using Pointers = std::array<Address, 5>;  // left, weight, bias, out, inside
using Sizes = std::array<int, 3>;         // rows, columns, inner

struct Product {
    const char* (*run)(const LinearCall&);
    std::size_t (*workspace)(const LinearCall&);
};

Product product_of(const std::string& op, const std::string& dtype) {
    if (dtype != "bfloat16" && dtype != "float16") {
        throw std::invalid_argument("dtype must be bfloat16 or float16; got " + dtype);
    }
    const bool wide = dtype == "bfloat16";
    if (op == "linear_gelu") {
        return wide ? Product{linear_gelu_bfloat16, linear_gelu_bfloat16_workspace}
                    : Product{linear_gelu_float16, linear_gelu_float16_workspace};
    }
    if (op == "linear_dgelu") {
        return wide ? Product{linear_dgelu_bfloat16, linear_dgelu_bfloat16_workspace}
                    : Product{linear_dgelu_float16, linear_dgelu_float16_workspace};
    }
    throw std::invalid_argument("op must be linear_gelu or linear_dgelu; got " + op);
}

template <class T>
T* pointer(Address address) {
    if (address % 16 != 0) {
        throw std::invalid_argument("tensors must start on 16-byte boundaries; got one at address " +
                                    std::to_string(address) + "; clone it");
    }
    return reinterpret_cast<T*>(address);
}

LinearCall call_of(const Pointers& pointers, const Sizes& sizes, int multiprocessors) {
    for (const int size : sizes) {
        if (size < 1) throw std::invalid_argument("sizes must be at least 1; got " + std::to_string(size));
    }
    if (multiprocessors < 1) {
        throw std::invalid_argument("multiprocessors must be at least 1; got " + std::to_string(multiprocessors));
    }
    LinearCall call{};
    call.left = pointer<const void>(pointers[0]);
    call.weight = pointer<const void>(pointers[1]);
    call.bias = pointer<const void>(pointers[2]);
    call.out = pointer<void>(pointers[3]);
    call.inside = pointer<void>(pointers[4]);
    call.rows = sizes[0];
    call.columns = sizes[1];
    call.inner = sizes[2];
    call.multiprocessors = multiprocessors;
    return call;
}

void require(const char* problem, const Sizes& sizes) {
    if (problem == nullptr) return;
    throw std::runtime_error("CUTLASS refuses the product with rows, columns and inner length " + std::to_string(sizes[0]) +
                             ", " + std::to_string(sizes[1]) + " and " + std::to_string(sizes[2]) + ": " + problem);
}

void check(const std::string& op, const std::string& dtype, const Pointers& pointers, const Sizes& sizes) {
    LinearCall call = call_of(pointers, sizes, 1);
    call.check_only = true;
    require(product_of(op, dtype).run(call), sizes);
}

std::size_t workspace_bytes(const std::string& op, const std::string& dtype, const Sizes& sizes, int multiprocessors) {
    return product_of(op, dtype).workspace(call_of({}, sizes, multiprocessors));
}

void run(const std::string& op, const std::string& dtype, const Pointers& pointers, const Sizes& sizes,
         int multiprocessors, Address workspace, Address stream) {
    LinearCall call = call_of(pointers, sizes, multiprocessors);
    call.workspace = pointer<void>(workspace);
    call.stream = reinterpret_cast<CUstream_st*>(stream);
    require(product_of(op, dtype).run(call), sizes);
}

}  // namespace
}  // namespace ds_kernels

PYBIND11_MODULE(_hopper, module) {
    module.def("check", &ds_kernels::check);
    module.def("workspace_bytes", &ds_kernels::workspace_bytes);
    module.def("run", &ds_kernels::run);
}
