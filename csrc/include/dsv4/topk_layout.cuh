// What a compiled top-k kernel is made for, what the host adds to it, and the shared memory of its
// CTAs.
#pragma once

#include <cstdint>

#include "dsv4/common.cuh"
#include "dsv4/ordered_key.cuh"
#include "dsv4/topk_bound.cuh"
#include "dsv4/topk_threshold.cuh"

namespace dsv4 {

// What the host chooses beside the template arguments.
struct TopkPlan {
  int32_t solo_units;  // longest row, in units, that one CTA of a cluster serves alone
  bool staged;         // indices are gathered in shared memory before they are written
  int32_t list_steps;  // units a thread for which the lists have room
  int32_t mask_steps;  // and the masks
  uint32_t lists;      // byte offsets in shared memory: the warps' lists,
  uint32_t received;   // digits of the peers,
  uint32_t tail;       // entries (sort) or staged indices
};

template <class Policy_, int kThreads_, int kSteps_, int kMinBlocks_, bool kCluster_>
struct TopkConfig {
  using Policy = Policy_;
  static constexpr int kThreads = kThreads_;
  static constexpr int kSteps = kSteps_;  // units a thread at most
  static constexpr int kMinBlocks = kMinBlocks_;
  static constexpr bool kCluster = kCluster_;
  static constexpr int kWarps = kThreads / kWarpSize;
  // Of these, kept in registers. Four of float32 spill, and cost short rows more than they save.
  static constexpr int kDirect = Policy::kBits == 16 ? 4 : 2;
  static constexpr int kBatch = 4;  // units in flight a thread
  static constexpr int kMaxUnits = kThreads * kSteps;

  static_assert(kWarps <= kWarpSize, "one lane reads one warp's count");
  static_assert(kMaxUnits <= 1 << 15, "15 bits of a listed unit's number");
  static_assert(kDirect * kUnit <= 32, "one mask of 32 bits a thread");
  static_assert(kSteps % kBatch == 0 && kBatch % 4 == 0, "groups of up to four units of a batch");
};

template <class Config>
struct TopkSmem {
  // Zero when the row begins, and so are the masks.
  ThresholdSmem<Config::Policy::kBits> threshold;
  GroupHistogram groups;
  // Not initialised.
  alignas(16) uint32_t bound[4];
  uint64_t bounds_barrier;
  uint64_t equals_barrier;
  uint32_t bounds[2][kMaxCluster];
  uint32_t equals[kMaxCluster];
  alignas(16) uint32_t warp_chosen[kWarpSize];
  // Then 16-bit words: masks[kThreads * mask_steps], lists[kThreads * list_steps],
  // received[rounds][C][kBins]; then entries or staged indices. Or, over all of these,
  // TopkWideSmem.
};

}  // namespace dsv4
