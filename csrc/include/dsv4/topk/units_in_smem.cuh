// A slice of any length that the masks have room for. Its scores are streamed once, and only the
// maximum of every unit is kept, in shared memory. Units that reach a bound are listed and read
// again from L1 or L2. A warp's list has room for all units of the warp, so no input can overflow
// it.
#pragma once

#include <cstdint>

#include "dsv4/topk/cta_slice.cuh"

namespace dsv4 {

template <class Config>
struct UnitList {
  using Slice = TopkSlice<Config>;
  using Policy = typename Config::Policy;
  using Unit = typename Policy::Unit;
  using H = typename Policy::H;
  static constexpr int kThreads = Config::kThreads;
  static constexpr int kBatch = Config::kBatch;
  // An entry of the list: a unit's number in the slice, and whether it holds more than the bound.
  static constexpr uint32_t kExceeds = 1u << 15;
  static constexpr uint32_t kNumber = kExceeds - 1u;
  static constexpr uint32_t kListed = 1u << 16;        // only in a register: it is an entry at all
  static constexpr uint32_t kPlateau = 4 * kWarpSize;  // listed units that are examined one by one

  const Slice& s;
  uint32_t size;  // units in the warp's list

  // Units are dealt to the threads step by step. So if the best scores lie close together, as in a
  // sorted row, many warps get some of them.
  __device__ __forceinline__ int32_t unit(int32_t step) const {  // its number in the slice
    return step * kThreads + threadIdx.x;
  }

  // Puts the partial units that the warp has in shared memory.
  __device__ __forceinline__ void keep_edges() const {
    s.units.keep_edges(s.smem.edges, [&](int32_t g) {
      const uint32_t number = g - s.begin;
      return number < static_cast<uint32_t>(s.count) && number % kThreads / kWarpSize == warp_id();
    });
  }

  // Loads this thread's units from `step` on; units outside the slice are all NaN.
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
        if (g < end) u[i] = s.units.load(g, s.smem.edges);
      }
    }
  }

  // ---- 1. All scores to maxima and the histogram of groups --------------------------------------
  __device__ __forceinline__ void stream() const {
    const uint32_t wanted = s.groups_wanted();
    const uint32_t have = s.least;
    const int level = have < wanted ? 0 : have < 2 * wanted ? 1 : have < 4 * wanted ? 2 : 3;
    keep_edges();
    uint32_t* to = maxima();
#pragma unroll 1
    for (int32_t step = 0; step < s.depth; step += kBatch) {
      Unit u[kBatch];
      load(u, step);
#pragma unroll 1
      for (int i = 0; i < kBatch; i += 4) {
        uint32_t pairs[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) pairs[j] = Policy::pair(u[j]);
        const uint32_t heads01 = H::unit_maxima(pairs[0], pairs[1]);
        const uint32_t heads23 = H::unit_maxima(pairs[2], pairs[3]);
        to[0] = heads01;
        to[kWarpSize] = heads23;
        to += 2 * kWarpSize;
        add_groups(pairs, heads01, heads23, level);
#pragma unroll
        for (int j = 4; j < kBatch; ++j) u[j - 4] = u[j];  // one piece of code for all
      }
    }
  }

  // If many groups share the bound's bin, this takes the k-th largest maximum of single units
  // instead, exact to the last bit of a head.
  __device__ __forceinline__ void refine(uint32_t& bound) const {
    uint32_t* hist = s.smem.threshold.hist[ThresholdSmem<Policy::kBits>::kRefine];
    const uint32_t* from = maxima();
#pragma unroll 1
    for (int32_t step = 0; step < s.depth; step += 2) {
      const uint32_t orders = order_pair(*from);
      from += kWarpSize;
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
  __device__ __forceinline__ uint16_t* entries() const {
    return reinterpret_cast<uint16_t*>(s.at(s.plan.lists)) +
           warp_id() * kWarpSize * s.plan.list_steps;
  }

  // Lists the warp's units that reach the bound, in any order, over the maxima. If very many do, it
  // lists only those that exceed the bound and returns true. The others matter only if the
  // threshold is the bound, and then they are visited in row order.
  __device__ __forceinline__ bool fill(uint32_t bound) {
    Reached low, high;  // of steps 0 ... 31, and 32 ... 63
    look(low, 0, bound);
    look(high, 32, bound);
    const uint32_t all = __reduce_add_sync(kFullWarp, __popc(low.reaches) + __popc(high.reaches));
    const bool plateau = Policy::kBits == 16 && all > kPlateau;
    __syncwarp();
    size = 0;
    uint16_t* to = entries();
#pragma unroll 1
    for (int32_t half = 0; half < s.depth; half += 32) {
      const uint32_t exceeds = half == 0 ? low.exceeds : high.exceeds;
      uint32_t chosen = plateau ? exceeds : half == 0 ? low.reaches : high.reaches;
      const auto entry = [&](int bit) {
        const int32_t step = half + 2 * (bit & 15) + (bit >> 4);
        return static_cast<uint16_t>(unit(step) + (((exceeds >> bit) & 1u) << 15));
      };
      const uint32_t own = __popc(chosen);
      if (__any_sync(kFullWarp, own > Slice::kMany)) {
        // Many units: one step at a time, side by side.
#pragma unroll 1
        for (int bit = 0; bit < 32; ++bit) {
          const uint32_t lanes = __ballot_sync(kFullWarp, (chosen >> bit) & 1u);
          if ((chosen >> bit) & 1u) to[size + __popc(lanes & lanes_below())] = entry(bit);
          size += __popc(lanes);
        }
      } else {
        const uint32_t upto = warp_inclusive_sum(own);
        uint16_t* next = to + size + upto - own;
#pragma unroll 1
        while (chosen != 0) {
          *next++ = entry(__ffs(chosen) - 1);
          chosen &= chosen - 1;
        }
        size += __shfl_sync(kFullWarp, upto, kWarpSize - 1);
      }
    }
    __syncwarp();
    return plateau;
  }

 private:
  // This lane's maxima: a word for steps 2j and 2j + 1 (low and high half), and 32 words further
  // the next two.
  __device__ __forceinline__ uint32_t* maxima() const {
    return reinterpret_cast<uint32_t*>(entries()) + lane_id();
  }

  // Adds the groups of a batch: half units, units, or pairs or fours of units. pairs: the two half
  // maxima of each unit; heads: those of two units each.
  __device__ __forceinline__ void add_groups(const uint32_t (&pairs)[4], uint32_t heads01,
                                             uint32_t heads23, int level) const {
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

  // Which of this lane's units from `step` on reach and exceed the bound: bit i is step + 2 i, and
  // bit 16 + i is the step after it.
  struct Reached {
    uint32_t reaches;
    uint32_t exceeds;
  };
  __device__ __forceinline__ void look(Reached& found, int32_t step, uint32_t bound) const {
    const uint32_t limit = head_pair(bound);
    const uint32_t* from = maxima() + step / 2 * kWarpSize;
    found = {0u, 0u};
    uint32_t bits = 0x00010001u;
#pragma unroll 1
    for (const int32_t end = min(s.depth, step + 32); step < end; step += kBatch) {
#pragma unroll
      for (int i = 0; i < kBatch / 2; ++i) {
        const uint32_t heads = from[i * kWarpSize];
        found.reaches |= H::reaches(heads, limit) & bits;
        if (Policy::kBits == 16) found.exceeds |= H::above(heads, limit) & bits;
        bits <<= 1;
      }
      from += kBatch / 2 * kWarpSize;
    }
    // A float32 head that equals the bound's may belong to a score that exceeds it.
    if (Policy::kBits == 32) found.exceeds = found.reaches;
  }

  static_assert(Config::kSteps <= 64, "two halves of 32 steps");
};

}  // namespace dsv4
