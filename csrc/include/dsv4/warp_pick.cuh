// One digit of a radix select: the bin of a 256-bin histogram at which a running count reaches
// `need`. One warp does it without a barrier, and every warp may do it for itself.
#pragma once

#include <cstdint>

#include "dsv4/common.cuh"
#include "dsv4/ordered_key.cuh"

namespace dsv4 {

constexpr int kLaneBins = kBins / kWarpSize;

struct Pick {
  uint32_t bin;     // smallest bin with count(bins <= bin) >= need
  uint32_t before;  // count in the bins before it; where nothing is found, in all bins
  uint32_t count;   // count in the bin itself
  bool found;       // whether the histogram holds `need` at all
};

// Lane i owns the bins 8i ... 8i + 7 and brings their counts. Bin 0 holds the best.
__device__ __forceinline__ Pick pick_bin(uint32_t (&upto)[kLaneBins], uint32_t need) {
  const int lane = lane_id();
#pragma unroll
  for (int i = 1; i < kLaneBins; ++i) upto[i] += upto[i - 1];
  const uint32_t own = upto[kLaneBins - 1];
  const uint32_t reached = warp_inclusive_sum(own);
  const uint32_t outside = reached - own;
  const uint32_t rest = need - outside;  // meaningful in the owner alone

  uint32_t skipped = 0;
  uint32_t before = 0;
  uint32_t through = own;
#pragma unroll
  for (int i = kLaneBins - 2; i >= 0; --i) {
    if (upto[i] >= rest) through = upto[i];
  }
#pragma unroll
  for (int i = 0; i < kLaneBins - 1; ++i) {
    if (upto[i] < rest) {
      before = upto[i];
      ++skipped;
    }
  }
  const uint32_t lanes = __ballot_sync(kFullWarp, reached >= need);
  const int owner = lanes != 0 ? __ffs(lanes) - 1 : kWarpSize - 1;
  Pick pick;
  pick.found = lanes != 0;
  pick.bin = __shfl_sync(kFullWarp, kLaneBins * lane + skipped, owner);
  pick.before = __shfl_sync(kFullWarp, lanes != 0 ? outside + before : reached, owner);
  pick.count = __shfl_sync(kFullWarp, through - before, owner);
  return pick;
}

__device__ __forceinline__ void load_bins(const uint32_t* hist, uint32_t (&bins)[kLaneBins]) {
  const uint4 low = *reinterpret_cast<const uint4*>(hist + kLaneBins * lane_id());
  const uint4 high = *reinterpret_cast<const uint4*>(hist + kLaneBins * lane_id() + 4);
  bins[0] = low.x;
  bins[1] = low.y;
  bins[2] = low.z;
  bins[3] = low.w;
  bins[4] = high.x;
  bins[5] = high.y;
  bins[6] = high.z;
  bins[7] = high.w;
}

__device__ __forceinline__ Pick pick_bin(const uint32_t* hist, uint32_t need) {
  uint32_t bins[kLaneBins];
  load_bins(hist, bins);
  return pick_bin(bins, need);
}

}  // namespace dsv4
