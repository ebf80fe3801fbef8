// A warpgroup's ring of key blocks in shared memory: 64 keys and their scales a slot, copied
// asynchronously, in the layout that the matrix unit reads.
#pragma once

#include <cstdint>

#include "dsv4/common.cuh"
#include "dsv4/logits_params.cuh"
#include "dsv4/logits_score.cuh"
#include "dsv4/wgmma_e4m3.cuh"

namespace dsv4 {

// How the L2 treats what is copied. What is read once goes first: hundreds of megabytes of keys
// would otherwise push out what is needed next, the scores and the code of the kernels that follow
// among it.
__device__ __forceinline__ uint64_t read_once() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ uint64_t read_again() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Copies 16 bytes, past the L1.
__device__ __forceinline__ void copy_chunk(void* to, const void* from, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(
                   shared_address(to)),
               "l"(from), "l"(policy)
               : "memory");
}

__device__ __forceinline__ void copy_word(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from)
               : "memory");
}

__device__ __forceinline__ void copies_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Returns when all but the last n groups of this thread's copies have arrived.
template <int kPending>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

template <int kSlots>
struct KeyRing {
  static constexpr int kBytes = kSlots * kBlockBytes;

  uint8_t* keys;    // [kSlots][64][kKeyBytes], a multiple of kSwizzleBytes
  float* scales;    // [kSlots][64]
  uint64_t policy;  // of the L2

  // Begins the copy of the first `count` keys of a block to a slot; what is past them stays. The
  // keys are at multiples of 16 bytes, the scales of kScaleAlign.
  template <int kScaleAlign>
  __device__ __forceinline__ void copy(int32_t slot, const uint8_t* from, const float* from_scales,
                                       int32_t count = kBlockKeys) const {
    const int thread = threadIdx.x % kGroupThreads;
    // A number that the compiler takes for another in every lane. With a uniform one nvcc 13.0
    // emits LDGSTS with an address of two registers and a policy, which is an illegal instruction.
    slot = __shfl_sync(kFullWarp, slot, lane_id());
    uint8_t* to = keys + slot * kBlockScales;
#pragma unroll
    for (int turn = 0; turn < kBlockScales / 16 / kGroupThreads; ++turn) {
      const int i = turn * kGroupThreads + thread;
      if (i / 8 < count) copy_chunk(to + swizzled(i / 8, i % 8), from + i * 16, policy);
    }
    float* to_scales = scales + slot * kBlockKeys;
    if constexpr (kScaleAlign == 16) {
      if (thread * 4 < count) copy_chunk(to_scales + thread * 4, from_scales + thread * 4, policy);
    } else {
      if (thread < count) copy_word(to_scales + thread, from_scales + thread);
    }
  }

  __device__ __forceinline__ float scale(int32_t slot) const {
    return scales[slot * kBlockKeys + own_key()];
  }

  // Begins a slot's 64 keys against the queries from `query` on, as many as the columns hold.
  template <int kColumns>
  __device__ __forceinline__ void multiply(MmaSums<kColumns>& sums, int32_t slot,
                                           const uint8_t* query) const {
    const uint64_t a = mma_operand(shared_address(keys + slot * kBlockScales));
    const uint64_t b = mma_operand(shared_address(query));
    constexpr int kNext = kMmaDepth / 16;
    mma_begin();
    sums.set(a, b);
#pragma unroll
    for (int step = 1; step < kKeyBytes / kMmaDepth; ++step) {
      sums.add(a + step * kNext, b + step * kNext);
    }
    mma_commit();
  }
};

}  // namespace dsv4
