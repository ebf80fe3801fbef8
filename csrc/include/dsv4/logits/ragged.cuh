// Index logits over gathered keys (prefill): row r scores keys row_starts[r] ... row_ends[r] - 1,
// and column j of its output is key row_starts[r] + j. A missing key scores -inf.
//
// A CTA keeps a tile of keys in shared memory and works through a chunk of rows. Each of its
// warpgroups takes a few rows at a time, as many as an instruction has columns for. It keeps their
// weights in registers and goes through the tile's blocks of 64 keys. Four warpgroups share a
// multiprocessor, in one CTA or in two. While a warpgroup turns sums into scores or waits for
// queries, the matrix unit works for the others. The next queries are on their way while the sums
// of the last block become scores.
//
// The instructions of the sums limit the rate (docs/notes/logits.md). So a turn of the loop over
// blocks has two blocks, and a thread has one row.
#pragma once

#include <cstdint>

#include "dsv4/logits/key_ring.cuh"
#include "dsv4/logits/params.cuh"
#include "dsv4/logits/score.cuh"

namespace dsv4 {

constexpr int kMostChunkRows = 64;
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

// Keys first ... last - 1 of the gathered keys, or none.
struct KeySpan {
  int32_t first;
  int32_t last;
};

template <class Config>
struct TileShared {
  using Rows = RowSet<Config::kHeads, Config::kRows>;
  using Keys = KeyRing<Config::kBlocks>;
  static constexpr int kBytes =
      Config::kGroups * Rows::kBytes + Keys::kBytes + kMostChunkRows * sizeof(KeySpan);

  Rows rows;  // of this warpgroup
  Keys keys;
  KeySpan* windows;  // [kMostChunkRows]; empty if a row needs no key of the tile

  __device__ __forceinline__ TileShared(uint8_t* memory, int32_t group) {
    constexpr int kQueries = Config::kRows * Rows::kQueryBytes;
    constexpr int kWeights = Config::kRows * Config::kHeads;
    rows.queries = memory + group * kQueries;
    keys.keys = memory + Config::kGroups * kQueries;
    keys.scales = reinterpret_cast<float*>(keys.keys + Config::kBlocks * kBlockValues);
    float* const weights = keys.scales + Config::kBlocks * kBlockKeys;
    rows.weights = weights + group * kWeights;
    windows = reinterpret_cast<KeySpan*>(weights + Config::kGroups * kWeights);
  }
};

// A barrier for the threads of a warpgroup.
__device__ __forceinline__ void group_sync(int32_t group) {
  asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(kGroupThreads) : "memory");
}

// Writes -inf where a column of rows from `row0` on has no key. A lane has the window of a row.
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
    for (int32_t j = lane_id(); j < -row.start; j += kWarpSize) round_to(-INFINITY, out + j);
    for (int32_t j = row.end - row.start + lane_id(); j < columns; j += kWarpSize) {
      round_to(-INFINITY, out + j);
    }
  }
}

// grid: for each tile of keys, the chunks of `chunk` rows. So CTAs that run side by side have the
// same keys.
template <class Out, class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtas)
    ragged_logits_kernel(const __grid_constant__ RaggedLogitsParams p, int32_t chunk) {
  constexpr int kRows = Config::kRows, kLanes = 4 / kRows;
  constexpr int kStride = Config::kGroups * kRows;  // rows that the warpgroups take at a time
  constexpr int kOwn = kLanes == 1 ? 2 : 1;         // keys of a block that a thread scores
  constexpr int kNextBlock = kBlockValues / 16;     // from operand to operand
  extern __shared__ __align__(kSwizzleBytes) uint8_t memory[];
  // The shuffle tells the compiler that all lanes of a warp are in one group.
  const int32_t group = __shfl_sync(kFullWarp, threadIdx.x / kGroupThreads, 0);
  const TileShared<Config> shared(memory, group);
  const uint32_t chunks = (p.rows + chunk - 1) / chunk, tile = blockIdx.x / chunks;
  const int32_t row0 = (blockIdx.x - tile * chunks) * chunk;
  const int32_t count = min(chunk, p.rows - row0);
  const int32_t key0 = tile * Config::kKeys;
  pdl_wait();
  pdl_launch_dependents();

  // Every warp finds out itself which rows need keys of this tile; a lane has the window of a row.
  uint64_t wanted = 0;
  for (int32_t first = 0; first < count; first += kWarpSize) {
    const int32_t at = first + lane_id();
    KeyWindow window;
    if (at < count) window = KeyWindow(p.keys, row0 + at, p.output.columns);
    if (tile == 0) write_missing<Out>(p, window, row0 + first);
    const bool wants =
        window.start < window.end && window.start < key0 + Config::kKeys && window.end > key0;
    wanted |= uint64_t{__ballot_sync(kFullWarp, wants)} << first;
    if (warp_id() == 0) shared.windows[at] = wants ? KeySpan{window.start, window.end} : KeySpan{};
  }
  if (wanted == 0) return;

  for (int32_t b = group; b < Config::kBlocks; b += Config::kGroups) {
    const int32_t key = key0 + b * kBlockKeys, left = p.keys.keys - key;
    if (left <= 0) break;
    shared.keys.template copy<4>(b, p.keys.k + int64_t{key} * kKeyBytes, p.keys.k_scale + key,
                                 left < kBlockKeys ? left : kBlockKeys);
  }
  copies_commit();

  // Rows j ... j + kRows - 1 of the chunk are the next that this group must score, from j on.
  const auto next = [&](int32_t j) {
    constexpr uint64_t kTogether = (1u << kRows) - 1;
    while (j < count && (wanted >> j & kTogether) == 0) j += kStride;
    return j;
  };
  const auto copy_rows = [&](int32_t j) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int32_t row = row0 + j + r;
      if (row >= p.rows) break;
      shared.rows.copy(r, p.queries.row(row, 0), p.queries.weights_of(row));
    }
    copies_commit();
  };
  int32_t j = next(group * kRows);
  if (j < count) copy_rows(j);
  copies_wait<0>();
  mma_shared_fence();
  __syncthreads();

  // The reductions tell the compiler that all lanes of a warp have the same number.
  const uint32_t tile_keys =
      __reduce_max_sync(kFullWarp, mma_operand_lower(shared_address(shared.keys.keys)));
  const uint32_t queries =
      __reduce_max_sync(kFullWarp, mma_operand_lower(shared_address(shared.rows.queries)));
  const int32_t own_row = (lane_id() & 3) / kLanes;             // of kRows
  const int32_t first_key = kOwn == 2 ? low_key() : own_key();  // the next is 8 further
  while (j < count) {
    HeadWeights<Config::kHeads, kRows> weights;
    weights.load(shared.rows.weights);

    // The blocks that at least one of the rows needs.
    const KeySpan window = shared.windows[j + own_row];
    const bool empty = window.first >= window.last;
    const int32_t from = __reduce_min_sync(kFullWarp, empty ? INT32_MAX : window.first) - key0;
    const int32_t to = __reduce_max_sync(kFullWarp, window.last) - key0;
    int32_t block = from > 0 ? from / kBlockKeys : 0;
    const int32_t last = to < Config::kKeys ? ceil_div(to, kBlockKeys) : Config::kBlocks;
    // If their number is odd, the first turn has only the second of its two.
    bool odd = (last - block) & 1;
    if (odd) --block;

    const uint32_t length = window.last - window.first;
    uint32_t column = key0 + block * kBlockKeys + first_key - window.first;
    Out* out = static_cast<Out*>(p.output.out) + (row0 + j + own_row) * p.output.stride +
               static_cast<int32_t>(column);
    hold(out);
    const float* scales = shared.keys.scales + block * kBlockKeys + first_key;
    uint32_t keys = tile_keys + block * kNextBlock;
    j = next(j + kStride);
    const auto score_block = [&](int i) {
      MmaSums<kMmaColumns> sums;
      multiply_keys(sums, keys + i * kNextBlock, queries);
      float scale[kOwn];
#pragma unroll
      for (int o = 0; o < kOwn; ++o) scale[o] = scales[i * kBlockKeys + 8 * o];
      mma_wait<0>();
      pin(sums.v);
      if (i == 1 && block >= last && j < count) {
        group_sync(group);  // all threads have read the old queries
        copy_rows(j);
      }
      float score[kOwn];
      if constexpr (kOwn == 2) {
        sum_own_heads(sums.v, weights, score);
      } else {
        sum_heads(sums.v, weights, score);
      }
#pragma unroll
      for (int o = 0; o < kOwn; ++o) {
        const int32_t at = i * kBlockKeys + 8 * o;
        if (column + at < length) round_to(score[o] * scale[o], out + at);
      }
    };
#pragma unroll 1
    do {
      block += 2;
      if (!odd) score_block(0);
      odd = false;
      score_block(1);
      column += 2 * kBlockKeys;
      out += 2 * kBlockKeys;
      scales += 2 * kBlockKeys;
      keys += 2 * kNextBlock;
    } while (block < last);
    if (j >= count) break;
    copies_wait<0>();
    mma_shared_fence();
    group_sync(group);
  }
}

}  // namespace dsv4
