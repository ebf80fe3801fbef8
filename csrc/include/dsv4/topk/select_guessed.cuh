// The selection from a row by one CTA, with a guess of the threshold. A short row is held in
// registers; of a longer one the scores that reach the guess are listed. From the bound on, the
// same code serves both: it works on kHeld units at a time, either the held units or the next
// scores of the list.
#pragma once

#include <cstdint>

#include "dsv4/topk/scores_in_smem.cuh"
#include "dsv4/topk/select_row.cuh"
#include "dsv4/topk/units_in_registers.cuh"
#include "dsv4/topk/wide.cuh"

namespace dsv4 {

template <class Config>
class GuessedSteps {
 public:
  using Slice = TopkSlice<Config>;
  using Policy = typename Config::Policy;
  using Unit = typename Policy::Unit;
  using Held = HeldUnits<Config>;
  static constexpr int kHeld = Config::kHeld;

  __device__ __forceinline__ GuessedSteps(Slice& slice, bool held)
      : s_(slice), held_(held), list_{slice} {}

  // False: the row may have fewer than k numbers, or the guess was wrong. Nothing was written.
  __device__ __forceinline__ bool run() {
    uint32_t bound = kNone;
    if (held_) {
      bound = find_bound();
    } else {
      bound = list_.stream();
      if (bound == kNone) return false;
    }
    Threshold t;
    if (!s_.finder.find(t, s_.p.k, bound, held_,
                        [&](bool above, auto visit, auto rare) { each(above, visit, rare); })) {
      return false;
    }
    if (held_) {
      Held{s_, u_}.write(t);
    } else if (!list_.write(t)) {
      return false;
    }
    s_.finish(t);
    return true;
  }

 private:
  // Reads a held row.
  __device__ __forceinline__ uint32_t find_bound() {
    const Held held{s_, u_};
    held.load();
    if (!held.add_groups()) return kNone;
    GroupHistogram& groups = s_.smem.groups;
    const GroupPick pick = s_.find_bound([&](uint32_t rank, auto take) {
      if (Held::kOctaves) {
        OctaveRanks{groups}.pick(rank, take);
      } else {
        GroupRanks{groups, Policy::kLastHead}.pick(rank, take);
      }
    });
    return pick.bound < Policy::kLastHead ? Slice::full_order(pick.bound) : kNone;
  }

  // Calls visit() for every unit of scores, or, with less code, rare().
  template <class Visit, class Rare>
  __device__ __forceinline__ void each(bool above, Visit visit, Rare rare) {
    uint32_t first = 0;
#pragma unroll 1
    do {
      const uint32_t some = held_ ? (1u << s_.depth) - 1u : list_.fetch(u_, first);
      first += kHeld * kUnit * Config::kThreads;
      if (above) {
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
          if ((some >> i) & 1u) visit(u_[i]);
        }
      } else {
        // One piece of code for all units: they rotate.
#pragma unroll 1
        for (int i = 0; i < kHeld; ++i) {
          const Unit u = u_[0];
          if ((some >> i) & 1u) rare(u);
#pragma unroll
          for (int j = 0; j < kHeld; ++j) u_[j] = j + 1 < kHeld ? u_[j + 1] : u;
        }
      }
    } while (!held_ && first < list_.size());
  }

  Slice& s_;
  const bool held_;
  ListedScores<Config> list_;
  Unit u_[kHeld];
};

// A row that GuessedSteps could not select from, from the beginning. It is rare, so it is out of
// line, and it finds out for itself what the kernel knew.
template <class Config>
__device__ __noinline__ void select_again(const typename Config::Form::Params& p,
                                          const TopkPlan& plan, unsigned char* memory) {
  using Policy = typename Config::Policy;
  using Form = typename Config::Form;
  const int32_t row = blockIdx.x;
  const auto* scores =
      static_cast<const typename Policy::Scalar*>(p.logits) + row * p.logits_stride;
  const typename Form::Window window = typename Form::Source(p, row).read(p);
  const RowUnits<Policy> units(scores, window);
  __syncthreads();
  if (units.count > Config::kHeld * Config::kThreads) {
    TopkSlice<Config> slice(p, plan, *reinterpret_cast<TopkSmem<Config>*>(memory), units, row,
                            ClusterShape::alone());
    if (ListedScores<Config>(slice).write_plateau()) return slice.finish(Threshold{});
    __syncthreads();
    clear_memory<Config>(memory, plan);
    __syncthreads();
    if (TopkSteps<Config>(slice, false).run()) return;
    __syncthreads();
  }
  wide_select<Form, Policy, Config::kThreads>(p, row, scores, window,
                                              memory + sizeof(TopkSmem<Config>));
}

}  // namespace dsv4
