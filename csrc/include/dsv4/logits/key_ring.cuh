// The operands of the matrix unit in shared memory, in its layout: queries, and a ring of key
// blocks with 64 keys and their scales per slot. A warpgroup copies them asynchronously.
#pragma once

#include <cstdint>

#include "dsv4/common/async_copy.cuh"
#include "dsv4/common/warp.cuh"
#include "dsv4/logits/params.cuh"
#include "dsv4/logits/score.cuh"
#include "dsv4/logits/wgmma_e4m3.cuh"

namespace dsv4 {

// Where chunk `chunk` (16 bytes) of row `row` (128 bytes) is stored; see mma_operand.
__device__ __forceinline__ int swizzled(int row, int chunk) {
  return row * kKeyBytes + ((chunk ^ (row & 7)) * 16);
}

// Begins the copy of the first `count` of `kRows` rows of 128 bytes; later rows stay unchanged.
template <int kRows>
__device__ __forceinline__ void copy_rows(uint8_t* to, const uint8_t* from, int count = kRows) {
  const int thread = threadIdx.x % kGroupThreads;
#pragma unroll
  for (int turn = 0; turn < kRows * kKeyBytes / 16 / kGroupThreads; ++turn) {
    const int i = turn * kGroupThreads + thread;
    if (i / 8 < count) copy_chunk(to + swizzled(i / 8, i % 8), from + i * 16);
  }
}

// Begins 64 keys times queries, as many as the columns hold, by their mma_operand_lower().
template <int kColumns>
__device__ __forceinline__ void multiply_keys(MmaSums<kColumns>& sums, uint32_t keys,
                                              uint32_t queries) {
  constexpr int kNext = kMmaDepth / 16;
  mma_begin();
  sums.set(kMmaOperandUpper | keys, kMmaOperandUpper | queries);
#pragma unroll
  for (int step = 1; step < kKeyBytes / kMmaDepth; ++step) {
    sums.add(kMmaOperandUpper | (keys + step * kNext), kMmaOperandUpper | (queries + step * kNext));
  }
  mma_commit();
}

// Queries and weights of kRows rows that are scored together.
template <int kHeads, int kRows>
struct RowSet {
  static constexpr int kQueryBytes = kHeads * kKeyBytes;
  static constexpr int kBytes = kRows * (kQueryBytes + kHeads * 4);

  uint8_t* queries;  // [kRows * kHeads][kKeyBytes] by column_of, a multiple of kSwizzleBytes
  float* weights;    // [kRows][kHeads]

  // Begins the copy of one row.
  __device__ __forceinline__ void copy(int row, const uint8_t* query,
                                       const uint8_t* from_weights) const {
    const int thread = threadIdx.x % kGroupThreads;
#pragma unroll
    for (int turn = 0; turn < kQueryBytes / 16 / kGroupThreads; ++turn) {
      const int i = turn * kGroupThreads + thread;
      copy_chunk(queries + swizzled(column_of<kRows>(row, i / 8), i % 8), query + i * 16);
    }
    if (thread < kHeads) copy_word(weights + row * kHeads + thread, from_weights + thread * 4);
  }
};

template <int kSlots>
struct KeyRing {
  static constexpr int kBytes = kSlots * kBlockBytes;

  uint8_t* keys;  // [kSlots][64][kKeyBytes], a multiple of kSwizzleBytes
  float* scales;  // [kSlots][64]

  // Begins the copy of kKeys keys to a slot, from its key `at` on. Only the first `count` are
  // copied; the rest of the slot stays unchanged. Keys are aligned to 16 bytes, scales to
  // kScaleAlign.
  template <int kScaleAlign, int kKeys = kBlockKeys>
  __device__ __forceinline__ void copy(int32_t slot, const uint8_t* from, const float* from_scales,
                                       int32_t count = kKeys, int32_t at = 0) const {
    static_assert(kKeys % 8 == 0, "the swizzle goes by eight keys");
    const int thread = threadIdx.x % kGroupThreads;
    copy_rows<kKeys>(keys + slot * kBlockValues + at * kKeyBytes, from, count);
    float* to_scales = scales + slot * kBlockKeys + at;
    if constexpr (kScaleAlign == 16) {
      if (thread * 4 < count) copy_chunk(to_scales + thread * 4, from_scales + thread * 4);
    } else {
      if (thread < count) copy_word(to_scales + thread, from_scales + thread);
    }
  }

  __device__ __forceinline__ float scale(int32_t slot) const {
    return scales[slot * kBlockKeys + own_key()];
  }

  // Begins a slot's 64 keys times the queries from `query` on, as many as the columns hold.
  template <int kColumns>
  __device__ __forceinline__ void multiply(MmaSums<kColumns>& sums, int32_t slot,
                                           const uint8_t* query) const {
    multiply_keys(sums, mma_operand_lower(shared_address(keys + slot * kBlockValues)),
                  mma_operand_lower(shared_address(query)));
  }
};

}  // namespace dsv4
