// Scores blocks of 64 keys for the rows of one CTA, one block after the other. Keys are copied some
// blocks ahead to a ring in shared memory. The matrix unit works on a block while the sums of the
// previous block become scores.
#pragma once

#include <cstdint>

#include "dsv4/logits/key_ring.cuh"
#include "dsv4/logits/params.cuh"
#include "dsv4/logits/score.cuh"

namespace dsv4 {

// The shared memory of a CTA of one warpgroup. Config has kHeads, kRows (rows that are scored
// together) and kStages (blocks in the ring).
template <class Config>
struct PipelineShared {
  using Rows = RowSet<Config::kHeads, Config::kRows>;
  using Ring = KeyRing<Config::kStages>;
  static constexpr int kBytes = Rows::kBytes + Ring::kBytes;

  Rows rows;
  Ring ring;

  __device__ __forceinline__ explicit PipelineShared(uint8_t* memory) {
    rows.queries = memory;
    ring.keys = memory + Config::kRows * Rows::kQueryBytes;
    ring.scales = reinterpret_cast<float*>(ring.keys + Config::kStages * kBlockValues);
    rows.weights = ring.scales + Config::kStages * kBlockKeys;
  }
};

// Copy: copy(turn, slot) begins the copy of a block's keys to a slot of the ring. The copies of the
// rows have already begun when the pipeline is constructed.
template <class Config, class Copy>
class BlockPipeline {
 public:
  __device__ __forceinline__ BlockPipeline(const PipelineShared<Config>& shared, int32_t turns,
                                           const Copy& copy)
      : shared_(shared), copy_(copy), turns_(turns) {
#pragma unroll
    for (int s = 0; s < kAhead; ++s) begin_copy(s);
  }

  // finish(turn, scores) gets the scores of own_key() in that block for the rows from
  // first_own_row() on.
  template <class Finish>
  __device__ __forceinline__ void run(const Finish& finish) {
    Sums even, odd;
    arrive(0);
    begin(even, 0);
    weights_.load(shared_.rows.weights);
    int32_t turn = 1;
    for (; turn + 1 < turns_; turn += 2) {
      arrive(turn);
      begin(odd, turn);
      mma_wait<1>();
      give(even, turn - 1, finish);
      arrive(turn + 1);
      begin(even, turn + 1);
      mma_wait<1>();
      give(odd, turn, finish);
    }
    if (turn < turns_) {
      arrive(turn);
      begin(odd, turn);
      mma_wait<1>();
      give(even, turn - 1, finish);
      mma_wait<0>();
      give(odd, turn, finish);
    } else {
      mma_wait<0>();
      give(even, turn - 1, finish);
    }
    copies_wait<0>();
  }

 private:
  static constexpr int kHeads = Config::kHeads, kRows = Config::kRows, kOwn = kOwnRows<kRows>;
  using Sums = MmaSums<kRows * kHeads>;

  // The slot of block b is free once every warp is done with it; that is known two blocks later.
  static constexpr int kAhead = Config::kStages - 2;

  __device__ __forceinline__ void begin_copy(int32_t turn) {
    if (turn < turns_) copy_(turn, turn % Config::kStages);
    copies_commit();  // empty if no copy is left: the groups are counted
  }

  // After it, the blocks up to `turn` are in the ring, and the slot of block turn + kAhead is free.
  __device__ __forceinline__ void arrive(int32_t turn) {
    copies_wait<kAhead - 1>();
    mma_shared_fence();
    __syncthreads();
    begin_copy(turn + kAhead);
  }

  __device__ __forceinline__ void begin(Sums& sums, int32_t turn) {
    shared_.ring.multiply(sums, turn % Config::kStages, shared_.rows.queries);
  }

  template <class Finish>
  __device__ __forceinline__ void give(Sums& sums, int32_t turn, const Finish& finish) {
    pin(sums.v);
    float score[kOwn];
    sum_heads<kHeads, kRows>(sums.v, weights_, score);
    const float scale = shared_.ring.scale(turn % Config::kStages);
#pragma unroll
    for (int o = 0; o < kOwn; ++o) score[o] *= scale;
    finish(turn, score);
  }

  const PipelineShared<Config>& shared_;
  const Copy& copy_;
  const int32_t turns_;
  HeadWeights<kHeads, kRows> weights_;
};

}  // namespace dsv4
