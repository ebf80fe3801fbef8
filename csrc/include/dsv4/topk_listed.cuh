// The selection from a slice of any length that the masks have room for: its scores are streamed
// once, and only the maxima of units stay in registers. Units that reach a bound are listed and
// read again, from L1 or L2. A warp's list has room for all units of the warp, so no input
// overflows it.
#pragma once

#include <cstdint>

#include "dsv4/topk_masks.cuh"
#include "dsv4/topk_slice.cuh"

namespace dsv4 {

template <class Config>
struct ListedSelect {
  using Slice = TopkSlice<Config>;
  using Policy = typename Config::Policy;
  using Unit = typename Policy::Unit;
  using H = typename Policy::H;
  static constexpr int kThreads = Config::kThreads;
  static constexpr int kSteps = Config::kSteps;
  static constexpr int kBatch = Config::kBatch;
  static constexpr int kHalves = (kSteps + 31) / 32;
  // An entry of a list: a unit's number in the slice, and whether it holds more than the bound.
  static constexpr uint32_t kExceeds = 1u << 15;
  static constexpr uint32_t kListed = 1u << 16;  // in a register only: it is an entry at all
  static constexpr int kListBatch = Policy::kBits == 16 ? 4 : 2;
  static constexpr uint32_t kPlateau = 4 * kWarpSize;  // listed units that are looked at one by one

  Slice& s;
  uint32_t heads[kSteps / 2];  // the maxima of steps 2j (low half) and 2j + 1 (high half)
  uint32_t listed;             // units in the warp's list

  __device__ __forceinline__ explicit ListedSelect(Slice& slice) : s(slice) {}

  // False: the row has too few numbers, and nothing was written.
  __device__ __forceinline__ bool run() {
    if (s.together()) cluster_wait();  // the start-up barrier: no peer is written to before it runs
    stream();
    GroupPick bound = s.find_bound(GroupRanks{s.smem.groups, Policy::kLastHead});
    if (bound.bound == kNoBound) return false;
    if (!s.together() && bound.reached > s.p.k + s.p.k / 2u + 64u) refine(bound.bound);
    const uint32_t bound_order = Slice::full_order(bound.bound);
    const bool plateau = fill_list(bound.bound);

    bool far;
    Threshold t = s.finder.above_bound(s.p.k, bound_order, far, false, [&](auto visit) {
      each_listed(kExceeds, [&](const Unit& u, uint32_t) { visit(u); });
    });
    if (far) {
      t = s.finder.by_digits(s.p.k, 1, false, [&](auto visit) {
        each_listed(kListed, [&](const Unit& u, uint32_t) { visit(u); });
      });
      if (t.order >= Policy::kLastOrder && t.need != 0) return false;
    }

    const TopkMasks masks(s.masks(), s.depth);
    set_masks(masks, t, t.order >= bound_order, plateau);
    __syncthreads();
    write(masks, t);
    s.finish(t);
    return true;
  }

 private:
  // Units are dealt to the threads step by step: where the best scores lie close together, as in a
  // sorted row, many warps get of them.
  __device__ __forceinline__ int32_t unit(int32_t step) const {  // its number in the slice
    return step * kThreads + threadIdx.x;
  }

  // Loads this thread's units from `step` on; those outside of the slice are all NaN.
  template <int kCount>
  __device__ __forceinline__ void load(Unit (&u)[kCount], int32_t step) const {
    const int32_t first = s.begin + step * kThreads + warp_id() * kWarpSize;  // of the warp
    const int32_t end = s.begin + s.count;
    if (first >= s.units.whole_begin &&
        first + (kCount - 1) * kThreads + kWarpSize <= min(end, s.units.whole_end)) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        u[i] = s.units.load_whole(first + i * kThreads + lane_id());
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int32_t g = first + i * kThreads + lane_id();
        u[i] = Policy::pad();
        if (g < end) u[i] = s.units.load(g);
      }
    }
  }

  // ---- 1. All scores to heads and the histogram of groups ---------------------------------------
  __device__ __forceinline__ void stream() {
    const uint32_t wanted = s.groups_wanted();
    const uint32_t have = s.least;
    const int level = have < wanted ? 0 : have < 2 * wanted ? 1 : have < 4 * wanted ? 2 : 3;
#pragma unroll
    for (int step = 0; step < kSteps; step += kBatch) {
      if (step >= s.depth) break;
      Unit u[kBatch];
      load(u, step);
#pragma unroll
      for (int i = 0; i < kBatch; i += 4) {
        uint32_t pairs[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) pairs[j] = Policy::pair(u[i + j]);
        const uint32_t heads01 = H::unit_maxima(pairs[0], pairs[1]);
        const uint32_t heads23 = H::unit_maxima(pairs[2], pairs[3]);
        heads[(step + i) / 2] = heads01;
        heads[(step + i) / 2 + 1] = heads23;
        add_groups(pairs, heads01, heads23, level);
      }
    }
  }

  // Adds a batch's groups: half units, units, pairs or fours of units. pairs: each unit's two half
  // maxima; heads: those of each two units.
  __device__ __forceinline__ void add_groups(const uint32_t (&pairs)[4], uint32_t heads01,
                                             uint32_t heads23, int level) {
    GroupHistogram& groups = s.smem.groups;
    if (level == 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i) groups.add_pair(pairs[i]);
    } else if (level == 1) {
      groups.add_pair(heads01);
      groups.add_pair(heads23);
    } else {
      const uint32_t best = H::better(heads01, heads23);
      if (level == 2) {
        groups.add_pair(best);
      } else {
        groups.add(order_pair(H::better(best, __byte_perm(best, best, 0x1032))) >> 20);
      }
    }
  }

  // Many groups share the bound's bin: take the k-th largest maximum of single units instead, to
  // the last bit of a head.
  __device__ __forceinline__ void refine(uint32_t& bound) {
    uint32_t* hist = s.smem.threshold.hist[ThresholdSmem<Policy::kBits>::kRefine];
#pragma unroll
    for (int j = 0; j < kSteps / 2; ++j) {
      if (2 * j >= s.depth) break;
      const uint32_t orders = order_pair(heads[j]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t order = half == 0 ? orders & 0xffffu : orders >> 16;
        const bool counts = order != 0 && order <= bound;  // 0: NaN
        atomicAdd(hist + (counts ? kBins - 1 - min(bound - order, kBins - 1u) : kSink), 1u);
      }
    }
    __syncthreads();
    if (warp_id() == 0) {
      const Pick pick = pick_bin(hist, s.p.k);
      if (lane_id() == 0) s.smem.bound[2] = pick.found ? kBins - 1 - pick.bin : 0u;
    }
    __syncthreads();
    bound -= s.smem.bound[2];
  }

  // ---- 2. The list ------------------------------------------------------------------------------
  __device__ __forceinline__ uint16_t* list() const {
    return reinterpret_cast<uint16_t*>(s.at(s.plan.lists)) +
           warp_id() * kWarpSize * s.plan.list_steps;
  }

  // The warp's units that reach the bound, in any order. Where very many do, only those that exceed
  // it, and true is returned: the others matter if the threshold is the bound, and are then gone
  // through in row order.
  __device__ __forceinline__ bool fill_list(uint32_t bound) {
    uint32_t reaches[kHalves];  // bit i: step 32 half + 2 i; bit 16 + i: the step after it
    uint32_t exceeds[kHalves];
    const uint32_t limit = head_pair(bound);
    uint32_t all = 0;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      reaches[half] = exceeds[half] = 0;
#pragma unroll
      for (int i = 0; i < 16 && 16 * half + i < kSteps / 2; ++i) {
        const int j = 16 * half + i;
        if (2 * j >= s.depth) break;
        reaches[half] |= H::reaches(heads[j], limit) & (0x00010001u << i);
        if (Policy::kBits == 16) exceeds[half] |= H::above(heads[j], limit) & (0x00010001u << i);
      }
      // A float32 head that equals the bound's may belong to a score that exceeds it.
      if (Policy::kBits == 32) exceeds[half] = reaches[half];
      all += __popc(reaches[half]);
    }
    const bool plateau = Policy::kBits == 16 && __reduce_add_sync(kFullWarp, all) > kPlateau;
    uint16_t* to = list();
    listed = 0;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      if (32 * half >= s.depth) break;
      uint32_t chosen = plateau ? exceeds[half] : reaches[half];
      const auto entry = [&](int bit) {
        const int32_t step = 32 * half + 2 * (bit & 15) + (bit >> 4);
        return static_cast<uint16_t>(unit(step) + (((exceeds[half] >> bit) & 1u) << 15));
      };
      const uint32_t own = __popc(chosen);
      if (__any_sync(kFullWarp, own > Slice::kMany)) {
        // Many: a step at a time, side by side.
#pragma unroll 1
        for (int bit = 0; bit < 32; ++bit) {
          const uint32_t lanes = __ballot_sync(kFullWarp, (chosen >> bit) & 1u);
          if ((chosen >> bit) & 1u) to[listed + __popc(lanes & lanes_below())] = entry(bit);
          listed += __popc(lanes);
        }
      } else {
        const uint32_t upto = warp_inclusive_sum(own);
        uint16_t* next = to + listed + upto - own;
        while (chosen != 0) {
          *next++ = entry(__ffs(chosen) - 1);
          chosen &= chosen - 1;
        }
        listed += __shfl_sync(kFullWarp, upto, kWarpSize - 1);
      }
    }
    __syncwarp();
    return plateau;
  }

  // visit(unit, entry) of the warp's entries, in batches so that their loads overlap. A unit is
  // read where its entry has a bit of `mask`.
  template <class Visit>
  __device__ __forceinline__ void each_listed(uint32_t mask, Visit visit) const {
    const uint16_t* from = list();
#pragma unroll 1
    for (uint32_t first = 0; first < listed; first += kListBatch * kWarpSize) {
      Unit u[kListBatch];
      uint32_t entries[kListBatch];
#pragma unroll
      for (int i = 0; i < kListBatch; ++i) {
        entries[i] = 0;
        if (first + i * kWarpSize >= listed) continue;  // of the whole warp: lists are short
        const uint32_t at = first + i * kWarpSize + lane_id();
        if (at < listed) entries[i] = from[at] | kListed;
        u[i] = Policy::pad();
        if (entries[i] & mask) u[i] = s.units.load(s.begin + (entries[i] & 0x7fffu));
      }
#pragma unroll
      for (int i = 0; i < kListBatch; ++i) {
        if (first + i * kWarpSize >= listed) continue;
        if (__any_sync(kFullWarp, entries[i] & mask)) visit(u[i], entries[i]);
      }
    }
  }

  // ---- 3. Masks and positions -------------------------------------------------------------------
  // Units that hold no more than the bound matter only where the threshold is the bound.
  __device__ __forceinline__ void set_masks(const TopkMasks& masks, const Threshold& t,
                                            bool at_bound, bool plateau) const {
    const uint32_t raw = Policy::raw_of(t.order);
    const auto classify = [&](const Unit& u, int32_t number) {
      uint32_t above;
      uint32_t equal;
      Policy::classify(u, raw, above, equal);
      masks.set(number, above, equal);
      return __popc(equal);
    };
    if (at_bound && plateau) {
      // A warp's units in row order, until it has enough equals.
      uint32_t equals = 0;
      for (int32_t step = 0; step < s.depth && equals < t.need; step += kListBatch) {
        Unit u[kListBatch];
        load(u, step);
        uint32_t own = 0;
#pragma unroll
        for (int i = 0; i < kListBatch; ++i) {
          const int32_t number = unit(step + i);
          if (step + i < s.depth && number < s.count) own += classify(u[i], number);
        }
        equals += __reduce_add_sync(kFullWarp, own);
      }
    }
    const uint32_t wanted = at_bound && !plateau ? kListed : kExceeds;
    each_listed(wanted, [&](const Unit& u, uint32_t entry) {
      if (entry & wanted) classify(u, entry & 0x7fffu);
    });
  }

  // A thread takes its share of the slice's units in a row, and goes from one of its own blocks
  // that hold any to the next: as many turns as the fullest lane needs.
  __device__ __forceinline__ void write(const TopkMasks& masks, const Threshold& t) const {
    uint32_t own = 0;  // packed as in TopkSlice
    uint32_t blocks = 0;
    for (int32_t granule = 0; granule < masks.granules; ++granule) {
      const uint4 m = masks.granule(granule);
      if ((m.x | m.y | m.z | m.w) != 0) {
        own += TopkMasks::count_above(m) | (TopkMasks::count_equal(m) << Slice::kEqualShift);
        blocks |= TopkMasks::blocks_of(m) << (2 * granule);
      }
    }
    const uint32_t upto = warp_inclusive_sum(own);
    uint2 before = s.counted_before(__shfl_sync(kFullWarp, upto, kWarpSize - 1), t);
    before.x += (upto - own) & Slice::kAboveMask;
    before.y += (upto - own) >> Slice::kEqualShift;
    const int32_t begin = s.units.index(s.begin, 0) + masks.first_unit() * kUnit;
    while (__any_sync(kFullWarp, blocks != 0)) {
      typename Slice::Chosen chosen{0u, 0u};
      int32_t first = begin;
      if (blocks != 0) {
        const int block = __ffs(blocks) - 1;
        blocks &= blocks - 1;
        const uint2 m = masks.block(block);
        const uint32_t above = TopkMasks::above_of(m.x, m.y);
        const uint32_t equal = TopkMasks::equal_of(m.x, m.y);
        chosen = Slice::choose(above, equal, before, t.need);
        before.x += __popc(above);
        before.y += __popc(equal);
        first += block * TopkMasks::kBlock * kUnit;
      }
      s.write_warp(first, chosen);
    }
  }

  static_assert(2 * kSteps <= 32 * TopkMasks::kGranule, "a bit of 32 for every block of a thread");
};

}  // namespace dsv4
