// A lower bound of the row's threshold from a histogram of group maxima.
//
// Maxima of disjoint groups are distinct scores. So if r groups reach a value, r scores do, and no
// score below it can be among the r largest. This holds for any data. There are two resolutions:
//
//   GroupRanks    one bin for each value of the upper 12 bits of an order (bfloat16: eight bins per
//                 octave), and a coarse bin for 32 of those, so that a warp finds a rank with two
//                 scans and no barrier. For slices that are listed: the bound decides how many
//                 units are listed.
//   OctaveRanks   the upper nine bits (bfloat16: one bin per octave): one atomic per group and one
//                 scan. For slices in registers, where all scores are examined anyway. A threshold
//                 in the bound's bin or the next is less than 256 heads above the bound.
#pragma once

#include <cstdint>

#include "dsv4/common/warp.cuh"
#include "dsv4/topk/ordered_key.cuh"
#include "dsv4/topk/radix_digit.cuh"

namespace dsv4 {

constexpr int kFineBins = 1 << 12;
constexpr int kCoarseBins = kFineBins / kWarpSize;
constexpr int kOctaveBits = 7;  // bits of a head below its octave
constexpr int kOctaveBins = 1 << (16 - kOctaveBits);
constexpr uint32_t kNoBound = 0xffffu;

struct GroupHistogram {
  alignas(16) uint32_t fine[kFineBins];  // bin 0 holds only NaN
  uint32_t coarse[kCoarseBins];

  // Adds two groups, given the packed heads of their maxima.
  __device__ __forceinline__ void add_pair(uint32_t heads) {
    const uint32_t order = order_pair(heads);
    add((order >> 4) & 0xfffu);
    add(order >> 20);
  }
  __device__ __forceinline__ void add(uint32_t bin) {
    atomicAdd(fine + bin, 1u);
    atomicAdd(coarse + bin / kWarpSize, 1u);
  }
  // The same by octave, in the first of the fine bins. No head may be NaN.
  __device__ __forceinline__ void add_octaves(uint32_t heads) {
    const uint32_t order = order_pair(heads);
    atomicAdd(fine + ((order >> kOctaveBits) & (kOctaveBins - 1)), 1u);
    atomicAdd(fine + (order >> (16 + kOctaveBits)), 1u);
  }
};

struct GroupPick {
  uint32_t bound;    // order of a head; kNoBound if fewer than `rank` groups hold a number
  uint32_t reached;  // groups that reach the bound
  uint32_t before;   // those of the better bins (GroupRanks)
};

// A whole warp uses each of the two after the histogram is complete and visible to it. One lane
// calls take(GroupPick).
struct GroupRanks {
  const GroupHistogram& hist;
  const uint32_t last_head;

  template <class Take>
  __device__ __forceinline__ void pick(uint32_t rank, Take take) const {
    const int lane = lane_id();
    // Lane i: running counts of the coarse bins 4i ... 4i + 3.
    const uint4 own = *reinterpret_cast<const uint4*>(hist.coarse + 4 * lane);
    uint32_t upto[4];
    upto[0] = own.x - (lane == 0 ? hist.fine[0] : 0u);
    upto[1] = upto[0] + own.y;
    upto[2] = upto[1] + own.z;
    upto[3] = upto[2] + own.w;
    const uint32_t reached = warp_inclusive_sum(upto[3]);
    const uint32_t lanes = __ballot_sync(kFullWarp, reached >= rank);
    if (lanes == 0) {
      if (lane == 0) take(GroupPick{kNoBound, 0u, 0u});
      return;
    }
    const int owner = __ffs(lanes) - 1;
    const uint32_t outside = reached - upto[3];
    const uint32_t rest = rank - outside;  // meaningful only in the lane that owns the rank
    const uint32_t quarter = (upto[0] < rest) + (upto[1] < rest) + (upto[2] < rest);
    const uint32_t skipped = quarter == 0   ? 0u
                             : quarter == 1 ? upto[0]
                             : quarter == 2 ? upto[1]
                                            : upto[2];
    const uint32_t packed = __shfl_sync(
        kFullWarp, (static_cast<uint32_t>(4 * lane + quarter) << 24) | (outside + skipped), owner);
    const uint32_t chunk = packed >> 24;
    const uint32_t before = packed & 0xffffffu;  // below rank
    uint32_t in_bin = hist.fine[kWarpSize * chunk + lane];
    if (chunk == 0 && lane == 0) in_bin = 0;
    const uint32_t through = before + warp_inclusive_sum(in_bin);
    const int in_chunk = __ffs(__ballot_sync(kFullWarp, through >= rank)) - 1;
    if (lane == in_chunk) {
      take(GroupPick{min(16 * (kWarpSize * chunk + in_chunk) + 15, last_head), through,
                     through - in_bin});
    }
  }
};

struct OctaveRanks {
  const GroupHistogram& hist;

  template <class Take>
  __device__ __forceinline__ void pick(uint32_t rank, Take take) const {
    static_assert(kOctaveBins == 2 * kBins, "two bins as one of topk/radix_digit.cuh");
    const uint4* own = reinterpret_cast<const uint4*>(hist.fine) + 4 * lane_id();
    uint32_t pairs[kLaneBins];
#pragma unroll
    for (int i = 0; i < kLaneBins / 2; ++i) {
      const uint4 v = own[i];
      pairs[2 * i] = v.x + v.y;
      pairs[2 * i + 1] = v.z + v.w;
    }
    pick_bin(pairs, rank, [&](const Pick& pick) {
      if (!pick.found) return take(GroupPick{kNoBound, 0u, 0u});
      const uint32_t first = pick.before + hist.fine[2 * pick.bin];
      const uint32_t bin = 2 * pick.bin + (first < rank ? 1u : 0u);
      const uint32_t last = (bin << kOctaveBits) + (1u << kOctaveBits) - 1u;
      take(GroupPick{last, first < rank ? pick.before + pick.count : first, 0u});
    });
  }
};

}  // namespace dsv4
