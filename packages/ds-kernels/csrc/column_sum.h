// Sums over the rows of a block, tile by tile of columns: what one thread does of a column sum.
//
// See [Note: Column sums] in row_blocks.h. Include only from isa_*.cpp, behind the target pragma; see float_format.h.
#pragma once

#include <cstddef>

namespace {

// Floats: the sums of a tile stay in the first-level cache. Most rows are one tile: they are read as they lie.
constexpr std::size_t kColumnTile = 4096;

// Calls add(row, column, width, sums) for each row and each tile of columns: it adds that row's numbers to
// sums[0 ... width), with several `parts` to that many columns further on, too. What they add up to is left in `out`.
template <std::size_t parts = 1, class Add>
inline void sum_block(std::size_t begin, std::size_t end, std::size_t columns, float* out, const Add& add) {
    for (std::size_t column = 0; column < columns; column += kColumnTile) {
        const std::size_t width = columns - column < kColumnTile ? columns - column : kColumnTile;
        for (std::size_t part = 0; part < parts; ++part) {
            for (std::size_t i = 0; i < width; ++i) out[part * columns + column + i] = 0.0f;
        }
        for (std::size_t row = begin; row < end; ++row) add(row, column, width, out + column);
    }
}

}  // namespace
