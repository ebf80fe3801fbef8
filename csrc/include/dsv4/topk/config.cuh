// The template arguments of a compiled top-k kernel, the choices that the host adds, and the shared
// memory of its CTAs.
#pragma once

#include <cstdint>

#include "dsv4/common/warp.cuh"
#include "dsv4/topk/bound.cuh"
#include "dsv4/topk/row_units.cuh"
#include "dsv4/topk/threshold.cuh"

namespace dsv4 {

constexpr int kTopkUnitSteps = 64;

// The choices of the host beside the template arguments.
struct TopkPlan {
  int32_t solo_units;  // longest row, in units, that one CTA of a cluster serves alone
  int32_t half_units;  // longest row, in units, that half of a cluster serves; 0: never
  bool staged;         // indices are gathered in shared memory before they are written
  int32_t list_steps;  // units per thread that the lists have room for, in whole batches
  int32_t mask_steps;  // units per thread that the masks have room for
  // Byte offsets in shared memory.
  uint32_t lists;        // the warps' maxima, and later their lists in the same place; or scores
  uint32_t received;     // histograms that the peers send
  uint32_t staging;      // indices before they are written
  uint32_t entries;      // pairs of score and index for the sort
  uint32_t kept;         // what a form keeps of the row
  uint32_t list_scores;  // scores that a list of scores has room for
};

// Form: RowForm, or CandidateForm of candidates.cuh. kGuesses: the kernel guesses the
// threshold of long rows (scores_in_smem.cuh).
template <class Policy_, int kThreads_, bool kCluster_, class Form_ = RowForm,
          bool kGuesses_ = false>
struct TopkConfig {
  using Policy = Policy_;
  using Form = Form_;
  static constexpr int kThreads = kThreads_;
  static constexpr bool kCluster = kCluster_;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr bool kGuesses = kGuesses_;
  static constexpr int kMinBlocks = 1024 / kThreads;  // 64 registers per thread
  // Units that a thread keeps in registers. Four float32 units would spill and cost short rows more
  // than they save.
  static constexpr int kHeld = Policy::kBits == 16 ? 4 : 2;
  // Units in flight per thread.
  static constexpr int kBatch = sizeof(typename Policy::Scalar) == 2 ? 8 : 4;
  static constexpr int kSteps = kTopkUnitSteps;  // the most units per thread
  static constexpr int kMaxUnits = kThreads * kSteps;

  static_assert(kWarps <= kWarpSize, "one lane reads one warp's count");
  static_assert(kMaxUnits <= 1 << 15, "15 bits of a listed unit's number");
  static_assert(kHeld * kUnit <= 32, "one mask of 32 bits a thread");
  static_assert(kSteps % kBatch == 0 && kBatch % 4 == 0, "whole batches, of groups of up to four");
};

template <class Config>
struct TopkSmem {
  using Policy = typename Config::Policy;
  // These bytes, up to kZeroBytes, are zero when the row begins, and so are the masks.
  GroupHistogram groups;
  ThresholdSmem<Policy::kBits> threshold;
  // Not initialised.
  alignas(16) typename RowUnits<Policy>::Edges edges;
  alignas(16) uint32_t bound[4];
  uint64_t bounds_barrier;
  uint64_t equals_barrier;
  uint32_t bounds[2][kMaxCluster];
  uint32_t equals[kMaxCluster];
  alignas(16) uint32_t warp_chosen[kWarpSize];
  // After it come 16-bit words: masks[kThreads * mask_steps], lists[kThreads * list_steps],
  // received[rounds][C][kBins]; then staged indices and entries for the sort. TopkWideSmem takes
  // the place of all of these.

  static constexpr int kZeroBytes =
      sizeof(GroupHistogram) + ThresholdSmem<Policy::kBits>::kZeroBytes;
};

}  // namespace dsv4
