// Index logits over gathered keys (prefill): row r scores keys row_starts[r] ... row_ends[r] - 1,
// and column j of its output is key row_starts[r] + j. A missing key scores -inf.
//
// A CTA keeps a tile of keys in shared memory and works through a chunk of rows. Each of its
// warpgroups takes a few rows at a time, as many as an instruction has columns for. It keeps their
// weights in registers and goes through the tile's blocks of 64 keys. Four warpgroups share a
// multiprocessor, in one CTA or in two. While a warpgroup turns sums into scores or waits for
// queries, the matrix unit works for the others.
#pragma once

#include <cstdint>

#include "dsv4/logits/key_ring.cuh"
#include "dsv4/logits/params.cuh"
#include "dsv4/logits/score.cuh"

namespace dsv4 {

constexpr int kMostChunkRows = 32;  // one per lane
constexpr int kLeastChunkRows = 8;

// kGroups is 4, or 2 for calls with too few tiles of the larger size.
template <int kHeads_, int kGroups_>
struct TileConfig {
  static constexpr int kHeads = kHeads_, kGroups = kGroups_;
  static constexpr int kThreads = kGroups * kGroupThreads;
  static constexpr int kCtas = 4 / kGroups;  // per multiprocessor
  static constexpr int kBlocks = 4 * kGroups;
  static constexpr int kKeys = kBlocks * kBlockKeys;
  static constexpr int kRows = kMmaColumns / kHeads;
};

template <class Config>
struct TileShared {
  using Rows = RowSet<Config::kHeads, Config::kRows>;
  using Keys = KeyRing<Config::kBlocks>;
  static constexpr int kBytes = Config::kGroups * Rows::kBytes + Keys::kBytes;

  Rows rows;  // of this warpgroup
  Keys keys;

  __device__ __forceinline__ TileShared(uint8_t* memory, int32_t group) {
    constexpr int kQueries = Config::kRows * Rows::kQueryBytes;
    rows.queries = memory + group * kQueries;
    keys.keys = memory + Config::kGroups * kQueries;
    keys.scales = reinterpret_cast<float*>(keys.keys + Config::kBlocks * kBlockValues);
    rows.weights =
        keys.scales + Config::kBlocks * kBlockKeys + group * Config::kRows * Config::kHeads;
  }
};

// A barrier for the threads of a warpgroup.
__device__ __forceinline__ void group_sync(int32_t group) {
  asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(kGroupThreads) : "memory");
}

// Writes -inf where a column of the chunk's rows has no key. A lane has the window of a row.
template <class Out>
__device__ __forceinline__ void write_missing(const RaggedLogitsParams& p, const KeyWindow& window,
                                              int32_t row0) {
  uint32_t rows = __ballot_sync(kFullWarp, !window.whole());
  for (int32_t n = 0; rows != 0; rows &= rows - 1, ++n) {
    const int lane = __ffs(rows) - 1;
    const KeyWindow row = window.of(lane);
    const int32_t columns = __shfl_sync(kFullWarp, window.columns, lane);
    if (n % (blockDim.x / kWarpSize) != warp_id()) continue;
    Out* out = static_cast<Out*>(p.output.out) + (row0 + lane) * p.output.stride;
    for (int32_t j = lane_id(); j < columns; j += kWarpSize) {
      if (j < -row.start || j >= row.end - row.start) round_to(-INFINITY, out + j);
    }
  }
}

// grid: for each tile of keys, the chunks of `chunk` rows. So CTAs that run side by side have the
// same keys.
template <class Out, class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtas)
    ragged_logits_kernel(const __grid_constant__ RaggedLogitsParams p, int32_t chunk) {
  constexpr int kRows = Config::kRows, kOwn = kOwnRows<kRows>;
  extern __shared__ __align__(kSwizzleBytes) uint8_t memory[];
  // The shuffle tells the compiler that all lanes of a warp are in one group.
  const int32_t group = __shfl_sync(kFullWarp, threadIdx.x / kGroupThreads, 0);
  const TileShared<Config> shared(memory, group);
  const uint32_t chunks = (p.rows + chunk - 1) / chunk, tile = blockIdx.x / chunks;
  const int32_t row0 = (blockIdx.x - tile * chunks) * chunk;
  const int32_t key0 = tile * Config::kKeys;
  pdl_wait();
  pdl_launch_dependents();

  // Every warp finds out itself which rows need keys of this tile; a lane has the window of a row.
  KeyWindow window;
  if (lane_id() < chunk && row0 + lane_id() < p.rows) {
    window = KeyWindow(p.keys, row0 + lane_id(), p.output.columns);
  }
  if (tile == 0) write_missing<Out>(p, window, row0);
  const bool wants =
      window.start < window.end && window.start < key0 + Config::kKeys && window.end > key0;
  const uint32_t wanted = __ballot_sync(kFullWarp, wants);
  if (wanted == 0) return;

  for (int32_t b = group; b < Config::kBlocks; b += Config::kGroups) {
    const int32_t key = key0 + b * kBlockKeys, left = p.keys.keys - key;
    if (left <= 0) break;
    shared.keys.template copy<4>(b, p.keys.k + int64_t{key} * kKeyBytes, p.keys.k_scale + key,
                                 left < kBlockKeys ? left : kBlockKeys);
  }
  copies_commit();

  // Rows j ... j + kRows - 1 of the chunk are the next that this group must score.
  const auto next = [&](int32_t j) {
    while (j < chunk && (wanted >> j & ((1u << kRows) - 1)) == 0) j += Config::kGroups * kRows;
    return j;
  };
  const auto copy_rows = [&](int32_t j) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int32_t row = row0 + j + r;
      if (row >= p.rows) continue;
      shared.rows.copy(r, p.queries.row(row, 0), p.queries.weights_of(row));
    }
    copies_commit();
  };
  int32_t j = next(group * kRows);
  if (j < chunk) copy_rows(j);
  copies_wait<0>();
  mma_shared_fence();
  __syncthreads();
  while (j < chunk) {
    HeadWeights<Config::kHeads, kRows> weights;
    weights.load(shared.rows.weights);
    int32_t from = INT32_MAX, to = 0;  // the keys that at least one of the rows needs
    int32_t start[kOwn];
    uint32_t length[kOwn];
    Out* out[kOwn];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const KeyWindow row = window.of(j + r);
      if (row.start < row.end) {
        from = row.start < from ? row.start : from;
        to = row.end > to ? row.end : to;
      }
#pragma unroll
      for (int o = 0; o < kOwn; ++o) {
        if (r != first_own_row<kRows>() + o) continue;
        start[o] = row.start - own_key();
        length[o] = row.end - row.start;
        out[o] = static_cast<Out*>(p.output.out) + (row0 + j + r) * p.output.stride - start[o];
      }
    }
    int32_t block = from > key0 ? (from - key0) / kBlockKeys : 0;
    const int32_t last =
        to < key0 + Config::kKeys ? ceil_div(to - key0, kBlockKeys) : Config::kBlocks;
    for (; block < last; ++block) {
      MmaSums<kMmaColumns> sums;
      shared.keys.multiply(sums, block, shared.rows.queries);
      const float scale = shared.keys.scale(block);
      const int32_t key = key0 + block * kBlockKeys;
      mma_wait<0>();
      pin(sums.v);
      float score[kOwn];
      sum_heads<Config::kHeads, kRows>(sums.v, weights, score);
#pragma unroll
      for (int o = 0; o < kOwn; ++o) {
        if (static_cast<uint32_t>(key) - static_cast<uint32_t>(start[o]) < length[o]) {
          round_to(score[o] * scale, out[o] + key);
        }
      }
    }
    j = next(j + Config::kGroups * kRows);
    if (j >= chunk) break;
    group_sync(group);  // all threads have read the old queries
    copy_rows(j);
    copies_wait<0>();
    mma_shared_fence();
    group_sync(group);
  }
}

}  // namespace dsv4
