// One CTA's slice of a row: the units that it has, the bound and the counts that it shares with the
// other slices, and how the chosen indices get to their positions.
#pragma once

#include <cstdint>

#include "dsv4/topk/config.cuh"
#include "dsv4/topk/row_units.cuh"
#include "dsv4/topk/sort.cuh"

namespace dsv4 {

// Sets the memory that is zero when a row begins. A barrier of the CTA must follow.
template <class Config>
__device__ __forceinline__ void clear_memory(unsigned char* memory, const TopkPlan& plan) {
  using Smem = TopkSmem<Config>;
  const auto clear = [](void* begin, int bytes) {
    uint4* words = static_cast<uint4*>(begin);
#pragma unroll 1
    for (int i = threadIdx.x; i < bytes / 16; i += Config::kThreads) {
      words[i] = make_uint4(0, 0, 0, 0);
    }
  };
  static_assert(Smem::kZeroBytes % 16 == 0 && sizeof(Smem) % 16 == 0, "whole words");
  static_assert(offsetof(Smem, threshold) == sizeof(GroupHistogram), "one run of zeros");
  clear(memory, Smem::kZeroBytes);
  if (plan.list_steps > 0) {
    clear(memory + sizeof(Smem), Config::kThreads * plan.mask_steps * sizeof(uint16_t));
  }
}

template <class Config>
struct TopkSlice {
  using Policy = typename Config::Policy;
  using Smem = TopkSmem<Config>;
  static constexpr int kThreads = Config::kThreads;
  static constexpr int kWarps = Config::kWarps;
  // Counts are packed: those above the threshold in the low 12 bits, those equal to it in the high
  // 20.
  static constexpr int kEqualShift = 12;
  static constexpr uint32_t kAboveMask = (1u << kEqualShift) - 1u;
  static_assert(kTopkMax < 1 << kEqualShift, "fewer than k lie above");
  static_assert(Config::kMaxUnits * kUnit < 1 << (32 - kEqualShift), "all may be equal");

  using Params = typename Config::Form::Params;
  using Output = typename Config::Form::Output;

  const Params& p;
  const TopkPlan& plan;
  Smem& smem;
  const RowUnits<Policy>& units;
  const int32_t row;
  const ClusterShape cluster;  // size 1: one CTA alone
  ThresholdFinder<Policy, kThreads, Config::kGuesses> finder;
  int32_t begin;  // this CTA's units of the row
  int32_t count;
  int32_t depth;  // units per thread
  int32_t least;  // units of the shortest slice: the same in every CTA of the cluster

  __device__ __forceinline__ TopkSlice(const Params& params, const TopkPlan& chosen, Smem& memory,
                                       const RowUnits<Policy>& row_units, int32_t of_row,
                                       ClusterShape shape)
      : p(params),
        plan(chosen),
        smem(memory),
        units(row_units),
        row(of_row),
        cluster(shape),
        finder{memory.threshold, reinterpret_cast<unsigned char*>(&memory) + chosen.received,
               shape} {
    begin = 0;
    count = least = units.count;
    if (together()) {
      least = cluster.divide(units.count);
      const uint32_t longer = units.count - least * cluster.size;  // CTAs with one more unit
      begin = cluster.rank * least + min(cluster.rank, longer);
      count = least + (cluster.rank < longer ? 1 : 0);
    }
    depth = (count + kThreads - 1) / kThreads;
  }

  __device__ __forceinline__ bool together() const { return Config::kCluster && cluster.size > 1; }
  __device__ __forceinline__ unsigned char* at(uint32_t offset) const {
    return reinterpret_cast<unsigned char*>(&smem) + offset;
  }
  __device__ __forceinline__ uint16_t* masks() const {
    return reinterpret_cast<uint16_t*>(at(sizeof(Smem)));
  }
  __device__ __forceinline__ int32_t* staging() const {
    if (Config::kGuesses) return reinterpret_cast<int32_t*>(smem.groups.fine);  // free by then
    return reinterpret_cast<int32_t*>(at(plan.staging));
  }
  static_assert(kTopkMax <= kFineBins, "room for all indices");
  __device__ __forceinline__ int32_t* kept() const {
    return reinterpret_cast<int32_t*>(at(plan.kept));
  }
  __device__ __forceinline__ int32_t* out() const { return p.out + row * p.out_stride; }

  // The last order with this head. The bound is never -0.0; it is +0.0, which equals it.
  static __device__ __forceinline__ uint32_t full_order(uint32_t head) {
    if constexpr (Policy::kBits == 16) return head == 0x8000u ? 0x7fffu : head;
    return min((head << 16) | 0xffffu, Policy::kLastOrder);
  }

  // ---- Bound ------------------------------------------------------------------------------------
  // The number of groups that gives GroupRanks a good bound: some more than the rank asked of them.
  __device__ __forceinline__ uint32_t groups_wanted() const {
    const uint32_t k = p.k;
    return together() ? k + k / 4 : 2 * k - k / 4;
  }

  // The order of a head that at least k scores of the row reach. pick_rank(rank, take): a whole
  // warp finds the head of its slice, by GroupRanks or OctaveRanks.
  template <class PickRank>
  __device__ __forceinline__ GroupPick find_bound(PickRank pick_rank) {
    __syncthreads();
    // The bound of every slice is a bound of the row. And if every slice has k / C scores that
    // reach a value, the row has k. The first is sharp if one slice holds the best scores, the
    // second if all slices are alike. One warp computes each.
    if (warp_id() < (together() ? 2 : 1)) {
      const bool is_share = warp_id() == 1;
      uint32_t mine = 0;
      pick_rank(is_share ? cluster.divide_up(p.k) : p.k, [&](const GroupPick& pick) {
        mine = pick.bound;
        if (!together()) {
          smem.bound[0] = pick.bound;
          smem.bound[1] = pick.reached;
        }
      });
      if (together()) exchange_bound(is_share, __reduce_max_sync(kFullWarp, mine));
    }
    __syncthreads();
    return {smem.bound[0], smem.bound[1], 0u};  // `reached` is known only to a slice that is alone
  }

  // ---- Positions --------------------------------------------------------------------------------
  // The counts before this thread, whose own count (packed) is `own`: in the lower threads of the
  // CTA and in the lower ranks. .x: above the threshold; .y: equal to it.
  __device__ __forceinline__ uint2 counted_before(uint32_t own, const Threshold& t) const {
    const uint32_t upto = warp_inclusive_sum(own);
    const uint32_t chosen = __shfl_sync(kFullWarp, upto, kWarpSize - 1);
    if (lane_id() == 0) smem.warp_chosen[warp_id()] = chosen;
    Output::started();
    __syncthreads();
    const uint32_t of_warp = lane_id() < kWarps ? smem.warp_chosen[lane_id()] : 0u;
    const uint32_t below = __reduce_add_sync(kFullWarp, lane_id() < warp_id() ? of_warp : 0u);
    if (together() && !t.counted) {
      const uint32_t all = __reduce_add_sync(kFullWarp, of_warp) >> kEqualShift;
      if (threadIdx.x == 0) {
        barrier_expect(&smem.equals_barrier, cluster.size * sizeof(uint32_t));
      }
      if (threadIdx.x < cluster.size) {
        store_counted(map_shared(&smem.equals[cluster.rank], threadIdx.x), min(all, t.need),
                      map_shared(&smem.equals_barrier, threadIdx.x));
      }
      barrier_wait(&smem.equals_barrier, 0u);
    }
    const uint32_t ahead = upto - own;
    return make_uint2(t.lower_above + (below & kAboveMask) + (ahead & kAboveMask),
                      lower_equal(t) + (below >> kEqualShift) + (ahead >> kEqualShift));
  }

  // Scores equal to the threshold in the lower ranks. Either the threshold search counted them or
  // counted_before() did.
  __device__ __forceinline__ uint32_t lower_equal(const Threshold& t) const {
    if (!together() || t.counted) return t.lower_equal;
    return __reduce_add_sync(kFullWarp, lane_id() < cluster.rank ? smem.equals[lane_id()] : 0u);
  }

  // Which of 32 consecutive scores are chosen, and the position of the first of these. `before`
  // counts the scores that precede them in the row.
  struct Chosen {
    uint32_t bits;
    uint32_t position;
  };
  static __device__ __forceinline__ Chosen choose(uint32_t above, uint32_t equal, uint2 before,
                                                  uint32_t need) {
    if (equal != 0) {
      const int allowed = need > before.y ? static_cast<int>(need - before.y) : 0;
      if (allowed == 0) {
        equal = 0;
      } else {
        while (__popc(equal) > allowed) equal &= ~(0x80000000u >> __clz(equal));
      }
    }
    return {above | equal, before.x + min(before.y, need)};
  }

  // ---- Writing ----------------------------------------------------------------------------------
  // An index goes straight to `out` or through shared memory. It goes through shared memory for a
  // sort, for a page table, or if there are so many indices that scattered stores take longer than
  // a second step.
  __device__ __forceinline__ int32_t* place() const { return plan.staged ? staging() : out(); }

  // A lane's 32 scores from row index `first` on.
  __device__ __forceinline__ void write(int32_t first, Chosen chosen) const {
    int32_t* to = place() + chosen.position;
#pragma unroll 1
    while (chosen.bits != 0) {
      *to++ = Output::placed(kept(), first + __ffs(chosen.bits) - 1);
      chosen.bits &= chosen.bits - 1;
    }
  }

  // The same by a whole warp. If few lanes hold much of the answer (sorted rows), all lanes write
  // it.
  static constexpr int kMany = 8;
  __device__ __forceinline__ void write_warp(int32_t first, Chosen chosen) const {
    uint32_t many = __ballot_sync(kFullWarp, __popc(chosen.bits) > kMany);
    if (many != 0 && __popc(many) <= kMany) {
      while (many != 0) {
        const int owner = __ffs(many) - 1;
        many &= many - 1;
        const uint32_t bits = __shfl_sync(kFullWarp, chosen.bits, owner);
        const uint32_t position = __shfl_sync(kFullWarp, chosen.position, owner);
        const int32_t index = __shfl_sync(kFullWarp, first, owner);
        if ((bits >> lane_id()) & 1u) {
          place()[position + __popc(bits & lanes_below())] =
              Output::placed(kept(), index + lane_id());
        }
        if (lane_id() == owner) chosen.bits = 0;
      }
    }
    write(first, chosen);
  }

  // After the last write: writes the indices that went through shared memory.
  __device__ __forceinline__ void finish(const Threshold& t) const {
    if (!plan.staged) return;
    __syncthreads();
    uint32_t first = 0;  // this CTA's positions are contiguous
    uint32_t last = p.k;
    if (together()) {
      const uint32_t of_warp = lane_id() < kWarps ? smem.warp_chosen[lane_id()] : 0u;
      const uint32_t all = __reduce_add_sync(kFullWarp, of_warp);
      const uint32_t equal = lower_equal(t);
      first = t.lower_above + min(equal, t.need);
      last = t.lower_above + (all & kAboveMask) + min(equal + (all >> kEqualShift), t.need);
    }
    const RowOutput output(p, row);
    const int32_t* staged = staging();
    if constexpr (Config::Form::kSorts) {
      if (p.sort) {
        sort_slice(units, staged, reinterpret_cast<uint64_t*>(at(plan.entries)), first, last, p.k,
                   cluster, output);
        return;
      }
    }
#pragma unroll 1
    for (uint32_t i = first + threadIdx.x; i < last; i += kThreads) output.write(i, staged[i]);
  }

 private:
  // Tells all ranks the slice's own bound, or the bound for its share of k; one warp computes the
  // row's.
  __device__ __forceinline__ void exchange_bound(bool is_share, uint32_t own) {
    if (threadIdx.x == 0) {
      barrier_expect(&smem.bounds_barrier, 2 * cluster.size * sizeof(uint32_t));
    }
    if (lane_id() < cluster.size) {
      store_counted(map_shared(&smem.bounds[is_share][cluster.rank], lane_id()), own,
                    map_shared(&smem.bounds_barrier, lane_id()));
    }
    if (is_share) return;
    barrier_wait(&smem.bounds_barrier, 0u);
    const bool is_rank = lane_id() < cluster.size;
    const uint32_t best =
        __reduce_min_sync(kFullWarp, is_rank ? smem.bounds[0][lane_id()] : kNoBound);
    const uint32_t common = __reduce_max_sync(kFullWarp, is_rank ? smem.bounds[1][lane_id()] : 0u);
    if (lane_id() == 0) smem.bound[0] = min(best, common);
  }
};

}  // namespace dsv4
