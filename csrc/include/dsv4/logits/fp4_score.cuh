// Scores of FP4 keys. A warp decodes its own sixteen keys of a block in registers, into which they
// were loaded two blocks ahead. So the warps of a CTA wait for each other only at the matrix
// instruction. The other CTAs of the multiprocessor hide that wait.
//
// The scores are those of SGLang. A dot product is rounded to bfloat16 before ReLU, its product
// with the weight to bfloat16, and the sum of the heads to bfloat16 at the end. Dot products are
// exact in float32, whatever the order in which the matrix unit adds, as long as the products of
// key scale and query scale are less than 2^9 apart.
#pragma once

#include <cstdint>

#include "dsv4/logits/fp4_keys.cuh"
#include "dsv4/logits/score.cuh"

namespace dsv4 {

// (ReLU(a), ReLU(b)), NaN if a number is NaN; `a` is in the low half.
__device__ __forceinline__ uint32_t relu_bf16x2(float a, float b) {
  uint32_t r;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
  return r;
}

// The sum over a row's eight heads that this thread has, for the low key (kKey 0) or the other key.
// `sums` belong to the row; `weights` are those of heads 8 i + 2 (lane % 4) and the next.
template <int kKey>
__device__ __forceinline__ float sum_products(const float* sums, const uint32_t (&weights)[4]) {
  float even = 0, odd = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t two = multiply_bf16x2(
        relu_bf16x2(sums[4 * i + 2 * kKey], sums[4 * i + 2 * kKey + 1]), weights[i]);
    const float low = __uint_as_float(two << 16), high = __uint_as_float(two & 0xffff0000);
    even = i == 0 ? low : even + low;
    odd = i == 0 ? high : odd + high;
  }
  return even + odd;
}

template <int kRows>
class Fp4Scorer {
 public:
  using Rows = Fp4Rows<kRows>;

  // All threads have written the rows to shared memory before.
  __device__ __forceinline__ explicit Fp4Scorer(const Rows& rows)
      : queries_(mma_operand(shared_address(rows.queries))) {
    mma_shared_fence();
    __syncthreads();
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weights_[row][i] = *reinterpret_cast<const uint32_t*>(rows.weights + row * kFp4Heads +
                                                              8 * i + 2 * (lane_id() & 3));
      }
    }
  }

  // Scores of own_key() for the rows from first_own_row() on.
  __device__ __forceinline__ void score(const Bf16Values (&keys)[kFp4Steps],
                                        float (&own)[kOwnRows<kRows>]) const {
    Sums sums[kRows / kTogether];
    mma_begin();
#pragma unroll
    for (int i = 0; i < kRows / kTogether; ++i) {
      multiply(sums[i], keys, queries_ + i * (2 * Rows::kHalfBytes / 16));
      mma_commit();
    }
    float pair[kRows];
    add_heads<0>(sums, pair);
    give_rows<kRows>(pair, own);
  }

 private:
  static constexpr int kTogether = Rows::kTogether;
  using Sums = Bf16Sums<kTogether * kFp4Heads>;

  __device__ __forceinline__ static void multiply(Sums& sums, const Bf16Values (&keys)[kFp4Steps],
                                                  uint64_t query) {
    constexpr int kNext = kBf16Depth * 2 / 16, kHalf = Rows::kHalfBytes / 16;
    sums.set(keys[0], query);
#pragma unroll
    for (int step = 1; step < kFp4Steps; ++step) {
      sums.add(keys[step], query + step / 4 * kHalf + step % 4 * kNext);
    }
  }

  // Adds the sums of one instruction after those of the other, while the matrix unit works on the
  // next.
  template <int kAt>
  __device__ __forceinline__ void add_heads(Sums (&sums)[kRows / kTogether],
                                            float (&pair)[kRows]) const {
    mma_wait<kRows / kTogether - 1 - kAt>();
    pin(sums[kAt].v);
    const bool odd = lane_id() & 1;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int row = kAt * kTogether + i;
      const float low = sum_products<0>(sums[kAt].v + i * 16, weights_[row]);
      const float high = sum_products<1>(sums[kAt].v + i * 16, weights_[row]);
      const float mine = odd ? high : low, theirs = odd ? low : high;
      pair[row] = mine + __shfl_xor_sync(kFullWarp, theirs, 1);
    }
    if constexpr (kAt + 1 < kRows / kTogether) add_heads<kAt + 1>(sums, pair);
  }

  uint64_t queries_;
  uint32_t weights_[kRows][4];
};

// Scores blocks 0 ... turns - 1 of 64 keys, at least one, for rows. load(turn, keys) begins to load
// a thread's part, copy() writes the rows to shared memory, and finish(turn, mark, scores) gets the
// scores.
template <int kRows, class Load, class Copy, class Finish>
__device__ __forceinline__ void score_fp4(const Fp4Rows<kRows>& rows, int32_t turns,
                                          const Load& load, const Copy& copy,
                                          const Finish& finish) {
  constexpr int kAhead = 2;
  Fp4Keys ahead[kAhead];
#pragma unroll
  for (int s = 0; s < kAhead; ++s) {
    if (s < turns) load(s, ahead[s]);
  }
  copy();
  const Fp4Scorer<kRows> scorer(rows);
#pragma unroll 1
  for (int32_t turn = 0; turn < turns; turn += kAhead) {
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      if (turn + s >= turns) break;
      Bf16Values values[kFp4Steps];
      ahead[s].decode(values);
      const int32_t mark = ahead[s].mark;
      if (turn + s + kAhead < turns) load(turn + s + kAhead, ahead[s]);
      float own[kOwnRows<kRows>];
      scorer.score(values, own);
      finish(turn + s, mark, own);
    }
  }
}

}  // namespace dsv4
