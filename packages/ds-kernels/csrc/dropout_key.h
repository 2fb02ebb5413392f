// How Python gives the key of a dropout.
#pragma once

#include <cstdint>
#include <tuple>

#include "dropout_table.h"

namespace ds_kernels {

using KeyNumbers = std::tuple<std::uint64_t, std::uint32_t, double>;  // seed, threshold, scale

inline DropoutKey key_of(const KeyNumbers& numbers) {
    const auto [seed, threshold, scale] = numbers;
    return {seed, threshold, static_cast<float>(scale)};
}

}  // namespace ds_kernels
