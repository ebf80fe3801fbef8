// Top-k of rows of any width: one CTA a row, which reads the scores once per digit and twice more
// to write the answer. Nothing has to fit on chip, so this is what serves rows no cluster can hold.
#pragma once

#include "dsv4/radix_pick.cuh"
#include "dsv4/row_vectors.cuh"
#include "dsv4/topk_sort.cuh"

namespace dsv4 {

struct TopkWideSmem {
  static constexpr int kThreads = 1024;
  static constexpr int kWarps = kThreads / kWarpSize;
  static_assert(kTopkMax == 2048, "entries holds the largest k, a power of two");

  alignas(16) uint32_t hist[4][kBins];  // one per digit, so none has to be cleared in between
  uint32_t above[kWarps];
  uint32_t equal[kWarps];
  uint64_t entries[kTopkMax];
};

template <class Policy>
__global__ __launch_bounds__(TopkWideSmem::kThreads) void topk_wide_kernel(
    const __grid_constant__ TopkParams p) {
  constexpr int kThreads = TopkWideSmem::kThreads;
  constexpr int kWarps = TopkWideSmem::kWarps;
  constexpr int kDigits = Policy::kBits / 8;
  __shared__ TopkWideSmem smem;

  pdl_launch_dependents();
  const int lane = lane_id();
  const int warp = warp_id();
  const int32_t row = blockIdx.x;
  for (int i = threadIdx.x; i < 4 * kBins; i += kThreads) smem.hist[0][i] = 0;
  __syncthreads();
  const WindowSource source(p, row);
  pdl_wait();

  const RowWindow window = source.read(p);
  const RowOutput output(p, row);
  if (window.length <= p.k) {
    output.write_all(window.length, p.k);
    return;
  }
  const RowVectors<Policy> vectors(p, row, window);
  const auto load = [&](int32_t g) {
    return vectors.whole(g) ? vectors.load_whole(g) : vectors.load_partial(g);
  };

  // 1. The threshold, digit by digit: after the last one, `need` of the keys equal to `prefix` (in
  //    the digits seen so far) are chosen, and every key above it.
  uint32_t prefix = 0;
  uint32_t need = p.k;
  int shift = Policy::kBits;
  for (int digit = 0; digit < kDigits; ++digit) {
    shift -= 8;
    for (int32_t g = threadIdx.x; g < vectors.count; g += kThreads) {
      const uint4 v = load(g);
#pragma unroll
      for (int e = 0; e < Policy::kElems; ++e) {
        const uint32_t key = Policy::key(Policy::element(v, e)) >> shift;
        if ((digit == 0 || key >> 8 == prefix) && vectors.valid(vectors.index(g, e))) {
          atomicAdd(&smem.hist[digit][255u - (key & 255u)], 1u);
        }
      }
    }
    __syncthreads();
    const Pick pick = pick_bin(smem.hist[digit], need);
    prefix = (prefix << 8) | (255u - pick.bin);
    need -= pick.before;
    if (pick.count == need) break;  // the whole bin is chosen: later digits decide nothing
  }

  // 2. Each warp counts its own run of vectors; the runs follow each other in row order.
  const int32_t run =
      static_cast<int32_t>(ceil_div(ceil_div(vectors.count, kWarps), kWarpSize)) * kWarpSize;
  const int32_t begin = min(vectors.count, warp * run);
  const int32_t end = min(vectors.count, begin + run);
  uint32_t above = 0;
  uint32_t equal = 0;
  const auto classify = [&](int32_t g, uint4 v, uint32_t& gt_mask, uint32_t& eq_mask) {
    gt_mask = eq_mask = 0;
#pragma unroll
    for (int e = 0; e < Policy::kElems; ++e) {
      const uint32_t key = Policy::key(Policy::element(v, e)) >> shift;
      if (!vectors.valid(vectors.index(g, e))) continue;
      gt_mask |= static_cast<uint32_t>(key > prefix) << e;
      eq_mask |= static_cast<uint32_t>(key == prefix) << e;
    }
  };
  uint32_t gt_mask;
  uint32_t eq_mask;
  for (int32_t g = begin + lane; g < end; g += kWarpSize) {
    classify(g, load(g), gt_mask, eq_mask);
    above += __popc(gt_mask);
    equal += __popc(eq_mask);
  }
  above = __reduce_add_sync(kFullWarp, above);
  equal = __reduce_add_sync(kFullWarp, equal);
  if (lane == 0) {
    smem.above[warp] = above;
    smem.equal[warp] = equal;
  }
  __syncthreads();
  above = __reduce_add_sync(kFullWarp, lane < warp ? smem.above[lane] : 0u);
  equal = __reduce_add_sync(kFullWarp, lane < warp ? smem.equal[lane] : 0u);

  // 3. Ascending positions: everything above the threshold, and the first `need` of its equals.
  for (int32_t g0 = begin; g0 < end; g0 += kWarpSize) {
    const int32_t g = g0 + lane;
    uint4 v = Policy::pad();
    gt_mask = eq_mask = 0;
    if (g < end) {
      v = load(g);
      classify(g, v, gt_mask, eq_mask);
    }
    const uint32_t own_above = __popc(gt_mask);
    const uint32_t own_equal = __popc(eq_mask);
    const uint32_t upto_above = warp_inclusive_sum(own_above);
    const uint32_t upto_equal = warp_inclusive_sum(own_equal);
    uint32_t gt = above + upto_above - own_above;
    uint32_t eq = equal + upto_equal - own_equal;
#pragma unroll
    for (int e = 0; e < Policy::kElems; ++e) {
      const bool is_gt = (gt_mask >> e) & 1u;
      const bool is_eq = (eq_mask >> e) & 1u;
      if (is_gt || (is_eq && eq < need)) {
        const uint32_t position = gt + min(eq, need);
        const int32_t index = vectors.index(g, e);
        if (p.sort) {
          smem.entries[position] = sort_entry(Policy::key(Policy::element(v, e)), index);
        } else {
          output.write(position, index);
        }
      }
      gt += is_gt;
      eq += is_eq;
    }
    above += __shfl_sync(kFullWarp, upto_above, kWarpSize - 1);
    equal += __shfl_sync(kFullWarp, upto_equal, kWarpSize - 1);
  }
  if (p.sort) {
    __syncthreads();
    sort_and_write(smem.entries, p.k, output);
  }
}

}  // namespace dsv4
