// Tiles of 128 columns, in which a block of 256 threads goes down its slab of rows, 8 at a time.
//
// What a row of threads needs of the columns (a bias) is read once; sums over the slab are kept in registers, then added
// up over the 8 rows in shared memory. The few rows of slabs are added up by the caller. All sums have a fixed order.
#pragma once

#include "packet.cuh"

namespace ds_kernels {

constexpr int kTileThreads = 32;  // across: one packet each
constexpr int kTileRows = 8;

// Where a thread stands in its tile.
struct TilePlace {
    unsigned across, down;
    Size column;
    int left;  // columns of the packet that there are
    Size begin, end;  // rows of the slab

    __device__ TilePlace(Size rows, Size columns, Size slab)
        : across(threadIdx.x % kTileThreads),
          down(threadIdx.x / kTileThreads),
          column((Size(blockIdx.x) * kTileThreads + across) * kPacket),
          left(column >= columns ? 0 : columns - column < kPacket ? int(columns - column) : kPacket),
          begin(blockIdx.y * slab),
          end(begin + slab < rows ? begin + slab : rows) {}
};

// Writes the sums of the block's 8 rows of threads to out[0 ... left). For all threads of a block.
__device__ inline void add_tile_rows(const TilePlace& place, const Packet& sum, float* out) {
    __shared__ float sums[kTileRows][kTileThreads * kPacket];
    __syncthreads();  // what was here before has been read
#pragma unroll
    for (int k = 0; k < kPacket; ++k) sums[place.down][place.across * kPacket + k] = sum.at[k];
    __syncthreads();
    for (int apart = kTileRows / 2; apart > 0; apart /= 2) {
        if (int(place.down) < apart) {
#pragma unroll
            for (int k = 0; k < kPacket; ++k) {
                sums[place.down][place.across * kPacket + k] += sums[place.down + apart][place.across * kPacket + k];
            }
        }
        __syncthreads();
    }
    if (place.down == 0) {
        for (int k = 0; k < place.left; ++k) out[k] = sums[0][place.across * kPacket + k];
    }
}

}  // namespace ds_kernels
