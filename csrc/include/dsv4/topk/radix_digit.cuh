// One digit of a radix select: the bin of a 256-bin histogram at which a running count reaches
// `need`. One warp finds it without a barrier; every warp may do it for itself.
#pragma once

#include <cstdint>

#include "dsv4/common/warp.cuh"
#include "dsv4/topk/ordered_key.cuh"

namespace dsv4 {

constexpr int kLaneBins = kBins / kWarpSize;

struct Pick {
  uint32_t bin;     // smallest bin with count(bins <= bin) >= need
  uint32_t before;  // count in the bins before it; if no bin is found, in all bins
  uint32_t count;   // count in the bin itself
  bool found;       // whether the histogram holds `need` at all
};

// Lane i owns the bins 8i ... 8i + 7 and passes their counts; bin 0 holds the best. One lane calls
// take(pick): the lane that owns the bin, or the last lane if no bin is found.
template <class Take>
__device__ __forceinline__ void pick_bin(const uint32_t (&bins)[kLaneBins], uint32_t need,
                                         Take take) {
  static_assert(kLaneBins == 8, "a tree over eight bins");
  // Running counts, each in the fewest steps, so that they are ready before the sum over the lanes.
  const uint32_t upto2 = bins[0] + bins[1];
  const uint32_t upto4 = upto2 + (bins[2] + bins[3]);
  const uint32_t upto6 = upto4 + (bins[4] + bins[5]);
  const uint32_t upto3 = upto2 + bins[2];
  const uint32_t upto5 = upto4 + bins[4];
  const uint32_t upto7 = upto6 + bins[6];
  const uint32_t own = upto6 + (bins[6] + bins[7]);
  const uint32_t reached = warp_inclusive_sum(own);
  const uint32_t outside = reached - own;
  if (outside < need && need <= reached) {
    // Halves [begin, end) three times; keeps the counts before the bin and with it.
    const uint32_t rest = need - outside;
    const bool four = upto4 < rest;
    uint32_t begin = four ? upto4 : 0u;
    uint32_t end = four ? own : upto4;
    const uint32_t middle = four ? upto6 : upto2;
    const bool two = middle < rest;
    begin = two ? middle : begin;
    end = two ? end : middle;
    const uint32_t last = two ? (four ? upto7 : upto3) : (four ? upto5 : bins[0]);
    const bool one = last < rest;
    begin = one ? last : begin;
    end = one ? end : last;
    const uint32_t skipped = (four ? 4u : 0u) + (two ? 2u : 0u) + (one ? 1u : 0u);
    take(Pick{kLaneBins * lane_id() + skipped, outside + begin, end - begin, true});
  } else if (lane_id() == kWarpSize - 1 && reached < need) {
    take(Pick{kBins - 1, reached, 0u, false});
  }
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

// The same for a histogram in memory; every lane gets the answer.
__device__ __forceinline__ Pick pick_bin(const uint32_t* hist, uint32_t need) {
  uint32_t bins[kLaneBins];
  load_bins(hist, bins);
  Pick mine{};
  bool taken = false;
  pick_bin(bins, need, [&](const Pick& pick) {
    mine = pick;
    taken = true;
  });
  const int owner = __ffs(__ballot_sync(kFullWarp, taken)) - 1;
  return {__shfl_sync(kFullWarp, mine.bin, owner), __shfl_sync(kFullWarp, mine.before, owner),
          __shfl_sync(kFullWarp, mine.count, owner),
          __shfl_sync(kFullWarp, static_cast<int>(mine.found), owner) != 0};
}

}  // namespace dsv4
