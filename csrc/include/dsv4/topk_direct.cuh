// The selection from a slice that stays in registers: a coarse bound, how far the scores lie above
// it, and every thread counts its own. Without a bound, or with a threshold too far above it, the
// digits of the scores from the top.
#pragma once

#include <cstdint>

#include "dsv4/topk_slice.cuh"

namespace dsv4 {

template <class Config>
struct DirectSelect {
  using Slice = TopkSlice<Config>;
  using Policy = typename Config::Policy;
  using Unit = typename Policy::Unit;
  using H = typename Policy::H;
  static constexpr int kDirect = Config::kDirect;
  static_assert(kDirect % 2 == 0, "units are looked at in pairs");

  Slice& s;
  Unit u[kDirect];

  __device__ __forceinline__ explicit DirectSelect(Slice& slice) : s(slice) {}

  // False: the row has too few numbers, and nothing was written.
  __device__ __forceinline__ bool run() {
    const int32_t mine = s.begin + threadIdx.x * s.depth;
    load(mine);
    if (s.together()) cluster_wait();  // the start-up barrier: no peer is written to before it runs

    const auto each = [&](auto visit) {
#pragma unroll
      for (int i = 0; i < kDirect; ++i) {
        if (i < s.depth) visit(u[i]);
      }
    };
    Threshold t{};
    bool far = true;
    const uint32_t bound = find_bound();
    if (bound != kNoBound) {
      t = s.finder.above_bound(s.p.k, Slice::full_order(bound), far, true, each);
    }
    if (far) {
      t = s.finder.by_digits(s.p.k, 1, true, each);
      if (t.order >= Policy::kLastOrder && t.need != 0) return false;
    }

    uint32_t above = 0;
    uint32_t equal = 0;
    const uint32_t raw = Policy::raw_of(t.order);
#pragma unroll
    for (int i = 0; i < kDirect; ++i) {
      uint32_t of_unit[2] = {0u, 0u};
      if (i < s.depth) Policy::classify(u[i], raw, of_unit[0], of_unit[1]);
      above |= of_unit[0] << (kUnit * i);
      equal |= of_unit[1] << (kUnit * i);
    }
    const uint32_t own = __popc(above) | (__popc(equal) << Slice::kEqualShift);
    const uint32_t upto = warp_inclusive_sum(own);
    uint2 before = s.counted_before(__shfl_sync(kFullWarp, upto, kWarpSize - 1), t);
    before.x += (upto - own) & Slice::kAboveMask;
    before.y += (upto - own) >> Slice::kEqualShift;
    s.write(s.units.index(mine, 0), Slice::choose(above, equal, before, t.need));
    s.finish(t);
    return true;
  }

 private:
  // A thread takes `depth` units in a row from `mine` on, so that threads are in row order.
  __device__ __forceinline__ void load(int32_t mine) {
    const int32_t held = min(s.depth, s.begin + s.count - mine);  // may be below zero
#pragma unroll
    for (int i = 0; i < kDirect; ++i) {
      u[i] = Policy::pad();
      if (i < held && s.units.whole(mine + i)) u[i] = s.units.load_whole(mine + i);
    }
    if (s.units.whole_begin != 0 || s.units.whole_end != s.units.count) {
#pragma unroll
      for (int i = 0; i < kDirect; ++i) {
        if (i < held && !s.units.whole(mine + i)) u[i] = s.units.load_partial(mine + i);
      }
    }
  }

  // The order of a head that at least k scores of the row reach, or kNoBound. Groups are units
  // where those suffice, then halves of them, then quarters.
  __device__ __forceinline__ uint32_t find_bound() {
    GroupHistogram& groups = s.smem.groups;
    const uint32_t k = s.p.k;
    const uint32_t least = s.least;
    if constexpr (Policy::kOctave > 1u << kOctaveBits) {
      // float16: the distances above a bound do not reach far, so it has to be a fine one.
      const uint32_t wanted = s.groups_wanted();
      if (2 * least < wanted) return kNoBound;
      add_pairs(least >= wanted, [&](uint32_t heads) { groups.add_pair(heads); });
      return s.find_bound(GroupRanks{groups, Policy::kLastHead}).bound;
    } else {
      const uint32_t wanted = k + k / 8;
      const uint32_t share = s.together() ? s.cluster.divide_up(k) : k;
      if (4 * least < share + share / 8) return kNoBound;
      const auto add = [&](uint32_t heads) {
        groups.add_octaves(H::better(heads, Policy::kLastHead * 0x10001u));  // NaN becomes -inf
      };
      if (2 * least >= wanted) {
        add_pairs(least >= wanted, add);
      } else {
#pragma unroll
        for (int i = 0; i < kDirect; ++i) {
          if (i < s.depth) {
            add(Policy::quarters(u[i], 0));
            add(Policy::quarters(u[i], 1));
          }
        }
      }
      const uint32_t bound = s.find_bound(OctaveRanks{groups}).bound;
      return bound < Policy::kLastHead ? bound : kNoBound;
    }
  }

  // Units as groups, or their halves.
  template <class Add>
  __device__ __forceinline__ void add_pairs(bool whole, Add add) {
#pragma unroll
    for (int i = 0; i < kDirect; i += 2) {
      if (i < s.depth) {
        const uint32_t pair0 = Policy::pair(u[i]);
        const uint32_t pair1 = Policy::pair(u[i + 1]);
        if (whole) {
          add(H::unit_maxima(pair0, pair1));
        } else {
          add(pair0);
          add(pair1);
        }
      }
    }
  }
};

}  // namespace dsv4
