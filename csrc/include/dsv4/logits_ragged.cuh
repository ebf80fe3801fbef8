// Index logits over gathered keys (prefill): row r scores keys row_starts[r] ... row_ends[r] - 1,
// and column j of its output is key row_starts[r] + j.
//
// A CTA has a tile of sixteen rows' queries in shared memory and a run of blocks of 64 keys. Its
// four warpgroups take the blocks in turn, so that a key is read once a tile; while one of them
// turns sums into scores, the matrix unit works for the others.
#pragma once

#include <cstdint>

#include "dsv4/logits_params.cuh"
#include "dsv4/logits_ring.cuh"
#include "dsv4/logits_score.cuh"

namespace dsv4 {

constexpr int kTileRows = 16;
constexpr int kTileGroups = 4;
constexpr int kTileThreads = kTileGroups * kGroupThreads;

using TileRing = KeyRing<2>;

template <int kHeads>
struct TileShared {
  static constexpr int kBytes =
      kTileRows * (kQueryBytes<kHeads> + kHeads * 4 + 2 * 8) + kTileGroups * TileRing::kBytes;

  uint8_t* queries;  // [kTileRows][kQueryBytes]
  TileRing ring;     // of this warpgroup
  float* weights;    // [kTileRows][kHeads]
  int64_t* origins;  // [kTileRows], where key 0 would be in the output, from the tile's first row
  int32_t* starts;   // [kTileRows]
  int32_t* lengths;  // [kTileRows]

  __device__ __forceinline__ TileShared(uint8_t* memory, int32_t group) : queries(memory) {
    uint8_t* keys = queries + kTileRows * kQueryBytes<kHeads>;
    float* scales = reinterpret_cast<float*>(keys + kTileGroups * 2 * kBlockScales);
    ring = {keys + group * 2 * kBlockScales, scales + group * 2 * kBlockKeys};
    weights = scales + kTileGroups * 2 * kBlockKeys;
    origins = reinterpret_cast<int64_t*>(weights + kTileRows * kHeads);
    starts = reinterpret_cast<int32_t*>(origins + kTileRows);
    lengths = starts + kTileRows;
  }

  __device__ __forceinline__ const uint8_t* query(int32_t row) const {
    return queries + row * kQueryBytes<kHeads>;
  }
};

// The threads of a warpgroup meet.
__device__ __forceinline__ void group_sync(int32_t group) {
  asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(kGroupThreads) : "memory");
}

// Keys [start, start + length) of a row.
struct KeyWindow {
  int32_t start;
  int32_t length;

  __device__ __forceinline__ KeyWindow(const RaggedLogitsParams& p, int32_t row) {
    const int64_t begin = p.row_starts[row * p.row_start_stride];
    int64_t end = p.row_ends[row * p.row_end_stride];
    end = end > p.keys ? p.keys : end;
    int64_t count = begin < 0 ? 0 : end - begin;
    count = count < 0 ? 0 : count > p.output.columns ? p.output.columns : count;
    start = count == 0 ? 0 : static_cast<int32_t>(begin);
    length = static_cast<int32_t>(count);
  }
};

// grid: (tiles of rows, runs of `run` blocks): tiles that run side by side read the same keys.
template <class Out, int kHeads>
__global__ void __launch_bounds__(kTileThreads, 1)
    ragged_logits_kernel(const __grid_constant__ RaggedLogitsParams p, int32_t run) {
  extern __shared__ __align__(kSwizzleBytes) uint8_t memory[];
  // The shuffle tells the compiler that a warp is of one group.
  const int32_t group = __shfl_sync(kFullWarp, threadIdx.x / kGroupThreads, 0);
  const TileShared<kHeads> shared(memory, group);
  const int32_t row0 = blockIdx.x * kTileRows;
  const int32_t rows = p.rows - row0 < kTileRows ? p.rows - row0 : kTileRows;
  pdl_wait();
  pdl_launch_dependents();

  // The blocks that any row of the tile wants of this run, and the keys that every row wants; every
  // warp finds out for itself.
  KeyWindow window{p, row0 + (lane_id() < rows ? lane_id() : 0)};
  if (lane_id() >= rows) window.length = 0;
  const bool wants = window.length > 0;
  const int32_t end = window.start + window.length;
  int32_t first = __reduce_min_sync(kFullWarp, wants ? window.start / kBlockKeys : INT32_MAX);
  int32_t last = __reduce_max_sync(kFullWarp, wants ? (end - 1) / kBlockKeys + 1 : 0);
  const bool present = lane_id() < rows;
  const int32_t all_from = __reduce_max_sync(kFullWarp, present ? window.start : 0);
  const int32_t all_to = __reduce_min_sync(kFullWarp, present ? end : INT32_MAX);
  const int32_t run_first = blockIdx.y * run;
  first = first < run_first ? run_first : first;
  last = last > run_first + run ? run_first + run : last;
  if (first >= last) return;

  if (threadIdx.x < kTileRows) {
    shared.starts[threadIdx.x] = window.start;
    shared.lengths[threadIdx.x] = window.length;
    shared.origins[threadIdx.x] = int64_t{threadIdx.x} * p.output.stride - window.start;
  }
  for (int32_t j = 0; j < rows; ++j) {
    QueryCopy<kHeads, kTileThreads> copy;
    copy.fetch(p.queries.row(row0 + j, 0));
    copy.stage(shared.queries + j * kQueryBytes<kHeads>);
  }
  for (int32_t i = threadIdx.x; i < rows * kHeads; i += kTileThreads) {
    shared.weights[i] =
        p.queries.weights[(row0 + i / kHeads) * p.queries.weight_stride + i % kHeads];
  }
  mma_shared_fence();
  __syncthreads();
  int32_t block = first + group;
  if (block >= last) return;

  Out* out = static_cast<Out*>(p.output.out) + row0 * p.output.stride;
  const auto begin_copy = [&](int32_t which, int32_t slot) {
    const int32_t key = which * kBlockKeys, left = p.keys - key;
    shared.ring.template copy<4>(slot, p.k + int64_t{key} * kKeyBytes, p.k_scale + key,
                                 left < kBlockKeys ? left : kBlockKeys);
    copies_commit();
  };
  const auto arrive = [&] {
    copies_wait<0>();
    mma_shared_fence();
    group_sync(group);
  };
  // Rows scored at a time: an instruction's 128 columns. Those of the tile that the call does not
  // have are scored for nobody.
  constexpr int kRows = 128 / kHeads;
  int32_t slot = 0;
  begin_copy(block, slot);
  for (; block < last; block += kTileGroups) {
    arrive();
    if (block + kTileGroups < last) begin_copy(block + kTileGroups, slot ^ 1);
    const int32_t key = block * kBlockKeys + own_key();
    const float scale = shared.ring.scale(slot);
    // Most blocks lie inside every row's window.
    const bool inside = block * kBlockKeys >= all_from && (block + 1) * kBlockKeys <= all_to;
    for (int32_t j = 0; j < rows; j += kRows) {
      MmaSums<128> sums;
      shared.ring.multiply(sums, slot, shared.query(j));
      mma_wait<0>();
      pin(sums.v);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int32_t row = j + r;
        const float sum = sum_heads<kHeads>(sums.v + r * (kHeads / 2),
                                            SharedWeights<kHeads>(shared.weights + row * kHeads));
        bool writes = writes_score() && row < rows;
        if (!inside) {
          const int32_t column = key - shared.starts[row];
          writes &= column >= 0 && column < shared.lengths[row];
        }
        if (writes) round_to(sum * scale, out + shared.origins[row] + key);
      }
    }
    slot ^= 1;
  }
}

}  // namespace dsv4
