// Runs a kernel over blocks of rows and adds up what it sums over them. See [Note: Column sums] in row_blocks.h.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "row_blocks.h"

namespace ds_kernels {

// Calls block(begin, end, sums) for all blocks of rows; sums has `columns` numbers for each of `outs`. Then rounds the
// totals into `outs`, arrays of one format.
template <class Block>
void sum_columns(const Kernels& kernels, std::size_t rows, std::size_t columns, int threads,
                 const std::vector<void*>& outs, int format, const Block& block) {
    // Whole cache lines: an access across two costs twice.
    constexpr std::size_t kLine = 64, kPerLine = kLine / sizeof(float);
    const std::size_t width = (columns * outs.size() + kPerLine - 1) / kPerLine * kPerLine;
    // No rows: one block without any, whose sums are zeros.
    const std::size_t count = std::max<std::size_t>(1, (rows + kRowBlock - 1) / kRowBlock);
    const auto release = [](float* memory) { ::operator delete(memory, std::align_val_t(kLine)); };
    const std::unique_ptr<float, decltype(release)> sums(
        static_cast<float*>(::operator new(count * width * sizeof(float), std::align_val_t(kLine))), release);
    for_slices(count, kRowBlock * columns, threads, [&](std::size_t first, std::size_t last) {
        for (std::size_t i = first; i < last; ++i) {
            block(i * kRowBlock, std::min(rows, (i + 1) * kRowBlock), sums.get() + i * width);
        }
    });
    const TreeSumKernel add = kernels.table.reductions.tree_sum[0][format];
    for (std::size_t which = 0; which < outs.size(); ++which) {
        std::vector<const void*> pieces;
        for (std::size_t i = 0; i < count; ++i) {
            pieces.push_back(sums.get() + i * width + which * columns);
        }
        for_slices(columns, 1, threads, [&](std::size_t begin, std::size_t end) {
            add(outs[which], pieces.data(), pieces.size(), begin, end);
        });
    }
}

}  // namespace ds_kernels
