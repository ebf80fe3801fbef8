// One digit of a radix select: the bin of a 256-bin histogram that holds the need-th largest key.
#pragma once

#include <cstdint>

#include "dsv4/common.cuh"

namespace dsv4 {

constexpr int kBins = 256;

struct Pick {
  uint32_t bin;    // largest bin with count(bins >= bin) >= need; 0 where all bins hold fewer
  uint32_t above;  // count in the bins above it
  uint32_t count;  // count in the bin itself
  bool found;      // whether the histogram holds `need` keys at all
};

// Every warp computes the same answer for itself from the 1 KB histogram: cheaper than one more
// block barrier to publish it. Lane i owns the eight bins 248 - 8i ... 255 - 8i.
__device__ __forceinline__ Pick pick_bin(const uint32_t* hist, uint32_t need) {
  const int lane = lane_id();
  const int base = kBins - 8 - 8 * lane;
  const uint4 low = *reinterpret_cast<const uint4*>(hist + base);
  const uint4 high = *reinterpret_cast<const uint4*>(hist + base + 4);
  const uint32_t counts[8] = {high.w, high.z, high.y, high.x, low.w, low.z, low.y, low.x};
  uint32_t own = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) own += counts[i];
  const uint32_t upto = warp_inclusive_sum(own);

  Pick pick{0u, upto - own, 0u, false};
  bool open = true;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (open) {
      pick.bin = base + 7 - i;
      pick.count = counts[i];
      if (pick.above + counts[i] >= need || i == 7) {
        open = false;
      } else {
        pick.above += counts[i];
      }
    }
  }
  const uint32_t reached = __ballot_sync(kFullWarp, upto >= need);
  pick.found = reached != 0;
  const int owner = pick.found ? __ffs(reached) - 1 : kWarpSize - 1;
  pick.bin = __shfl_sync(kFullWarp, pick.bin, owner);
  pick.above = __shfl_sync(kFullWarp, pick.above, owner);
  pick.count = __shfl_sync(kFullWarp, pick.count, owner);
  return pick;
}

}  // namespace dsv4
