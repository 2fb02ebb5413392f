// Python module: codes on raw addresses. No torch headers, so one binary serves every torch version.
#include <pybind11/pybind11.h>

#include <cstring>

#include "table.h"

namespace py = pybind11;

namespace ds_comm {
namespace {

using Address = std::uintptr_t;

const Table& table(bool is_best) { return is_best ? best() : kBase; }

const float* floats(Address at) { return reinterpret_cast<const float*>(at); }
const std::uint8_t* bytes(Address at) { return reinterpret_cast<const std::uint8_t*>(at); }

BlockLayout layout_of(std::size_t numel, std::size_t block, const std::string& name, bool float16_scales) {
    for (unsigned code = 0; code < std::size(kBlockCodes); ++code) {
        if (name == kBlockCodes[code]) return {numel, block, code, float16_scales};
    }
    throw py::value_error("there is no native code " + name);
}

void e8_encode(bool is_best, Address x, Address error, Address payload, std::size_t numel, std::size_t block,
               Address vectors) {
    const py::gil_scoped_release unlocked;
    table(is_best).e8.encode(floats(x), reinterpret_cast<float*>(error), reinterpret_cast<std::uint8_t*>(payload),
                             {numel, block, floats(vectors)});
}

void e8_decode(bool is_best, Address out, Address payload, std::size_t numel, std::size_t block, Address vectors) {
    const py::gil_scoped_release unlocked;
    table(is_best).e8.decode(reinterpret_cast<float*>(out), bytes(payload), {numel, block, floats(vectors)}, 1.0f);
}

void e8_accumulate(bool is_best, Address out, Address payload, std::size_t numel, std::size_t block, Address vectors,
                   float factor) {
    const py::gil_scoped_release unlocked;
    table(is_best).e8.accumulate(reinterpret_cast<float*>(out), bytes(payload), {numel, block, floats(vectors)},
                                 factor);
}

void block_encode(bool is_best, Address x, Address error, Address payload, std::size_t numel, std::size_t block,
                  const std::string& name, bool float16_scales) {
    const BlockLayout layout = layout_of(numel, block, name, float16_scales);
    const py::gil_scoped_release unlocked;
    table(is_best).blocks.encode(floats(x), reinterpret_cast<float*>(error), reinterpret_cast<std::uint8_t*>(payload),
                                 layout);
}

void block_decode(bool is_best, Address out, Address payload, std::size_t numel, std::size_t block,
                  const std::string& name, bool float16_scales) {
    const BlockLayout layout = layout_of(numel, block, name, float16_scales);
    const py::gil_scoped_release unlocked;
    table(is_best).blocks.decode(reinterpret_cast<float*>(out), bytes(payload), layout, 1.0f);
}

void block_accumulate(bool is_best, Address out, Address payload, std::size_t numel, std::size_t block,
                      const std::string& name, bool float16_scales, float factor) {
    const BlockLayout layout = layout_of(numel, block, name, float16_scales);
    const py::gil_scoped_release unlocked;
    table(is_best).blocks.accumulate(reinterpret_cast<float*>(out), bytes(payload), layout, factor);
}

}  // namespace
}  // namespace ds_comm

PYBIND11_MODULE(_codes, module) {
    module.doc() = "Codes on raw addresses; `is_best`: with the kernels of this processor, not those of any.";
    module.def("e8_encode", &ds_comm::e8_encode);
    module.def("e8_decode", &ds_comm::e8_decode);
    module.def("e8_accumulate", &ds_comm::e8_accumulate);
    module.def("block_encode", &ds_comm::block_encode);
    module.def("block_decode", &ds_comm::block_decode);
    module.def("block_accumulate", &ds_comm::block_accumulate);
}
