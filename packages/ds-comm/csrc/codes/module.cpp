// Python module: codes on raw addresses. No torch headers, so one binary serves every torch version.
#include <pybind11/pybind11.h>

#include "e8_table.h"

namespace py = pybind11;

namespace ds_comm {
namespace {

using Address = std::uintptr_t;

const E8Table& table(bool best) { return best ? best_e8() : kBaseE8; }

E8Layout layout_of(std::size_t numel, std::size_t block, Address vectors) {
    return {numel, block, reinterpret_cast<const float*>(vectors)};
}

void encode(bool best, Address x, Address error, Address payload, std::size_t numel, std::size_t block,
            Address vectors) {
    const py::gil_scoped_release unlocked;
    table(best).encode(reinterpret_cast<const float*>(x), reinterpret_cast<float*>(error),
                       reinterpret_cast<std::uint8_t*>(payload), layout_of(numel, block, vectors));
}

void decode(bool best, Address out, Address payload, std::size_t numel, std::size_t block, Address vectors) {
    const py::gil_scoped_release unlocked;
    table(best).decode(reinterpret_cast<float*>(out), reinterpret_cast<const std::uint8_t*>(payload),
                       layout_of(numel, block, vectors), 1.0f);
}

void accumulate(bool best, Address out, Address payload, std::size_t numel, std::size_t block, Address vectors,
                float factor) {
    const py::gil_scoped_release unlocked;
    table(best).accumulate(reinterpret_cast<float*>(out), reinterpret_cast<const std::uint8_t*>(payload),
                           layout_of(numel, block, vectors), factor);
}

}  // namespace
}  // namespace ds_comm

PYBIND11_MODULE(_codes, module) {
    module.doc() = "Codes on raw addresses; `best`: with the kernels of this processor, not those of any.";
    module.def("e8_encode", &ds_comm::encode);
    module.def("e8_decode", &ds_comm::decode);
    module.def("e8_accumulate", &ds_comm::accumulate);
}
