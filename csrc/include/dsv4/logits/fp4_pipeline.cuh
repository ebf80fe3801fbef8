// As pipeline.cuh, for FP4 keys. A warp decodes its own sixteen keys of a block in registers, so
// the warps of a CTA wait for each other only at the matrix instruction; what hides a wait are the
// other CTAs of the multiprocessor.
//
// The scores are SGLang's: a dot product is rounded to bfloat16 before ReLU, its product with the
// weight to bfloat16, the sum of the heads to bfloat16 at the end. Dot products are exact in
// float32, in whatever order the matrix unit adds, as long as the scales of a key times those of a
// query are less than 2^9 apart.
#pragma once

#include <cstdint>

#include "dsv4/logits/fp4_keys.cuh"
#include "dsv4/logits/pipeline.cuh"

namespace dsv4 {

// (ReLU(a), ReLU(b)), NaN where a number is NaN; `a` in the low half.
__device__ __forceinline__ uint32_t relu_bf16x2(float a, float b) {
  uint32_t r;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
  return r;
}

// The sum over the eight heads of a row that this thread has, of the low key (kKey 0) or the other.
// `weights`: heads 8 i + 2 (lane % 4) and the next.
template <int kKey>
__device__ __forceinline__ float sum_products(const Bf16Sums& sums, const uint32_t (&weights)[4]) {
  float even = 0, odd = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t two = multiply_bf16x2(
        relu_bf16x2(sums.v[4 * i + 2 * kKey], sums.v[4 * i + 2 * kKey + 1]), weights[i]);
    const float low = __uint_as_float(two << 16), high = __uint_as_float(two & 0xffff0000);
    even = i == 0 ? low : even + low;
    odd = i == 0 ? high : odd + high;
  }
  return even + odd;
}

// Copy and finish as in BlockPipeline.
template <class Config, class Copy>
class Fp4Pipeline {
 public:
  __device__ __forceinline__ Fp4Pipeline(const PipelineShared<Config>& shared, int32_t turns,
                                         const Copy& copy)
      : shared_(shared), copy_(copy), turns_(turns) {
#pragma unroll
    for (int s = 0; s < kAhead; ++s) begin_copy(s);
  }

  template <class Finish>
  __device__ __forceinline__ void run(const Finish& finish) {
    mma_shared_fence();
    __syncthreads();
    uint32_t weights[kRows][4];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weights[row][i] = *reinterpret_cast<const uint32_t*>(
            shared_.rows.weights + row * kFp4Heads + 8 * i + 2 * (lane_id() & 3));
      }
    }
    const uint64_t queries = mma_operand(shared_address(shared_.rows.queries));
    const bool odd = lane_id() & 1;
#pragma unroll 1
    for (int32_t turn = 0; turn < turns_; ++turn) {
      copies_wait<kAhead - 1>();
      __syncwarp();  // the warp's keys are there, and no lane still reads the block before
      begin_copy(turn + kAhead);
      const uint8_t* slot = shared_.ring.slot(turn % Config::kStages);
      const Fp4Values low(slot, low_key()), high(slot, low_key() + 8);
      const bool large = __any_sync(kFullWarp, low.large() || high.large());
      Bf16Values keys[kFp4Steps];
      low.decode(keys, 0, large);
      high.decode(keys, 1, large);

      Bf16Sums sums[kRows];
      mma_begin();
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        multiply(sums[row], keys, queries + row * (Fp4Rows<kRows>::kQueryBytes / 16));
        mma_commit();
      }
      float pair[kRows];
      give<0>(sums, weights, odd, pair);
      float own[kOwnRows<kRows>];
      give_rows<kRows>(pair, own);
      finish(turn, own);
    }
    copies_wait<0>();
  }

 private:
  static constexpr int kRows = Config::kRows;
  static constexpr int kAhead = Config::kStages - 1;

  __device__ __forceinline__ void begin_copy(int32_t turn) {
    if (turn < turns_) copy_(turn, turn % Config::kStages);
    copies_commit();  // an empty group where there is nothing left: they are counted
  }

  __device__ __forceinline__ static void multiply(Bf16Sums& sums,
                                                  const Bf16Values (&keys)[kFp4Steps],
                                                  uint64_t query) {
    constexpr int kNext = kBf16Depth * 2 / 16, kHalf = Fp4Rows<kRows>::kHalfBytes / 16;
    sums.set(keys[0], query);
#pragma unroll
    for (int step = 1; step < kFp4Steps; ++step) {
      sums.add(keys[step], query + step / 4 * kHalf + step % 4 * kNext);
    }
  }

  // The rows' sums one after the other, while the matrix unit works on the next.
  template <int kRow>
  __device__ __forceinline__ static void give(Bf16Sums (&sums)[kRows],
                                              const uint32_t (&weights)[kRows][4], bool odd,
                                              float (&pair)[kRows]) {
    mma_wait<kRows - 1 - kRow>();
    pin(sums[kRow].v);
    const float low = sum_products<0>(sums[kRow], weights[kRow]);
    const float high = sum_products<1>(sums[kRow], weights[kRow]);
    const float mine = odd ? high : low, theirs = odd ? low : high;
    pair[kRow] = mine + __shfl_xor_sync(kFullWarp, theirs, 1);
    if constexpr (kRow + 1 < kRows) give<kRow + 1>(sums, weights, odd, pair);
  }

  const PipelineShared<Config>& shared_;
  const Copy& copy_;
  const int32_t turns_;
};

}  // namespace dsv4
