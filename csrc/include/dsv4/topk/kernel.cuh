// Exact top-k of a row: one CTA, or a cluster of C CTAs with one slice of the row each. Every score
// is read from memory once.
//
//   1. scores     a short slice goes to registers (units_in_registers.cuh); of a longer one the
//                 maximum of every unit goes to shared memory (units_in_smem.cuh)
//   2. bound      a value that at least k scores reach, from a histogram of the maxima of groups
//                 (bound.cuh). The CTAs of a cluster exchange their bounds.
//   3. list       for a longer slice: the units that reach the bound, few more than k
//   4. threshold  from how far the scores lie above the bound                 threshold.cuh
//   5. masks      which scores lie above the threshold, which equal it        select_row.cuh
//   6. write      counts in row order, ascending positions                    cta_slice.cuh
//
// With kGuesses, for rows of one CTA, steps 1 to 3 of a longer row are a guess of the threshold and
// a list of the scores that reach it (select_guessed.cuh).
//
// The row's own length decides everything, on the device and whatever the width of the buffer. Rank
// 0 serves a row of up to plan.solo_units alone. Half of the cluster serves a row of up to
// plan.half_units. The other CTAs leave.
#pragma once

#include <cstddef>

#include "dsv4/topk/select_guessed.cuh"
#include "dsv4/topk/select_row.cuh"
#include "dsv4/topk/wide.cuh"

namespace dsv4 {

template <class Config>
__global__ __launch_bounds__(Config::kThreads, Config::kMinBlocks) void topk_kernel(
    const __grid_constant__ typename Config::Form::Params p,
    const __grid_constant__ TopkPlan plan) {
  using Policy = typename Config::Policy;
  using Output = typename Config::Form::Output;
  using Smem = TopkSmem<Config>;
  extern __shared__ __align__(16) unsigned char memory[];
  Smem& smem = *reinterpret_cast<Smem*>(memory);

  // Before griddepcontrol.wait: nothing here touches global memory.
  ClusterShape cluster = ClusterShape::alone();
  if constexpr (Config::kCluster) {
    cluster = ClusterShape::of_launch();
    if (threadIdx.x == 0) {
      barrier_init(&smem.bounds_barrier);
      barrier_init(&smem.equals_barrier);
      smem.threshold.init_barriers();
      barrier_init_fence();
    }
    cluster_arrive_relaxed();
  }
  clear_memory<Config>(memory, plan);
  __syncthreads();
  const int32_t row = Config::kCluster ? blockIdx.x / cluster.size : blockIdx.x;
  const typename Config::Form::Source source(p, row);
  const auto* scores =
      static_cast<const typename Policy::Scalar*>(p.logits) + row * p.logits_stride;
  const auto wait = [] {
    pdl_wait();
    // Not before the wait. Otherwise kernels after the next would start as well, and their waiting
    // CTAs would crowd those of one launch onto few multiprocessors (128 x 8K: 5.3 us instead of
    // 4.0).
    pdl_launch_dependents();
  };
  const bool early = Config::Form::early(p);
  if (!early) wait();

  const typename Config::Form::Window window = source.read(p);
  if (cluster.rank == 0) p.write_count(row, window.length);
  bool joined = false;
  if (window.length <= p.k) {
    if (early) wait();  // the page table may be in an L1
    if (cluster.rank == 0) Output(p, row, window).write_all(window.length, p.k);
  } else {
    Output::start(p, row, window, cluster.rank, cluster.size);
    const RowUnits<Policy> units(scores, window);
    const bool together = Config::kCluster && units.count > plan.solo_units;
    if (!together) cluster.size = 1;
    if (together && units.count <= plan.half_units) cluster = cluster.half();
    if (cluster.rank < cluster.size) {
      TopkSlice<Config> slice(p, plan, smem, units, row, cluster);
      Output::keep(p, row, window, slice.kept(), slice.begin, slice.count);
      joined = true;
      if (early) wait();
      const int32_t share = together ? cluster.divide_up(units.count) : units.count;
      const bool held = share <= Config::kHeld * Config::kThreads;
      if constexpr (Config::kGuesses) {
        if (!GuessedSteps<Config>(slice, held).run()) select_again<Config>(p, plan, memory);
      } else if (!TopkSteps<Config>(slice, held).run() && cluster.rank == 0) {
        // The remaining rows: those with fewer numbers than a bound needs, and those with a
        // threshold of -inf.
        __syncthreads();
        // Not over TopkSmem: the memory of a live mbarrier must not hold anything else. When it
        // did, one row of some thousands came out with the state of the four barriers instead of
        // its first four entries.
        wide_select<typename Config::Form, Policy, Config::kThreads>(p, row, scores, window,
                                                                     memory + sizeof(Smem));
      }
    }
  }
  Output::started();
  if constexpr (Config::kCluster) {
    if (!joined) cluster_wait();  // no CTA may leave in the middle of the start-up barrier
  }
  if (early && !joined) wait();  // the next launch also relies on the kernel before this one
}

}  // namespace dsv4
