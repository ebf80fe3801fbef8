// Scores of 64 keys against one query: score = scale * sum over heads of weight * ReLU(q . k), by
// one warpgroup. The matrix unit gives q . k for the 64 keys and all heads; what is here turns that
// into a score a key, and brings queries to shared memory.
#pragma once

#include <cstdint>

#include "dsv4/common.cuh"
#include "dsv4/logits_params.cuh"
#include "dsv4/wgmma_e4m3.cuh"

namespace dsv4 {

constexpr int kGroupThreads = 128;  // a warpgroup: four warps, sixteen keys each

template <int kHeads>
constexpr int kQueryBytes = kHeads * kKeyBytes;

// Where chunk `chunk` (16 bytes) of row `row` (128 bytes) is kept; see mma_operand.
__device__ __forceinline__ int swizzled(int row, int chunk) {
  return row * kKeyBytes + ((chunk ^ (row & 7)) * 16);
}

// Of the 64 keys: the first of the two whose sums a thread holds (the other is 8 further), and the
// one whose score it ends up with.
__device__ __forceinline__ int low_key() {
  return (threadIdx.x % kGroupThreads) / kWarpSize * 16 + lane_id() / 4;
}
__device__ __forceinline__ int own_key() { return low_key() + (lane_id() & 1) * 8; }

// Each score is held by two lanes; this one writes it.
__device__ __forceinline__ bool writes_score() { return (lane_id() & 2) == 0; }

// A query on its way to shared memory, 16 bytes at a time; the loads are begun by fetch().
template <int kHeads, int kThreads>
struct QueryCopy {
  static constexpr int kChunks = kQueryBytes<kHeads> / 16;
  static constexpr int kTurns = (kChunks + kThreads - 1) / kThreads;
  uint4 chunks[kTurns];

  static __device__ __forceinline__ bool takes(int i) {
    return kChunks % kThreads == 0 || i < kChunks;
  }

  __device__ __forceinline__ void fetch(const uint8_t* q) {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int i = turn * kThreads + threadIdx.x;
      if (takes(i)) chunks[turn] = *reinterpret_cast<const uint4*>(q + i * 16);
    }
  }

  // `to` is a multiple of kSwizzleBytes.
  __device__ __forceinline__ void stage(uint8_t* to) const {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int i = turn * kThreads + threadIdx.x;
      if (takes(i)) *reinterpret_cast<uint4*>(to + swizzled(i / 8, i % 8)) = chunks[turn];
    }
  }
};

// Weights of the heads whose sums a thread holds, heads 8 i + 2 (lane % 4) and the next: kept in
// registers (of one row), or read from shared memory when they are needed (of several).
template <int kHeads>
class RegisterWeights {
 public:
  __device__ __forceinline__ explicit RegisterWeights(const float* weights) {
#pragma unroll
    for (int i = 0; i < kHeads / 8; ++i) {
      v_[i] = *reinterpret_cast<const float2*>(weights + 8 * i + 2 * (lane_id() & 3));
    }
  }
  __device__ __forceinline__ const RegisterWeights& row(int) const { return *this; }
  __device__ __forceinline__ float2 operator[](int i) const { return v_[i]; }

 private:
  float2 v_[kHeads / 8];
};

template <int kHeads>
class SharedWeights {
 public:
  __device__ __forceinline__ explicit SharedWeights(const float* weights)
      : own_(weights + 2 * (lane_id() & 3)) {}
  __device__ __forceinline__ SharedWeights row(int j) const {
    SharedWeights other = *this;
    other.own_ += j * kHeads;
    return other;
  }
  __device__ __forceinline__ float2 operator[](int i) const {
    return *reinterpret_cast<const float2*>(own_ + 8 * i);
  }

 private:
  const float* own_;
};

// max(x, 0), NaN where x is NaN (fmaxf would hide it).
__device__ __forceinline__ float relu(float x) {
  float r;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(r) : "f"(x));
  return r;
}

// Sum over the heads for own_key(), without its scale, of one query's columns of MmaSums. The order
// of the additions depends on nothing.
template <int kHeads, class Weights>
__device__ __forceinline__ float sum_heads(const float* sums, const Weights& weights) {
  float low[2] = {0, 0}, high[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kHeads / 8; ++i) {
    const float2 w = weights[i];
    low[0] = fmaf(relu(sums[4 * i]), w.x, low[0]);
    low[1] = fmaf(relu(sums[4 * i + 1]), w.y, low[1]);
    high[0] = fmaf(relu(sums[4 * i + 2]), w.x, high[0]);
    high[1] = fmaf(relu(sums[4 * i + 3]), w.y, high[1]);
  }
  // Four lanes share two keys: each gives away the key it does not end up with.
  const bool odd = lane_id() & 1;
  const float mine = odd ? high[0] + high[1] : low[0] + low[1];
  const float theirs = odd ? low[0] + low[1] : high[0] + high[1];
  const float pair = mine + __shfl_xor_sync(kFullWarp, theirs, 1);
  return pair + __shfl_xor_sync(kFullWarp, pair, 2);
}

}  // namespace dsv4
