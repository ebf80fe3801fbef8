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

// The column of a row's head among those of the kRows rows that are scored together. A thread has
// columns 8 i + 2 (lane % 4) and the next, of 64 keys, and all of them belong to one row: the four
// lanes that share a key are kRows times 4 / kRows lanes. So few sums cross lanes.
template <int kRows>
__device__ __forceinline__ int column_of(int row, int head) {
  constexpr int kLanes = 4 / kRows;
  if (kRows == 1) return head;
  const int pair = head / 2 % 4;
  return 8 * (head / 8 * kRows + pair % kRows) + 2 * (row * kLanes + pair / kRows) + head % 2;
}

// The weights of the heads whose sums a thread holds: whole ones of even heads, and halves of odd
// heads (exact from 2^-125 on), for sum_own_heads().
template <int kHeads, int kRows>
struct HeadWeights {
  static constexpr int kEach = 2 * kRows;  // heads 8 i + first ... 8 i + first + kEach - 1

  float v[kHeads / 8][kEach];

  // From shared memory, [kRows][kHeads].
  __device__ __forceinline__ void load(const float* weights) {
    constexpr int kLanes = 4 / kRows;
    const int lane = lane_id() & 3;
    const float* own = weights + lane / kLanes * kHeads + lane % kLanes * kEach;
#pragma unroll
    for (int i = 0; i < kHeads / 8; ++i) {
#pragma unroll
      for (int pair = 0; pair < kRows; ++pair) {
        const float2 two = *reinterpret_cast<const float2*>(own + 8 * i + 2 * pair);
        v[i][2 * pair] = two.x;
        v[i][2 * pair + 1] = two.y / 2;
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

// Sums over the heads that a thread has, for its two keys, without their scales. `sums` are those
// of MmaSums. The order of the additions is always the same, whatever the other rows are.
//
// Odd heads have x + |x|, which is 2 ReLU(x): a multiprocessor does twice as many additions as
// maxima, and with both it does the most.
template <int kHeads, int kRows>
__device__ __forceinline__ void sum_own_heads(const float (&sums)[kRows * kHeads / 2],
                                              const HeadWeights<kHeads, kRows>& weights,
                                              float (&keys)[2]) {
  float part[2][kRows];
#pragma unroll
  for (int pair = 0; pair < kRows; ++pair) {
    float even[2] = {0, 0}, odd[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kHeads / 8; ++i) {
#pragma unroll
      for (int key = 0; key < 2; ++key) {
        const float* const two = sums + 4 * (i * kRows + pair) + 2 * key;
        even[key] = fmaf(relu(two[0]), weights.v[i][2 * pair], even[key]);
        odd[key] = fmaf(two[1] + fabsf(two[1]), weights.v[i][2 * pair + 1], odd[key]);
      }
    }
#pragma unroll
    for (int key = 0; key < 2; ++key) part[key][pair] = even[key] + odd[key];
  }
#pragma unroll
  for (int key = 0; key < 2; ++key) {
#pragma unroll
    for (int step = 1; step < kRows; step *= 2) {
#pragma unroll
      for (int pair = 0; pair < kRows; pair += 2 * step) part[key][pair] += part[key][pair + step];
    }
    keys[key] = part[key][0];
  }
}

// Sums over the heads for own_key(), without its scale, for the rows from first_own_row() on.
template <int kHeads, int kRows>
__device__ __forceinline__ void sum_heads(const float (&sums)[kRows * kHeads / 2],
                                          const HeadWeights<kHeads, kRows>& weights,
                                          float (&own)[kOwnRows<kRows>]) {
  // Two lanes have the same two keys: each gives away the key that it does not keep.
  float keys[2];
  sum_own_heads(sums, weights, keys);
  const bool upper = lane_id() & 1;
  const float mine = upper ? keys[1] : keys[0];
  const float other = __shfl_xor_sync(kFullWarp, upper ? keys[0] : keys[1], 1);
  if constexpr (kRows == 4) {  // of another row
    own[0] = upper ? other : mine;
    own[1] = upper ? mine : other;
  } else {  // of the same row
    own[0] = mine + other;
    if constexpr (kRows == 1) own[0] += __shfl_xor_sync(kFullWarp, own[0], 2);
  }
}

}  // namespace dsv4
