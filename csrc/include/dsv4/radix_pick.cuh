// One digit of a radix select: the bin of a 256-bin histogram at which a running count reaches
// `need`.
#pragma once

#include <cstdint>

#include "dsv4/common.cuh"

namespace dsv4 {

constexpr int kBins = 256;

struct Pick {
  uint32_t bin;     // smallest bin with count(bins <= bin) >= need; the last where all hold fewer
  uint32_t before;  // count in the bins before it
  uint32_t count;   // count in the bin itself
  bool found;       // whether the histogram holds `need` at all
};

// Bin 0 holds the best keys. Every warp computes the same answer for itself from the 1 KB
// histogram: cheaper than one more block barrier to publish it. Lane i owns the bins 8i ... 8i + 7.
__device__ __forceinline__ Pick pick_bin(const uint32_t* hist, uint32_t need) {
  const int lane = lane_id();
  const uint4 low = *reinterpret_cast<const uint4*>(hist + 8 * lane);
  const uint4 high = *reinterpret_cast<const uint4*>(hist + 8 * lane + 4);
  uint32_t upto[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int i = 1; i < 8; ++i) upto[i] += upto[i - 1];
  const uint32_t own = upto[7];
  const uint32_t reached = warp_inclusive_sum(own);
  const uint32_t outside = reached - own;
  const uint32_t rest = need - outside;  // meaningful in the owner alone

  uint32_t skipped = 0;
  uint32_t before = 0;
  uint32_t through = own;
#pragma unroll
  for (int i = 6; i >= 0; --i) {
    if (upto[i] >= rest) through = upto[i];
  }
#pragma unroll
  for (int i = 0; i < 7; ++i) {
    if (upto[i] < rest) {
      before = upto[i];
      ++skipped;
    }
  }
  const uint32_t lanes = __ballot_sync(kFullWarp, reached >= need);
  const int owner = lanes != 0 ? __ffs(lanes) - 1 : kWarpSize - 1;
  Pick pick;
  pick.found = lanes != 0;
  pick.bin = __shfl_sync(kFullWarp, 8 * lane + skipped, owner);
  pick.before = __shfl_sync(kFullWarp, outside + before, owner);
  pick.count = __shfl_sync(kFullWarp, through - before, owner);
  return pick;
}

}  // namespace dsv4
