// A lower bound of the row's threshold from a histogram of group maxima.
//
// Maxima of disjoint groups are distinct scores, so if r groups reach a value, r scores do: nothing
// below it can be among the r largest. True of any data. The histogram has one bin for each value
// of the upper 12 bits of an order (bfloat16: eight bins an octave), and a coarse one over 32 of
// those, so that a warp finds a rank with two scans and no barrier.
#pragma once

#include <cstdint>

#include "dsv4/common.cuh"
#include "dsv4/ordered_key.cuh"

namespace dsv4 {

constexpr int kFineBins = 1 << 12;
constexpr int kCoarseBins = kFineBins / kWarpSize;
constexpr uint32_t kNoBound = 0xffffu;

struct GroupHistogram {
  alignas(16) uint32_t fine[kFineBins];  // bin 0 holds NaN and nothing else
  uint32_t coarse[kCoarseBins];

  // Adds two groups by the packed heads of their maxima.
  __device__ __forceinline__ void add_pair(uint32_t heads) {
    const uint32_t order = order_pair(heads);
    add((order >> 4) & 0xfffu);
    add(order >> 20);
  }
  __device__ __forceinline__ void add(uint32_t bin) {
    atomicAdd(fine + bin, 1u);
    atomicAdd(coarse + bin / kWarpSize, 1u);
  }
};

struct GroupPick {
  uint32_t bound;    // order of a head; kNoBound where fewer than `rank` groups hold a number
  uint32_t reached;  // groups that reach it
};

// Made by a whole warp; the histogram is complete and visible to it.
struct GroupRanks {
  const GroupHistogram& hist;
  uint32_t upto[4];  // lane i: running counts of the coarse bins 4i ... 4i + 3
  uint32_t reached;

  __device__ __forceinline__ explicit GroupRanks(const GroupHistogram& h) : hist(h) {
    const uint4 own = *reinterpret_cast<const uint4*>(h.coarse + 4 * lane_id());
    upto[0] = own.x - (lane_id() == 0 ? h.fine[0] : 0u);
    upto[1] = upto[0] + own.y;
    upto[2] = upto[1] + own.z;
    upto[3] = upto[2] + own.w;
    reached = warp_inclusive_sum(upto[3]);
  }

  __device__ __forceinline__ GroupPick pick(uint32_t rank, uint32_t last_head) const {
    const int lane = lane_id();
    const uint32_t lanes = __ballot_sync(kFullWarp, reached >= rank);
    if (lanes == 0) return {kNoBound, 0u};
    const int owner = __ffs(lanes) - 1;
    const uint32_t outside = reached - upto[3];
    const uint32_t rest = rank - outside;  // meaningful in the owner alone
    const uint32_t quarter = (upto[0] < rest) + (upto[1] < rest) + (upto[2] < rest);
    const uint32_t skipped = quarter == 0   ? 0u
                             : quarter == 1 ? upto[0]
                             : quarter == 2 ? upto[1]
                                            : upto[2];
    const uint32_t packed = __shfl_sync(
        kFullWarp, (static_cast<uint32_t>(4 * lane + quarter) << 24) | (outside + skipped), owner);
    const uint32_t chunk = packed >> 24;
    const uint32_t before = packed & 0xffffffu;  // below rank
    uint32_t own = hist.fine[kWarpSize * chunk + lane];
    if (chunk == 0 && lane == 0) own = 0;
    const uint32_t through = before + warp_inclusive_sum(own);
    const int in_chunk = __ffs(__ballot_sync(kFullWarp, through >= rank)) - 1;
    const uint32_t bin = kWarpSize * chunk + in_chunk;
    return {min(16 * bin + 15, last_head), __shfl_sync(kFullWarp, through, in_chunk)};
  }
};

}  // namespace dsv4
