// Exact top-k of a row: one CTA, or a cluster of C CTAs with a slice of the row each. Every score
// is read once from memory.
//
// A short slice stays in registers (select_direct): two digits of a radix select give the threshold
// of 16-bit scores, then every thread counts its own. A longer one (select_listed):
//
//   1. stream     all scores -> maxima of groups -> histogram                   topk_bound.cuh
//   2. bound      a value that at least k scores reach. The CTAs of a cluster exchange theirs.
//   3. list       units whose maximum reaches the bound: little more than k of them
//   4. threshold  how far their scores lie above the bound                      topk_threshold.cuh
//   5. masks      which of a listed unit's scores lie above the threshold, which equal it
//   6. write      counts in row order, ascending positions
//
// Only the maxima stay in registers; listed units are read again, from L1 or L2. A warp's list has
// room for all units of the warp, so no input overflows it.
//
// Everything is decided on the device by the row's own length: a row of up to plan.solo_units is
// rank 0's work whatever the width of the buffer, and the other CTAs leave.
#pragma once

#include "dsv4/row_units.cuh"
#include "dsv4/topk_bound.cuh"
#include "dsv4/topk_sort.cuh"
#include "dsv4/topk_threshold.cuh"
#include "dsv4/topk_wide.cuh"

namespace dsv4 {

// What the host chooses beside the template arguments.
struct TopkPlan {
  int32_t solo_units;  // longest row, in units, that one CTA of a cluster serves alone
  int32_t list_steps;  // units a thread for which the lists have room
  int32_t mask_steps;  // and the masks
  uint32_t lists;      // byte offsets in shared memory: the warps' lists,
  uint32_t received;   // digits of the peers,
  uint32_t tail;       // entries (sort) or staged indices (page table)
};

template <class Policy_, int kThreads_, int kSteps_, int kMinBlocks_, bool kCluster_>
struct TopkConfig {
  using Policy = Policy_;
  static constexpr int kThreads = kThreads_;
  static constexpr int kSteps = kSteps_;  // units a thread at most
  static constexpr int kMinBlocks = kMinBlocks_;
  static constexpr bool kCluster = kCluster_;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kDirect = Policy::kBits == 16 ? 4 : 2;  // of these, kept in registers
  static constexpr int kBatch = 4;                             // units in flight a thread
  static constexpr int kMaxUnits = kThreads * kSteps;

  static_assert(kWarps <= kWarpSize, "one lane reads one warp's count");
  static_assert(kMaxUnits <= 1 << 15, "15 bits of a listed unit's number");
  static_assert(kDirect * kUnit <= 32, "one mask of 32 bits a thread");
  static_assert(kSteps % kBatch == 0 && kBatch % 4 == 0, "groups of up to four units of a batch");
};

template <class Config>
struct TopkSmem {
  // Zero when the row begins, and so are the masks.
  ThresholdSmem<Config::Policy::kBits> threshold;
  GroupHistogram groups;
  // Not initialised.
  alignas(16) uint32_t bound[4];
  uint64_t bounds_barrier;
  uint64_t equals_barrier;
  uint32_t bounds[2][kMaxCluster];
  uint32_t equals[kMaxCluster];
  alignas(16) uint32_t warp_chosen[kWarpSize];
  // Then 16-bit words: masks[kThreads * mask_steps], lists[kThreads * list_steps],
  // received[rounds][C][kBins]; then entries or staged indices. Or, over all of these,
  // TopkWideSmem.
};

template <class Config>
struct TopkWorker {
  using Policy = typename Config::Policy;
  using Unit = typename Policy::Unit;
  using H = typename Policy::H;
  using Smem = TopkSmem<Config>;
  static constexpr int kThreads = Config::kThreads;
  static constexpr int kWarps = Config::kWarps;
  static constexpr int kDirect = Config::kDirect;
  static constexpr int kSteps = Config::kSteps;
  static constexpr int kBatch = Config::kBatch;
  // An entry of a list: a unit's number in the slice, and whether it holds more than the bound.
  static constexpr uint32_t kExceeds = 1u << 15;
  static constexpr uint32_t kListed = 1u << 16;  // in a register only: it is an entry at all
  static constexpr int kListBatch = Policy::kBits == 16 ? 4 : 2;
  static constexpr uint32_t kPlateau = 4 * kWarpSize;  // listed units that are looked at one by one
  // Counts travel packed: above the threshold in the low 12 bits, equal to it in the high 20.
  static constexpr int kEqualShift = 12;
  static constexpr uint32_t kAboveMask = (1u << kEqualShift) - 1u;
  static_assert(kTopkMax < 1 << kEqualShift, "fewer than k lie above");
  static_assert(Config::kMaxUnits * kUnit < 1 << (32 - kEqualShift), "all may be equal");

  const TopkParams& p;
  const TopkPlan& plan;
  Smem& smem;
  const RowUnits<Policy>& units;
  const int32_t row;
  const ClusterShape cluster;  // size 1: alone
  ThresholdFinder<Policy, kThreads> finder;
  int32_t begin;  // this CTA's units of the row
  int32_t count;
  int32_t depth;  // units a thread
  int32_t least;  // units of the shortest slice: the same in every CTA of the cluster

  __device__ __forceinline__ TopkWorker(const TopkParams& params, const TopkPlan& chosen,
                                        Smem& memory, const RowUnits<Policy>& row_units,
                                        int32_t of_row, ClusterShape shape)
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
      const uint32_t longer = units.count - least * cluster.size;  // CTAs with one unit more
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

  // ---- Positions and writing --------------------------------------------------------------------
  // What precedes this warp: in the lower warps of the CTA and the lower ranks.
  __device__ __forceinline__ uint2 counted_before(uint32_t chosen, const Threshold& t) {
    if (lane_id() == 0) smem.warp_chosen[warp_id()] = chosen;
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
    return make_uint2(t.lower_above + (below & kAboveMask),
                      lower_equal(t) + (below >> kEqualShift));
  }

  // Equals of the lower ranks. Where nobody counted them, after counted_before.
  __device__ __forceinline__ uint32_t lower_equal(const Threshold& t) const {
    if (!together() || t.counted) return t.lower_equal;
    return __reduce_add_sync(kFullWarp, lane_id() < cluster.rank ? smem.equals[lane_id()] : 0u);
  }

  // Which of 32 scores in a row are chosen, and the position of the first of these; `before` counts
  // what precedes them in the row.
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

  // Whether answers go to `out` as they are, at once.
  __device__ __forceinline__ bool plain() const {
    return !p.sort && p.page_table == nullptr && p.out_raw == nullptr;
  }
  __device__ __forceinline__ void emit(uint32_t position, int32_t index) const {
    if (p.sort) {
      uint64_t* entry = reinterpret_cast<uint64_t*>(at(plan.tail)) + position;
      const uint64_t value = sort_entry(Policy::sort_order(units.bits(index)), index);
      if (together()) {
        store_remote(map_shared(entry, 0), value);
      } else {
        *entry = value;
      }
    } else if (p.page_table != nullptr) {
      reinterpret_cast<int32_t*>(at(plan.tail))[position] = index;
    } else {
      p.out[row * p.out_stride + position] = index;
      if (p.out_raw != nullptr) p.out_raw[row * p.out_raw_stride + position] = index;
    }
  }

  // A lane's 32 scores from row index `first` on.
  __device__ __forceinline__ void write(int32_t first, Chosen chosen) const {
    if (plain()) {
      int32_t* out = p.out + row * p.out_stride + chosen.position;
      while (chosen.bits != 0) {
        *out++ = first + __ffs(chosen.bits) - 1;
        chosen.bits &= chosen.bits - 1;
      }
    } else {
      while (chosen.bits != 0) {
        emit(chosen.position++, first + __ffs(chosen.bits) - 1);
        chosen.bits &= chosen.bits - 1;
      }
    }
  }

  // The same by a whole warp. Where few lanes hold much of the answer (sorted rows), all lanes
  // write it.
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
          emit(position + __popc(bits & lanes_below()), index + lane_id());
        }
        if (lane_id() == owner) chosen.bits = 0;
      }
    }
    write(first, chosen);
  }

  // After the last write: what could not be written at once.
  __device__ __forceinline__ void finish(const Threshold& t) {
    if (p.sort) {
      if (together()) {
        cluster_arrive();
        cluster_wait();
      } else {
        __syncthreads();
      }
      if (cluster.rank == 0) {
        sort_and_write(reinterpret_cast<uint64_t*>(at(plan.tail)), p.k, RowOutput(p, row));
      }
    } else if (p.page_table != nullptr) {
      // One table look-up a thread instead of a chain of them. This CTA's positions are a run.
      __syncthreads();
      const uint32_t of_warp = lane_id() < kWarps ? smem.warp_chosen[lane_id()] : 0u;
      const uint32_t all = __reduce_add_sync(kFullWarp, of_warp);
      const uint32_t equal = lower_equal(t);
      const uint32_t first = t.lower_above + min(equal, t.need);
      const uint32_t last =
          t.lower_above + (all & kAboveMask) + min(equal + (all >> kEqualShift), t.need);
      const RowOutput output(p, row);
      const int32_t* staged = reinterpret_cast<const int32_t*>(at(plan.tail));
      for (uint32_t i = first + threadIdx.x; i < last; i += kThreads) output.write(i, staged[i]);
    }
  }

  // ---- Groups -----------------------------------------------------------------------------------
  // Some more groups than the rank asked of them.
  __device__ __forceinline__ uint32_t groups_wanted() const {
    const uint32_t k = p.k;
    return together() ? k + k / 4 : 2 * k - k / 4;
  }

  // ---- A slice in registers ---------------------------------------------------------------------
  // A thread takes `depth` units in a row, so that threads are in row order.
  __device__ __forceinline__ bool select_direct() {
    Unit u[kDirect];
    const int32_t mine = begin + threadIdx.x * depth;
    const int32_t held = min(depth, begin + count - mine);  // may be below zero
#pragma unroll
    for (int i = 0; i < kDirect; ++i) {
      u[i] = Policy::pad();
      if (i < held && units.whole(mine + i)) u[i] = units.load_whole(mine + i);
    }
    if (units.whole_begin != 0 || units.whole_end != units.count) {
#pragma unroll
      for (int i = 0; i < kDirect; ++i) {
        if (i < held && !units.whole(mine + i)) u[i] = units.load_partial(mine + i);
      }
    }
    if (together()) cluster_wait();  // the start-up barrier: no peer is written to before it runs

    const auto each = [&](auto visit) {
#pragma unroll
      for (int i = 0; i < kDirect; ++i) {
        if (i < depth) visit(u[i]);
      }
    };
    Threshold t{};
    bool far = true;
    if (static_cast<uint32_t>(2 * least) >= groups_wanted()) {
      // Groups of eight scores where those suffice, of four otherwise.
      const bool whole = static_cast<uint32_t>(least) >= groups_wanted();
#pragma unroll
      for (int i = 0; i < kDirect; i += 2) {
        if (i < depth) {
          const uint32_t pair0 = Policy::pair(u[i]);
          const uint32_t pair1 = Policy::pair(u[i + 1]);
          if (whole) {
            smem.groups.add_pair(H::unit_maxima(pair0, pair1));
          } else {
            smem.groups.add_pair(pair0);
            smem.groups.add_pair(pair1);
          }
        }
      }
      const GroupPick bound = find_bound();
      if (bound.bound != kNoBound) {
        t = finder.above_bound(p.k, full_order(bound.bound), far, each);
      }
    }
    if (far) {
      t = finder.by_digits(p.k, 1, each);
      if (t.order >= Policy::kLastOrder && t.need != 0) return false;
    }

    uint32_t above = 0;
    uint32_t equal = 0;
    const uint32_t raw = Policy::raw_of(t.order);
#pragma unroll
    for (int i = 0; i < kDirect; ++i) {
      uint32_t of_unit[2] = {0u, 0u};
      if (i < depth) Policy::classify(u[i], raw, of_unit[0], of_unit[1]);
      above |= of_unit[0] << (kUnit * i);
      equal |= of_unit[1] << (kUnit * i);
    }
    const uint32_t own = __popc(above) | (__popc(equal) << kEqualShift);
    const uint32_t upto = warp_inclusive_sum(own);
    const uint2 before = counted_before(__shfl_sync(kFullWarp, upto, kWarpSize - 1), t);
    const uint32_t ahead = upto - own;
    write(units.index(mine, 0),
          choose(above, equal,
                 make_uint2(before.x + (ahead & kAboveMask), before.y + (ahead >> kEqualShift)),
                 t.need));
    finish(t);
    return true;
  }

  // ---- A longer slice ---------------------------------------------------------------------------
  // A warp takes 32 * depth units in a row; step s of it, lane l: unit 32 s + l of these.
  __device__ __forceinline__ int32_t warp_begin() const { return warp_id() * kWarpSize * depth; }

  // Loads units from step on; those outside of the slice are all NaN.
  template <int kCount>
  __device__ __forceinline__ void load(Unit (&u)[kCount], int32_t step) const {
    const int32_t first = begin + warp_begin() + step * kWarpSize;  // of the warp
    const int32_t end = begin + min(count, warp_begin() + depth * kWarpSize);
    if (first >= units.whole_begin && first + kCount * kWarpSize <= min(end, units.whole_end)) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        u[i] = units.load_whole(first + i * kWarpSize + lane_id());
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int32_t g = first + i * kWarpSize + lane_id();
        u[i] = Policy::pad();
        if (g < end) u[i] = units.load(g);
      }
    }
  }

  // Adds a batch's groups: half units, units, pairs or fours of units. pairs: each unit's two half
  // maxima; heads: those of each two units.
  __device__ __forceinline__ void add_groups(const uint32_t (&pairs)[4], uint32_t heads01,
                                             uint32_t heads23, int level) {
    if (level == 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i) smem.groups.add_pair(pairs[i]);
    } else if (level == 1) {
      smem.groups.add_pair(heads01);
      smem.groups.add_pair(heads23);
    } else {
      const uint32_t best = H::better(heads01, heads23);
      if (level == 2) {
        smem.groups.add_pair(best);
      } else {
        smem.groups.add(order_pair(H::better(best, __byte_perm(best, best, 0x1032))) >> 20);
      }
    }
  }

  // The order of a head that at least k scores of the row reach.
  __device__ __forceinline__ GroupPick find_bound() {
    __syncthreads();
    if (warp_id() < (together() ? 2 : 1)) {
      // Every slice's own bound is the row's; and if every slice has k / C scores that reach a
      // value, the row has k. The first is sharp where one slice holds the best scores, the second
      // where all are alike. A warp for each.
      const bool is_share = warp_id() == 1;
      const uint32_t rank = is_share ? cluster.divide_up(p.k) : p.k;
      GroupPick own = GroupRanks(smem.groups).pick(rank, Policy::kLastHead);
      if (together()) {
        if (threadIdx.x == 0) {
          barrier_expect(&smem.bounds_barrier, 2 * cluster.size * sizeof(uint32_t));
        }
        if (lane_id() < cluster.size) {
          store_counted(map_shared(&smem.bounds[is_share][cluster.rank], lane_id()), own.bound,
                        map_shared(&smem.bounds_barrier, lane_id()));
        }
      }
      if (!is_share) {
        if (together()) {
          barrier_wait(&smem.bounds_barrier, 0u);
          const bool is_rank = lane_id() < cluster.size;
          const uint32_t best =
              __reduce_min_sync(kFullWarp, is_rank ? smem.bounds[0][lane_id()] : kNoBound);
          const uint32_t common =
              __reduce_max_sync(kFullWarp, is_rank ? smem.bounds[1][lane_id()] : 0u);
          own = {min(best, common), 0u};
        }
        if (lane_id() == 0) {
          smem.bound[0] = own.bound;
          smem.bound[1] = own.reached;
        }
      }
    }
    __syncthreads();
    return {smem.bound[0], smem.bound[1]};
  }

  __device__ __forceinline__ bool select_listed() {
    // 1. Stream. heads: the maxima of steps 2j (low half) and 2j + 1 (high half).
    uint32_t heads[kSteps / 2];
    if (together()) cluster_wait();  // as in select_direct
    {
      const uint32_t wanted = groups_wanted();
      const uint32_t have = least;
      const int level = have < wanted ? 0 : have < 2 * wanted ? 1 : have < 4 * wanted ? 2 : 3;
#pragma unroll
      for (int step = 0; step < kSteps; step += kBatch) {
        if (step >= depth) break;
        Unit u[kBatch];
        load(u, step);
#pragma unroll
        for (int i = 0; i < kBatch; i += 4) {
          uint32_t pairs[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) pairs[j] = Policy::pair(u[i + j]);
          const uint32_t heads01 = H::unit_maxima(pairs[0], pairs[1]);
          const uint32_t heads23 = H::unit_maxima(pairs[2], pairs[3]);
          heads[(step + i) / 2] = heads01;
          heads[(step + i) / 2 + 1] = heads23;
          add_groups(pairs, heads01, heads23, level);
        }
      }
    }

    // 2. Bound.
    GroupPick bound = find_bound();
    if (bound.bound == kNoBound) return false;
    if (!together() && bound.reached > p.k + p.k / 2u + 64u) refine(bound.bound, heads);

    // 3. The warp's list of units that reach the bound, in any order. Where very many do, only of
    //    those that exceed it: the others matter if the threshold is the bound, and step 5 then
    //    goes through them in row order.
    constexpr int kHalves = (kSteps + 31) / 32;
    uint32_t reaches[kHalves];  // bit i: step 32 half + 2 i; bit 16 + i: the step after it
    uint32_t exceeds[kHalves];
    const uint32_t limit = head_pair(bound.bound);
    uint32_t all = 0;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      reaches[half] = exceeds[half] = 0;
#pragma unroll
      for (int i = 0; i < 16 && 16 * half + i < kSteps / 2; ++i) {
        const int j = 16 * half + i;
        if (2 * j >= depth) break;
        reaches[half] |= H::reaches(heads[j], limit) & (0x00010001u << i);
        if (Policy::kBits == 16) exceeds[half] |= H::above(heads[j], limit) & (0x00010001u << i);
      }
      // A float32 head that equals the bound's may belong to a score that exceeds it.
      if (Policy::kBits == 32) exceeds[half] = reaches[half];
      all += __popc(reaches[half]);
    }
    const bool plateau = Policy::kBits == 16 && __reduce_add_sync(kFullWarp, all) > kPlateau;
    uint16_t* list =
        reinterpret_cast<uint16_t*>(at(plan.lists)) + warp_id() * kWarpSize * plan.list_steps;
    uint32_t listed = 0;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      if (32 * half >= depth) break;
      uint32_t chosen = plateau ? exceeds[half] : reaches[half];
      const auto entry = [&](int bit) {
        const uint32_t step = 32 * half + 2 * (bit & 15) + (bit >> 4);
        return static_cast<uint16_t>(warp_begin() + step * kWarpSize + lane_id() +
                                     (((exceeds[half] >> bit) & 1u) << 15));
      };
      const uint32_t own = __popc(chosen);
      if (__any_sync(kFullWarp, own > kMany)) {
        // Many: a step at a time, side by side.
#pragma unroll 1
        for (int bit = 0; bit < 32; ++bit) {
          const uint32_t lanes = __ballot_sync(kFullWarp, (chosen >> bit) & 1u);
          if ((chosen >> bit) & 1u) list[listed + __popc(lanes & lanes_below())] = entry(bit);
          listed += __popc(lanes);
        }
      } else {
        const uint32_t upto = warp_inclusive_sum(own);
        uint16_t* to = list + listed + upto - own;
        while (chosen != 0) {
          *to++ = entry(__ffs(chosen) - 1);
          chosen &= chosen - 1;
        }
        listed += __shfl_sync(kFullWarp, upto, kWarpSize - 1);
      }
    }
    __syncwarp();

    // 4. Threshold. Listed units in batches, so that their loads overlap.
    const auto each_listed = [&](uint32_t mask, auto visit) {
#pragma unroll 1
      for (uint32_t first = 0; first < listed; first += kListBatch * kWarpSize) {
        Unit u[kListBatch];
        uint32_t entries[kListBatch];
#pragma unroll
        for (int i = 0; i < kListBatch; ++i) {
          entries[i] = 0;
          if (first + i * kWarpSize >= listed) continue;  // of the whole warp: lists are short
          const uint32_t at = first + i * kWarpSize + lane_id();
          if (at < listed) entries[i] = list[at] | kListed;
          u[i] = Policy::pad();
          if (entries[i] & mask) u[i] = units.load(begin + (entries[i] & 0x7fffu));
        }
#pragma unroll
        for (int i = 0; i < kListBatch; ++i) {
          if (first + i * kWarpSize >= listed) continue;
          if (__any_sync(kFullWarp, entries[i] & mask)) visit(u[i], entries[i]);
        }
      }
    };
    bool far;
    Threshold t = finder.above_bound(p.k, full_order(bound.bound), far, [&](auto visit) {
      each_listed(kExceeds, [&](const Unit& u, uint32_t) { visit(u); });
    });
    if (far) {
      t = finder.by_digits(p.k, 1, [&](auto visit) {
        each_listed(kListed, [&](const Unit& u, uint32_t) { visit(u); });
      });
      if (t.order >= Policy::kLastOrder && t.need != 0) return false;
    }

    // 5. Masks. Units that hold no more than the bound matter only where the threshold is the
    // bound.
    const bool at_bound = t.order >= full_order(bound.bound);
    const uint32_t raw = Policy::raw_of(t.order);
    const MaskLayout layout(depth);
    const auto classify = [&](const Unit& u, int32_t unit) {  // its number in this slice
      uint32_t above;
      uint32_t equal;
      Policy::classify(u, raw, above, equal);
      warp_masks(layout)[layout.mask(unit - warp_begin())] =
          static_cast<uint16_t>(above | (equal << 8));
      return __popc(equal);
    };
    // A plateau: in row order, until there are enough equals.
    if (at_bound && plateau) {
      uint32_t equals = 0;
      for (int32_t step = 0; step < depth && equals < t.need; step += kListBatch) {
        Unit u[kListBatch];
        load(u, step);
        uint32_t own = 0;
#pragma unroll
        for (int i = 0; i < kListBatch; ++i) {
          const int32_t unit = warp_begin() + (step + i) * kWarpSize + lane_id();
          if (step + i < depth && unit < count) own += classify(u[i], unit);
        }
        equals += __reduce_add_sync(kFullWarp, own);
      }
    }
    const uint32_t wanted = at_bound && !plateau ? kListed : kExceeds;
    each_listed(wanted, [&](const Unit& u, uint32_t entry) {
      if (entry & wanted) classify(u, entry & 0x7fffu);
    });
    __syncwarp();

    // 6. Write. A lane takes its share of the warp's units in a row.
    uint32_t own = 0;
    uint32_t blocks = 0;  // of 32 scores, two a granule: which hold any
    for (int32_t granule = 0; granule < layout.granules; ++granule) {
      const uint4 m = load_masks(layout, granule);
      if ((m.x | m.y | m.z | m.w) != 0) {
        own += count_masks(m);
        blocks |= ((m.x | m.y) != 0 ? 1u : 0u) << (2 * granule);
        blocks |= ((m.z | m.w) != 0 ? 2u : 0u) << (2 * granule);
      }
    }
    const uint32_t upto = warp_inclusive_sum(own);
    uint2 before = counted_before(__shfl_sync(kFullWarp, upto, kWarpSize - 1), t);
    before.x += (upto - own) & kAboveMask;
    before.y += (upto - own) >> kEqualShift;
    const int32_t lane_begin =
        units.index(begin + warp_begin(), 0) + lane_id() * layout.granules * kGranule * kUnit;
    // Each lane goes from one of its own blocks to the next: as many turns as the fullest lane
    // needs.
    while (__any_sync(kFullWarp, blocks != 0)) {
      Chosen chosen{0u, 0u};
      int32_t first = lane_begin;
      if (blocks != 0) {
        const int block = __ffs(blocks) - 1;
        blocks &= blocks - 1;
        const uint2 m = load_block(layout, block);
        const uint32_t above = above_of(m.x, m.y);
        const uint32_t equal = equal_of(m.x, m.y);
        chosen = choose(above, equal, before, t.need);
        before.x += __popc(above);
        before.y += __popc(equal);
        first += block * 4 * kUnit;
      }
      write_warp(first, chosen);
    }
    finish(t);
    return true;
  }

  static __device__ __forceinline__ uint32_t full_order(uint32_t head) {
    return Policy::kBits == 16 ? head : min((head << 16) | 0xffffu, Policy::kLastOrder);
  }

  // The warp's masks: a lane owns `granules` 16-byte granules of eight units each, stored so that
  // eight lanes that read their granule g at once meet no bank twice.
  static constexpr int kGranule = 8;
  static_assert(2 * kSteps <= 32 * kGranule, "one bit of 32 a block of four units");
  struct MaskLayout {
    int32_t granules;  // a power of two, so that a lane's granules can trade places
    int32_t shift;

    __device__ __forceinline__ explicit MaskLayout(int32_t depth) {
      const int32_t least = (depth + kGranule - 1) / kGranule;
      shift = least <= 1 ? 0 : 32 - __clz(least - 1);
      granules = 1 << shift;
    }
    // Where the granule lies, counted in granules.
    __device__ __forceinline__ int32_t place(int32_t lane, int32_t granule) const {
      const int32_t turn = shift >= 3 ? lane : lane >> (3 - shift);
      return (lane << shift) + (granule ^ (turn & (granules - 1)));
    }
    // Where the mask of the warp's unit lies, counted in masks.
    __device__ __forceinline__ int32_t mask(int32_t unit) const {
      const int32_t granule = unit / kGranule;
      return place(granule >> shift, granule & (granules - 1)) * kGranule + unit % kGranule;
    }
  };
  __device__ __forceinline__ uint16_t* warp_masks(const MaskLayout& layout) const {
    return masks() + warp_id() * kWarpSize * layout.granules * kGranule;
  }
  __device__ __forceinline__ uint4 load_masks(const MaskLayout& layout, int32_t granule) const {
    return reinterpret_cast<const uint4*>(warp_masks(layout))[layout.place(lane_id(), granule)];
  }
  __device__ __forceinline__ uint2 load_block(const MaskLayout& layout, int32_t block) const {
    return reinterpret_cast<const uint2*>(
        warp_masks(layout))[2 * layout.place(lane_id(), block / 2) + block % 2];
  }
  static __device__ __forceinline__ uint32_t above_of(uint32_t low, uint32_t high) {
    return __byte_perm(low, high, 0x6420);
  }
  static __device__ __forceinline__ uint32_t equal_of(uint32_t low, uint32_t high) {
    return __byte_perm(low, high, 0x7531);
  }
  static __device__ __forceinline__ uint32_t count_masks(const uint4& m) {
    const uint32_t above = __popc(above_of(m.x, m.y)) + __popc(above_of(m.z, m.w));
    const uint32_t equal = __popc(equal_of(m.x, m.y)) + __popc(equal_of(m.z, m.w));
    return above | (equal << kEqualShift);
  }

  // Many groups share the bound's bin: take the k-th largest maximum of single units instead, to
  // the last bit of a head.
  __device__ __forceinline__ void refine(uint32_t& bound, const uint32_t (&heads)[kSteps / 2]) {
    uint32_t* hist = smem.threshold.hist[ThresholdSmem<Policy::kBits>::kRefine];
#pragma unroll
    for (int j = 0; j < kSteps / 2; ++j) {
      if (2 * j >= depth) break;
      const uint32_t orders = order_pair(heads[j]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t order = half == 0 ? orders & 0xffffu : orders >> 16;
        const bool counts = order != 0 && order <= bound;  // 0: NaN
        atomicAdd(hist + (counts ? kBins - 1 - min(bound - order, kBins - 1u) : kSink), 1u);
      }
    }
    __syncthreads();
    if (warp_id() == 0) {
      const Pick pick = pick_bin(hist, p.k);
      if (lane_id() == 0) smem.bound[2] = pick.found ? kBins - 1 - pick.bin : 0u;
    }
    __syncthreads();
    bound -= smem.bound[2];
  }
};

template <class Config>
__global__ __launch_bounds__(Config::kThreads, Config::kMinBlocks) void topk_kernel(
    const __grid_constant__ TopkParams p, const __grid_constant__ TopkPlan plan) {
  using Policy = typename Config::Policy;
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
    cluster_arrive();
  }
  const auto clear = [](void* begin, int bytes) {
    uint4* words = static_cast<uint4*>(begin);
    for (int i = threadIdx.x; i < bytes / 16; i += Config::kThreads) {
      words[i] = make_uint4(0, 0, 0, 0);
    }
  };
  static_assert(ThresholdSmem<Policy::kBits>::kZeroBytes % 16 == 0, "whole words");
  static_assert(sizeof(GroupHistogram) % 16 == 0 && sizeof(Smem) % 16 == 0, "whole words");
  clear(&smem.threshold, ThresholdSmem<Policy::kBits>::kZeroBytes);
  clear(&smem.groups, sizeof(GroupHistogram));
  if (plan.list_steps > 0) {
    clear(memory + sizeof(Smem), Config::kThreads * plan.mask_steps * sizeof(uint16_t));
  }
  __syncthreads();
  const int32_t row = Config::kCluster ? blockIdx.x / cluster.size : blockIdx.x;
  const WindowSource source(p, row);
  const auto* scores =
      static_cast<const typename Policy::Scalar*>(p.logits) + row * p.logits_stride;
  pdl_wait();
  // Not before the wait: then kernels after the next would start as well, and their waiting CTAs
  // would crowd those of one launch onto few multiprocessors (128 x 8K: 5.3 us instead of 4.0).
  pdl_launch_dependents();

  const RowWindow window = source.read(p);
  bool joined = false;
  if (window.length <= p.k) {
    if (cluster.rank == 0) RowOutput(p, row).write_all(window.length, p.k);
  } else {
    const RowUnits<Policy> units(scores, window);
    const bool together = Config::kCluster && units.count > plan.solo_units;
    if (together || cluster.rank == 0) {
      if (!together) cluster.size = 1;
      TopkWorker<Config> worker(p, plan, smem, units, row, cluster);
      joined = together;
      const int32_t share = together ? cluster.divide_up(units.count) : units.count;
      const bool done = share <= Config::kDirect * Config::kThreads ? worker.select_direct()
                                                                    : worker.select_listed();
      if (!done && cluster.rank == 0) {
        // What is left: rows with fewer numbers than a bound needs, and a threshold of -inf.
        __syncthreads();
        // Not over TopkSmem: the memory of a live mbarrier must not hold anything else. Where it
        // did, one row of some thousands came out with the state of the four barriers in place of
        // its first four entries.
        wide_select<Policy, Config::kThreads>(p, row, scores, window, memory + sizeof(Smem));
      }
    }
  }
  if constexpr (Config::kCluster) {
    if (!joined) cluster_wait();  // no CTA leaves the start-up barrier half done
  }
}

}  // namespace dsv4
