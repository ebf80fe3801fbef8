// A slice that stays in registers: a thread holds up to kHeld consecutive units, so that threads
// are in row order. Every step examines all of the scores, so a coarse bound is enough.
#pragma once

#include <cstdint>

#include "dsv4/topk/cta_slice.cuh"

namespace dsv4 {

template <class Config>
struct HeldUnits {
  using Slice = TopkSlice<Config>;
  using Policy = typename Config::Policy;
  using Unit = typename Policy::Unit;
  using H = typename Policy::H;
  static constexpr int kHeld = Config::kHeld;
  static_assert(kHeld % 2 == 0, "units are looked at in pairs");
  // In float16 the distances above a bound do not reach far, so the bound has to be fine.
  static constexpr bool kOctaves = Policy::kOctave <= 1u << kOctaveBits;

  const Slice& s;
  Unit (&u)[kHeld];

  __device__ __forceinline__ int32_t first_unit() const {  // of the row
    return s.begin + threadIdx.x * s.depth;
  }

  __device__ __forceinline__ void load() const {
    const int32_t end = s.begin + s.count;
    const int32_t first = s.begin + warp_id() * kWarpSize * s.depth;  // of the warp
    const int32_t past = min(first + kWarpSize * s.depth, end);
    const int32_t mine = first_unit();
    const auto each = [&](auto load_unit) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        u[i] = Policy::pad();
        if (i < s.depth && mine + i < end) u[i] = load_unit(mine + i);
      }
    };
    if (first >= s.units.whole_begin && past <= s.units.whole_end) {
      each([&](int32_t g) { return s.units.load_whole(g); });
    } else {
      s.units.keep_edges(s.smem.edges, [&](int32_t g) { return g >= first && g < past; });
      each([&](int32_t g) { return s.units.load(g, s.smem.edges); });
    }
  }

  // Counts groups of scores by their maxima. The groups are units, halves or quarters: the largest
  // size that gives more groups than the rank asked of them. If no size does, they are single
  // scores. False: there are too few scores.
  __device__ __forceinline__ bool add_groups() const {
    GroupHistogram& groups = s.smem.groups;
    const uint32_t least = s.least;
    if constexpr (kOctaves) {
      const uint32_t k = s.p.k;
      // A row of one CTA wants twice as many groups. The fewer groups there are, the further their
      // k-th lies below the threshold, and close to zero that is soon a distance of two octaves.
      const uint32_t wanted = s.together() ? k + k / 8 : 2 * k + k / 4;
      const uint32_t share = s.together() ? s.cluster.divide_up(k) : k;
      const auto add = [&](uint32_t heads) {
        groups.add_octaves(H::better(heads, Policy::kLastHead * 0x10001u));  // NaN becomes -inf
      };
      if (2 * least >= wanted) {
        add_pairs(least >= wanted, add);
      } else if (!s.together() && 4 * least < wanted && s.depth <= 2) {
        // Every score is a group: the bound's octave is the threshold's.
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (i < s.depth) {
#pragma unroll
            for (int j = 0; j < 4; ++j) add(Policy::singles(u[i], j));
          }
        }
      } else if (4 * least < share + share / 8) {
        return false;
      } else {
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
          if (i < s.depth) {
            add(Policy::quarters(u[i], 0));
            add(Policy::quarters(u[i], 1));
          }
        }
      }
    } else {
      const uint32_t wanted = s.groups_wanted();
      if (2 * least < wanted) return false;
      add_pairs(least >= wanted, [&](uint32_t heads) { groups.add_pair(heads); });
    }
    return true;
  }

  // Writes the chosen indices. Every thread examines its own scores; the counts of the threads
  // before it say where its part of the answer goes.
  __device__ __forceinline__ void write(const Threshold& t) const {
    uint32_t above = 0;
    uint32_t equal = 0;
    const uint32_t raw = Policy::raw_of(t.order);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      uint32_t of_unit[2] = {0u, 0u};
      if (i < s.depth) Policy::classify(u[i], raw, of_unit[0], of_unit[1]);
      above |= of_unit[0] << (kUnit * i);
      equal |= of_unit[1] << (kUnit * i);
    }
    const uint32_t own = __popc(above) | (__popc(equal) << Slice::kEqualShift);
    const uint2 before = s.counted_before(own, t);
    s.write(s.units.index(first_unit(), 0), Slice::choose(above, equal, before, t.need));
  }

 private:
  // Adds units, or their halves, as groups.
  template <class Add>
  __device__ __forceinline__ void add_pairs(bool whole, Add add) const {
#pragma unroll
    for (int i = 0; i < kHeld; i += 2) {
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
