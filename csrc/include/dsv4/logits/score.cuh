// Scores of 64 keys for one or several queries: score = scale * sum over heads of weight * ReLU(q .
// k), by one warpgroup. The matrix unit gives q . k for the 64 keys and all heads. This file turns
// that into scores.
#pragma once

#include <cstdint>

#include "dsv4/common/warp.cuh"
#include "dsv4/logits/params.cuh"
#include "dsv4/logits/wgmma_e4m3.cuh"

namespace dsv4 {

constexpr int kGroupThreads = 128;  // a warpgroup: four warps, sixteen keys each
constexpr int kMmaColumns = 128;    // rows x heads per instruction

// Two of the 64 keys: the first of the two whose sums a thread holds (the other is 8 further), and
// the key whose scores the thread gets in the end.
__device__ __forceinline__ int low_key() {
  return (threadIdx.x % kGroupThreads) / kWarpSize * 16 + lane_id() / 4;
}
__device__ __forceinline__ int own_key() { return low_key() + (lane_id() & 1) * 8; }

// How many scores a thread gets when kRows rows are scored together: of row first_own_row() and the
// next. The score of a single row is in two lanes, one of which writes it.
template <int kRows>
constexpr int kOwnRows = kRows == 1 ? 1 : kRows / 2;

template <int kRows>
__device__ __forceinline__ int first_own_row() {
  return kRows == 1 ? 0 : (lane_id() >> 1 & 1) * (kRows / 2);
}
template <int kRows>
__device__ __forceinline__ bool writes_score() {
  return kRows > 1 || (lane_id() & 2) == 0;
}

// Weights of kRows rows for the heads whose sums a thread holds: 8 i + 2 (lane % 4) and the next.
template <int kHeads, int kRows>
struct HeadWeights {
  float2 v[kRows][kHeads / 8];

  // From shared memory, [kRows][kHeads].
  __device__ __forceinline__ void load(const float* weights) {
    const float* own = weights + 2 * (lane_id() & 3);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int i = 0; i < kHeads / 8; ++i) {
        v[row][i] = *reinterpret_cast<const float2*>(own + row * kHeads + 8 * i);
      }
    }
  }
};

// max(x, 0), and NaN if x is NaN (fmaxf would hide it).
__device__ __forceinline__ float relu(float x) {
  float r;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(r) : "f"(x));
  return r;
}

// Two lanes have half of a key's sums each: adds them, for the rows from first_own_row() on.
template <int kRows>
__device__ __forceinline__ void give_rows(const float (&pair)[kRows],
                                          float (&own)[kOwnRows<kRows>]) {
  const bool upper = lane_id() & 2;
  if constexpr (kRows == 1) {
    own[0] = pair[0] + __shfl_xor_sync(kFullWarp, pair[0], 2);
  } else {
    constexpr int kHalf = kRows / 2;
#pragma unroll
    for (int row = 0; row < kHalf; ++row) {
      const float mine = upper ? pair[kHalf + row] : pair[row];
      const float theirs = upper ? pair[row] : pair[kHalf + row];
      own[row] = mine + __shfl_xor_sync(kFullWarp, theirs, 2);
    }
  }
}

// Sums over the heads for own_key(), without its scale, for the rows from first_own_row() on.
// `sums` are the columns of MmaSums, row after row. The order of the additions is always the same.
template <int kHeads, int kRows>
__device__ __forceinline__ void sum_heads(const float (&sums)[kRows * kHeads / 2],
                                          const HeadWeights<kHeads, kRows>& weights,
                                          float (&own)[kOwnRows<kRows>]) {
  // Four lanes share two keys: each gives away the key that it does not keep ...
  const bool odd = lane_id() & 1;
  float pair[kRows];
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    float low[2] = {0, 0}, high[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kHeads / 8; ++i) {
      const float2 w = weights.v[row][i];
      const float* const four = sums + row * (kHeads / 2) + 4 * i;
      low[0] = fmaf(relu(four[0]), w.x, low[0]);
      low[1] = fmaf(relu(four[1]), w.y, low[1]);
      high[0] = fmaf(relu(four[2]), w.x, high[0]);
      high[1] = fmaf(relu(four[3]), w.y, high[1]);
    }
    const float mine = odd ? high[0] + high[1] : low[0] + low[1];
    const float theirs = odd ? low[0] + low[1] : high[0] + high[1];
    pair[row] = mine + __shfl_xor_sync(kFullWarp, theirs, 1);
  }
  // ... and then the rows.
  give_rows<kRows>(pair, own);
}

}  // namespace dsv4
