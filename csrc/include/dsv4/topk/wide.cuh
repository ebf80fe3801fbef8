// Top-k of a row of any width and any content, by one CTA. It reads the scores once per digit, and
// twice more to write the answer. Nothing has to fit on the chip, and no score has to be a number.
// So it serves rows that no cluster can hold, and rows with fewer than k groups of numbers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dsv4/topk/radix_digit.cuh"
#include "dsv4/topk/row_units.cuh"
#include "dsv4/topk/sort.cuh"

namespace dsv4 {

template <int kThreads>
struct TopkWideSmem {
  static constexpr int kWarps = kThreads / kWarpSize;
  static_assert(kTopkMax == 2048, "entries holds the largest k, a power of two");

  // one per digit, so no histogram has to be cleared in between
  alignas(16) uint32_t hist[4][kBins];
  uint32_t above[kWarps];
  uint32_t equal[kWarps];
  uint64_t entries[kTopkMax];  // last: without sort it needs no memory

  static constexpr size_t bytes(bool sort) {
    return sort ? sizeof(TopkWideSmem) : offsetof(TopkWideSmem, entries);
  }
};

// The row is longer than k. `scores`: its column 0. `memory` has room for TopkWideSmem and belongs
// to the block. The window comes by value: a reference would keep the caller's in local memory.
template <class Form, class Policy, int kThreads>
__device__ __noinline__ void wide_select(const typename Form::Params& p, int32_t row,
                                         const typename Policy::Scalar* scores,
                                         typename Form::Window window, void* memory) {
  const RowUnits<Policy> units(scores, window);
  constexpr int kWarps = kThreads / kWarpSize;
  constexpr int kDigits = Policy::kBits / 8;
  TopkWideSmem<kThreads>& smem = *static_cast<TopkWideSmem<kThreads>*>(memory);
  const int lane = lane_id();
  const int warp = warp_id();
  for (int i = threadIdx.x; i < 4 * kBins; i += kThreads) smem.hist[0][i] = 0;
  __syncthreads();

  // 1. The threshold, digit by digit. After the last digit, `need` of the scores whose order is
  //    `prefix` (in the digits seen so far) are chosen, and every score before them.
  uint32_t prefix = 0;
  uint32_t need = p.k;
  int shift = Policy::kBits;
  for (int digit = 0; digit < kDigits; ++digit) {
    shift -= 8;
    for (int32_t g = threadIdx.x; g < units.count; g += kThreads) {
      const typename Policy::Unit u = units.load(g);
#pragma unroll
      for (int e = 0; e < kUnit; ++e) {
        const uint32_t digits = Policy::sort_order(Policy::element(u, e)) >> shift;
        if ((digit == 0 || digits >> 8 == prefix) && units.valid(units.index(g, e))) {
          atomicAdd(&smem.hist[digit][digits & 255u], 1u);
        }
      }
    }
    __syncthreads();
    const Pick pick = pick_bin(smem.hist[digit], need);
    prefix = (prefix << 8) | pick.bin;
    need -= pick.before;
    if (pick.count == need) break;  // the whole bin is chosen: later digits decide nothing
  }

  // 2. Each warp counts its own run of units; the runs follow each other in row order.
  const int32_t run =
      static_cast<int32_t>(ceil_div(ceil_div(units.count, kWarps), kWarpSize)) * kWarpSize;
  const int32_t begin = min(units.count, warp * run);
  const int32_t end = min(units.count, begin + run);
  uint32_t above = 0;
  uint32_t equal = 0;
  const auto classify = [&](int32_t g, const typename Policy::Unit& u, uint32_t& above_mask,
                            uint32_t& equal_mask) {
    above_mask = equal_mask = 0;
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
      const uint32_t digits = Policy::sort_order(Policy::element(u, e)) >> shift;
      if (!units.valid(units.index(g, e))) continue;
      above_mask |= static_cast<uint32_t>(digits < prefix) << e;
      equal_mask |= static_cast<uint32_t>(digits == prefix) << e;
    }
  };
  uint32_t above_mask;
  uint32_t equal_mask;
  for (int32_t g = begin + lane; g < end; g += kWarpSize) {
    classify(g, units.load(g), above_mask, equal_mask);
    above += __popc(above_mask);
    equal += __popc(equal_mask);
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

  // 3. Ascending positions: every score above the threshold, and the first `need` scores equal to
  // it.
  const typename Form::Output output(p, row, window);
  for (int32_t first = begin; first < end; first += kWarpSize) {
    const int32_t g = first + lane;
    typename Policy::Unit u = Policy::pad();
    above_mask = equal_mask = 0;
    if (g < end) {
      u = units.load(g);
      classify(g, u, above_mask, equal_mask);
    }
    const uint32_t own_above = __popc(above_mask);
    const uint32_t own_equal = __popc(equal_mask);
    const uint32_t upto_above = warp_inclusive_sum(own_above);
    const uint32_t upto_equal = warp_inclusive_sum(own_equal);
    uint32_t gt = above + upto_above - own_above;
    uint32_t eq = equal + upto_equal - own_equal;
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
      const bool is_gt = (above_mask >> e) & 1u;
      const bool is_eq = (equal_mask >> e) & 1u;
      if (is_gt || (is_eq && eq < need)) {
        const uint32_t position = gt + min(eq, need);
        const int32_t index = units.index(g, e);
        if (Form::kSorts && p.sort) {
          smem.entries[position] = sort_entry(Policy::sort_order(Policy::element(u, e)), index);
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
  if constexpr (Form::kSorts) {
    if (p.sort) {
      __syncthreads();
      sort_and_write(smem.entries, p.k, output);
    }
  }
}

template <class Policy, int kThreads>
__global__ __launch_bounds__(kThreads) void topk_wide_kernel(const __grid_constant__ TopkParams p) {
  __shared__ TopkWideSmem<kThreads> smem;
  const int32_t row = blockIdx.x;
  const WindowSource source(p, row);
  const auto* scores =
      static_cast<const typename Policy::Scalar*>(p.logits) + row * p.logits_stride;
  pdl_wait();
  pdl_launch_dependents();
  const RowWindow window = source.read(p);
  p.write_count(row, window.length);
  if (window.length <= p.k) {
    RowOutput(p, row, window).write_all(window.length, p.k);
  } else {
    wide_select<RowForm, Policy, kThreads>(p, row, scores, window, &smem);
  }
}

}  // namespace dsv4
