// The selection from one CTA's slice of a row, step by step. The slice is held in registers or
// listed. From the bound on, the same code serves both: it works on kHeld units at a time, either
// the held units or the next units of the list, read into the same registers.
#pragma once

#include <cstdint>

#include "dsv4/topk/masks.cuh"
#include "dsv4/topk/units_in_registers.cuh"
#include "dsv4/topk/units_in_smem.cuh"

namespace dsv4 {

template <class Config>
class TopkSteps {
 public:
  using Slice = TopkSlice<Config>;
  using Policy = typename Config::Policy;
  using Unit = typename Policy::Unit;
  using List = UnitList<Config>;
  using Held = HeldUnits<Config>;
  using Masks = TopkMasks<Config::kGuesses>;
  static constexpr int kHeld = Config::kHeld;

  __device__ __forceinline__ TopkSteps(Slice& slice, bool held)
      : s_(slice), held_(held), list_{slice, 0u} {}

  // False: the row may have fewer than k numbers, and nothing was written.
  __device__ __forceinline__ bool run() {
    if (!find_bound()) return false;
    Threshold t;
    if (!s_.finder.find(t, s_.p.k, bound_, held_,
                        [&](bool above, auto visit, auto rare) { each(above, visit, rare); })) {
      return false;
    }
    if (held_) {
      Held{s_, u_}.write(t);
    } else {
      mark(t);
      write(t);
    }
    s_.finish(t);
    return true;
  }

 private:
  // Reads the scores. False: the slice must be listed and has no bound.
  __device__ __forceinline__ bool find_bound() {
    const Held held{s_, u_};
    if (held_) {
      held.load();
    } else {
      list_.stream();
    }
    // The start-up barrier. A peer must not be written to before it runs, and no CTA may leave the
    // barrier half done. It is here because the scores are on their way; a CTA that is alone uses
    // it too.
    if constexpr (Config::kCluster) cluster_wait();
    if (held_ && !held.add_groups()) return true;
    GroupHistogram& groups = s_.smem.groups;
    const GroupPick pick = s_.find_bound([&](uint32_t rank, auto take) {
      if (Held::kOctaves && held_) {
        OctaveRanks{groups}.pick(rank, take);
      } else {
        GroupRanks{groups, Policy::kLastHead}.pick(rank, take);
      }
    });
    uint32_t head = pick.bound;
    if (held_) {
      if (head < Policy::kLastHead) bound_ = Slice::full_order(head);
      return true;
    }
    if (head == kNoBound) return false;
    if (!s_.together() && pick.reached > s_.p.k + s_.p.k / 2u + 64u) list_.refine(head);
    plateau_ = list_.fill(head);
    bound_ = Slice::full_order(head);
    return true;
  }

  // Calls visit() for every unit that may exceed the bound, or, with less code, rare() for every
  // unit that may reach it.
  template <class Visit, class Rare>
  __device__ __forceinline__ void each(bool above, Visit visit, Rare rare) {
    turns(false, above ? List::kExceeds : List::kListed, [&] {
      if (above) {
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
          if ((some_ >> i) & 1u) visit(u_[i]);
        }
      } else {
        around<1>([&](const Unit& u, uint32_t) { rare(u); });
      }
      return true;
    });
  }

  // Calls visit(unit, entry) for the units in u_. One piece of code serves kAtOnce of them: they
  // rotate.
  template <int kAtOnce, class Visit>
  __device__ __forceinline__ void around(Visit visit) {
#pragma unroll 1
    for (int i = 0; i < kHeld; i += kAtOnce) {
      Unit u[kAtOnce];
      uint32_t entries[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        u[j] = u_[j];
        entries[j] = entries_[j];
        if ((some_ >> (i + j)) & 1u) visit(u[j], entries[j]);
      }
#pragma unroll
      for (int j = 0; j < kHeld; ++j) {
        u_[j] = j + kAtOnce < kHeld ? u_[j + kAtOnce] : u[j + kAtOnce - kHeld];
        entries_[j] = j + kAtOnce < kHeld ? entries_[j + kAtOnce] : entries[j + kAtOnce - kHeld];
      }
    }
  }

  // Brings kHeld units at a time to u_ and calls turn() for them, until it returns false or no unit
  // is left. some_: bit i if any lane has a unit in u_[i]. A listed unit is read if its entry has a
  // bit of `wanted`. With `all` the slice's units replace the list, in row order for each thread.
  template <class Turn>
  __device__ __forceinline__ void turns(bool all, uint32_t wanted, Turn turn) {
    uint32_t first = 0;
    const uint32_t end = all ? s_.depth * kWarpSize : list_.size;
#pragma unroll 1
    do {
      if (held_) {
        some_ = (1u << s_.depth) - 1u;
      } else {
        fetch(all, first, wanted);
      }
      first += kHeld * kWarpSize;
    } while (turn() && !held_ && first < end);
  }

  // Reads the units of the warp's entries from `first` on; NaN where there is no entry.
  __device__ __forceinline__ void fetch(bool all, uint32_t first, uint32_t wanted) {
    const uint16_t* from = list_.entries();
    some_ = 0;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const uint32_t at = first + i * kWarpSize + lane_id();
      entries_[i] = 0u;
      if (all) {
        const int32_t number = list_.unit(at / kWarpSize);
        if (number < s_.count) entries_[i] = number | List::kListed;
      } else if (at < list_.size) {
        entries_[i] = from[at] | List::kListed;
      }
      u_[i] = Policy::pad();
      const bool is_wanted = (entries_[i] & wanted) != 0;
      if (is_wanted) {
        u_[i] = s_.units.load(s_.begin + (entries_[i] & List::kNumber), s_.smem.edges);
      }
      if (__any_sync(kFullWarp, is_wanted)) some_ |= 1u << i;
    }
  }

  // Sets the masks: which scores of listed units lie above the threshold, and which equal it. Units
  // that hold no score above the bound matter only if the threshold is the bound.
  __device__ __forceinline__ void mark(const Threshold& t) {
    const uint32_t raw = Policy::raw_of(t.order);
    const Masks masks(s_.masks(), s_.depth);
    const bool at_bound = t.order >= bound_;
    // On a plateau it first takes the warp's units in row order, until it has enough equal scores.
    bool all = at_bound && plateau_;
    uint32_t wanted = at_bound ? List::kListed : List::kExceeds;
    uint32_t equals = 0;
#pragma unroll 1
    for (;;) {
      turns(all, wanted, [&] {
        uint32_t own = 0;
        around<2>([&](const Unit& u, uint32_t entry) {
          if ((entry & wanted) == 0) return;
          uint32_t above;
          uint32_t equal;
          Policy::classify(u, raw, above, equal);
          masks.set(entry & List::kNumber, above, equal);
          own += __popc(equal);
        });
        if (all) equals += __reduce_add_sync(kFullWarp, own);
        return !all || equals < t.need;
      });
      if (!all) break;
      all = false;
      wanted = List::kExceeds;
    }
    __syncthreads();
  }

  // A thread takes its consecutive share of the slice's units and goes from one of its nonempty
  // blocks to the next. So the loop has as many turns as the fullest lane needs.
  __device__ __forceinline__ void write(const Threshold& t) const {
    const Masks masks(s_.masks(), s_.depth);
    uint32_t own = 0;  // packed as in TopkSlice
    uint32_t blocks = 0;
#pragma unroll 1
    for (int32_t granule = 0; granule < masks.granules; ++granule) {
      const uint4 m = masks.granule(granule);
      if ((m.x | m.y | m.z | m.w) != 0) {
        own += Masks::count_above(m) | (Masks::count_equal(m) << Slice::kEqualShift);
        blocks |= Masks::blocks_of(m) << (2 * granule);
      }
    }
    uint2 before = s_.counted_before(own, t);
    const int32_t begin = s_.units.index(s_.begin, 0) + masks.first_unit() * kUnit;
#pragma unroll 1
    while (__any_sync(kFullWarp, blocks != 0)) {
      typename Slice::Chosen chosen{0u, 0u};
      int32_t first = begin;
      if (blocks != 0) {
        const int block = __ffs(blocks) - 1;
        blocks &= blocks - 1;
        const uint2 m = masks.block(block);
        const uint32_t above = Masks::above_of(m.x, m.y);
        const uint32_t equal = Masks::equal_of(m.x, m.y);
        chosen = Slice::choose(above, equal, before, t.need);
        before.x += __popc(above);
        before.y += __popc(equal);
        first += block * Masks::kBlock * kUnit;
      }
      s_.write_warp(first, chosen);
    }
  }

  static_assert(2 * Config::kSteps <= 32 * Masks::kGranule,
                "a bit of 32 for every block of a thread");

  Slice& s_;
  const bool held_;
  List list_;
  bool plateau_ = false;
  uint32_t bound_ = kNone;  // an order that k scores reach
  Unit u_[kHeld];
  uint32_t some_ = 0;             // bit i: some lane has a unit in u_[i]
  uint32_t entries_[kHeld] = {};  // of the list
};

}  // namespace dsv4
