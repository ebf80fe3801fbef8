// The k-th best score of a row: from how far the scores lie above a bound that at least k of them
// reach, or digit by digit from the top.
//
// One warp closes a round: it finds the digit and publishes it, and the other warps wait at a
// barrier. If every warp found the digit itself there would be no barrier, but it took twice as
// long, because the shuffles of all warps queue up in one unit.
//
// The CTAs of a cluster push their histograms into each other's shared memory. Once a CTA holds all
// of them, it knows the row's digit. From the counts of the lower ranks it knows where its own part
// of the answer goes and which ties belong to it. There is no leader and no second exchange.
#pragma once

#include <cstdint>

#include "dsv4/common/cluster.cuh"
#include "dsv4/common/warp.cuh"
#include "dsv4/topk/ordered_key.cuh"
#include "dsv4/topk/radix_digit.cuh"

namespace dsv4 {

constexpr int kRankMost = 256;

struct Threshold {
  uint32_t order;        // order of the k-th best score; every score of a smaller order is chosen
  uint32_t need;         // how many scores of this order are chosen: the first ones of the row
  uint32_t lower_above;  // scores of smaller order in the slices of the lower ranks
  uint32_t lower_equal;  // scores of this order in the slices of the lower ranks, if `counted`
  bool counted;
};

template <int kBits>
struct ThresholdSmem {
  // one above a bound, and one per digit from the top
  static constexpr int kRounds = 1 + kBits / 8;
  static constexpr int kRefine = kRounds;  // one more histogram, for the caller

  // Zero when the row begins. Each round has its own, so no histogram has to be cleared in between.
  alignas(16) uint32_t hist[kRounds + 1][kHistogram];
  alignas(16) uint32_t ranked[4];  // number of scores in rank_list; three for the caller
  // Not initialised.
  alignas(16) uint4 rank_found;
  alignas(16) uint32_t picked[8];
  uint64_t hist_barrier[kRounds];
  uint64_t list_barrier;
  uint32_t rank_list[kRankMost];
  uint32_t rank_sent[kRankMost];

  static constexpr int kZeroBytes =
      ((kRounds + 1) * kHistogram + 4) * static_cast<int>(sizeof(uint32_t));

  __device__ __forceinline__ void init_barriers() {
    for (int i = 0; i < kRounds; ++i) barrier_init(&hist_barrier[i]);
    barrier_init(&list_barrier);
  }
};

// The result of a round for the whole row.
struct RoundPick {
  Pick pick;
  uint32_t lower_before;  // the share of the lower ranks in `before` and `count`
  uint32_t lower_count;
};

constexpr uint32_t kNone = 0xffffffffu;  // no order: after NaN

// What a cluster exchanges: the 16-bit counts of every round from every rank.
__host__ __device__ constexpr uint32_t received_bytes(int rounds, uint32_t cluster) {
  return cluster > 1 ? rounds * cluster * kBins * sizeof(uint16_t) : 0u;
}

// kWarpRanks: a warp, not a thread, compares a score with the others that share its digits. That is
// faster if they are many.
template <class Policy, int kThreads, bool kWarpRanks>
struct ThresholdFinder {
  static constexpr int kBits = Policy::kBits;
  static constexpr int kWarps = kThreads / kWarpSize;
  using Unit = typename Policy::Unit;
  using Smem = ThresholdSmem<kBits>;

  Smem& smem;
  void* received;
  const ClusterShape cluster;

  __device__ __forceinline__ bool together() const { return cluster.size > 1; }

  // Finds the threshold of the row. Returns false if the row may have fewer than k numbers; then
  // nothing is known.
  //
  // It first uses how far the scores lie above `bound`, an order that at least k of them reach
  // (kNone: there is none). If the threshold lies further above it than the histogram reaches, or
  // if there is no bound, it uses the digits of the orders from the top. All rounds share one loop
  // and its code: a launched kernel finds its first 64 KB in the instruction cache and waits for
  // all that follows (docs/notes/topk.md).
  //
  // each(above, visit, rare) calls rare(unit) for every unit of this thread that may hold one of
  // the k best. With `above` it calls visit(unit) instead, for every unit that may hold one above
  // the bound. `sparse`: most of these units hold none.
  template <class Each>
  __device__ __forceinline__ bool find(Threshold& t, uint32_t k, uint32_t bound, bool sparse,
                                       Each each) {
    t = {bound, k, 0u, 0u, true};
    Digit digit{0u, 0u, kBits};
    bool above = bound != kNone;
#pragma unroll 1
    for (int round = above ? 0 : 1;; ++round) {
      if (!above) digit.shift -= 8;
      each(
          above, [&](const Unit& u) { Policy::add_above(smem.hist[0], u, bound); },
          [&](const Unit& u) { Policy::add_digit(smem.hist[round], u, digit); });
      const RoundPick found = close(round, t.need, above ? kBins - 1 : kBins);
      const Pick& pick = found.pick;
      const bool far = above && pick.found && pick.bin == 0;
      const bool was_above = above;
      above = false;
      if (far) continue;
      t.need -= pick.before;
      t.lower_above += found.lower_before;
      if (was_above && !pick.found) {
        // Fewer than k lie above the bound, so the bound is the threshold. Scores equal to it were
        // not counted.
        t.counted = false;
        return true;
      }
      t.lower_equal = found.lower_count;
      if (was_above) {
        const uint32_t distance = kBins - 1 - pick.bin;
        if (kBits == 16) {
          t.order = bound - distance;
          return true;
        }
        // The scores of this bin lie in (distance - 1, distance] stretches above the bound.
        digit = {bound - (distance << 16), 0u, 16u};
      } else {
        digit.prefix = digit.prefix * kBins + pick.bin;
      }
      // The threshold lies in [low, high].
      const uint32_t low = digit.base + (digit.prefix << digit.shift);
      const uint32_t high = low + ((1u << digit.shift) - 1u);
      if (digit.shift == 0) {
        t.order = low;
        return low < Policy::kLastOrder || t.need == 0;
      }
      if (pick.count == t.need && high < Policy::kLastOrder) {
        take_all(t, high);
        return true;
      }
      if (kBits == 32 && digit.shift <= 16 && pick.count <= kRankMost) {
        rank(t, pick.count, low, high, sparse, each);
        return t.order < Policy::kLastOrder || t.need == 0;
      }
      // Many scores share these digits (a plateau): go on with the next digit.
    }
  }

 private:
  // Closes round `round`: finds a digit of the whole row. `kept`: bins that count.
  __device__ __forceinline__ RoundPick close(int round, uint32_t need, uint32_t kept) {
    __syncthreads();
    if (together()) send(round);
    if (warp_id() == 0) pick_digit(round, need, kept);
    __syncthreads();
    const uint4 first = *reinterpret_cast<const uint4*>(smem.picked);
    const uint2 lower = *reinterpret_cast<const uint2*>(smem.picked + 4);
    return {{first.x, first.y, first.z, first.w != 0}, lower.x, lower.y};
  }

  // All orders up to `high` are chosen, and none after it.
  __device__ __forceinline__ void take_all(Threshold& t, uint32_t high) const {
    t.order = high + 1;
    if (t.order == 1u << (kBits - 1)) ++t.order;  // not -0.0, which equals +0.0
    t.lower_above += t.lower_equal;
    t.lower_equal = 0;
    t.need = 0;
  }

  // Ranks the `count` scores with orders in [low, high] against each other. If they are sparse, a
  // warp first tests whether its units hold any.
  template <class Each>
  __device__ __forceinline__ void rank(Threshold& t, uint32_t count, uint32_t low, uint32_t high,
                                       bool sparse, Each each) {
    uint32_t* local = together() ? smem.rank_sent : smem.rank_list;
    const auto list = [&](const Unit& u) {
      if constexpr (kBits == 32) {
        if (sparse && !Policy::may_hold(u, low, high)) return;
      }
      Policy::each_order(u, [&](uint32_t order) {
        if (order - low <= high - low) local[atomicAdd(smem.ranked, 1u)] = order;
      });
    };
    each(false, [](const Unit&) {}, list);
    __syncthreads();
    if (together()) {
      // Every rank puts its scores after those of the lower ranks.
      if (threadIdx.x == 0) barrier_expect(&smem.list_barrier, count * sizeof(uint32_t));
      const uint32_t own = smem.ranked[0];
      for (uint32_t i = threadIdx.x; i < own * cluster.size; i += kThreads) {
        const uint32_t peer = i % cluster.size;
        const uint32_t at = i / cluster.size;
        store_counted(map_shared(smem.rank_list + t.lower_equal + at, peer), local[at],
                      map_shared(&smem.list_barrier, peer));
      }
      barrier_wait(&smem.list_barrier, 0u);
    }
    if (kWarpRanks) {
      rank_by_warps(t, count);
    } else {
      rank_by_threads(t, count);
    }
    __syncthreads();
    const uint4 found = smem.rank_found;
    t.order = found.x;
    t.need -= found.y;
    t.lower_above += found.z;
    t.lower_equal = found.w;
  }

  // Finds which of the scores in rank_list is chosen last.
  __device__ __forceinline__ void rank_by_threads(const Threshold& t, uint32_t count) {
    for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
      const uint32_t own = smem.rank_list[i];
      uint32_t before = 0;
      uint32_t equal = 0;
      uint32_t equal_ahead = 0;
      uint32_t lower_before = 0;
      uint32_t lower_equal = 0;
      for (uint32_t j = 0; j < count; ++j) {
        const uint32_t other = smem.rank_list[j];
        before += other < own ? 1u : 0u;
        equal += other == own ? 1u : 0u;
        equal_ahead += other == own && j < i ? 1u : 0u;
        lower_before += other < own && j < t.lower_equal ? 1u : 0u;
        lower_equal += other == own && j < t.lower_equal ? 1u : 0u;
      }
      if (before < t.need && t.need <= before + equal && equal_ahead == 0) {
        smem.rank_found = make_uint4(own, before, lower_before, lower_equal);
      }
    }
  }

  __device__ __forceinline__ void rank_by_warps(const Threshold& t, uint32_t count) {
#pragma unroll 1
    for (uint32_t i = warp_id(); i < count; i += kWarps) {
      const uint32_t own = smem.rank_list[i];
      // At most 256 each: before it, equal to it, before it in the lower ranks; equal to it in the
      // lower ranks, equal to it and ahead in the list.
      uint32_t sums = 0;
      uint32_t equals = 0;
#pragma unroll 1
      for (uint32_t j = lane_id(); j < count; j += kWarpSize) {
        const uint32_t other = smem.rank_list[j];
        const bool lower = j < t.lower_equal;
        sums += other < own ? (lower ? 1u + (1u << 20) : 1u) : other == own ? 1u << 10 : 0u;
        if (other == own) equals += (lower ? 1u : 0u) + (j < i ? 1u << 16 : 0u);
      }
      sums = __reduce_add_sync(kFullWarp, sums);
      const uint32_t before = sums & 1023u;
      if (before < t.need && t.need <= before + (sums >> 10 & 1023u)) {
        equals = __reduce_add_sync(kFullWarp, equals);
        if (lane_id() == 0 && equals >> 16 == 0) {
          smem.rank_found = make_uint4(own, before, sums >> 20, equals & 0xffffu);
        }
      }
    }
  }

  static __device__ __forceinline__ void drop_bins(uint32_t (&bins)[kLaneBins], uint32_t kept) {
    static_assert(kBins - 1 == kLaneBins * kWarpSize - 1, "the last bin is the last lane's last");
    if (kept < kBins && lane_id() == kWarpSize - 1) bins[kLaneBins - 1] = 0;
  }

  __device__ __forceinline__ void publish(const Pick& pick, uint32_t lower_before,
                                          uint32_t lower_count) {
    *reinterpret_cast<uint4*>(smem.picked) =
        make_uint4(pick.bin, pick.before, pick.count, pick.found);
    *reinterpret_cast<uint2*>(smem.picked + 4) = make_uint2(lower_before, lower_count);
  }

  // Pushes this CTA's histogram to all ranks. Counts are cut at 4,095, which is more than any k. So
  // sums of sixteen counts fit in 16 bits, and no step needs the exact value of a cut count.
  //
  // No CTA exits while a peer still writes to it: each receiver waits here for all that is sent to
  // it, and every CTA of the cluster takes part in every round.
  __device__ __forceinline__ void send(int round) {
    constexpr uint32_t kCut = 4095u;
    const int lane = lane_id();
    uint4* to = static_cast<uint4*>(received) + (round * cluster.size + cluster.rank) * kWarpSize;
    uint64_t* barrier = &smem.hist_barrier[round];
    if (threadIdx.x == 0) barrier_expect(barrier, cluster.size * kBins * sizeof(uint16_t));
    if (warp_id() < cluster.size) {
      uint32_t bins[kLaneBins];
      load_bins(smem.hist[round], bins);
      const auto two = [](uint32_t a, uint32_t b) { return min(a, kCut) | (min(b, kCut) << 16); };
      const uint4 own = make_uint4(two(bins[0], bins[1]), two(bins[2], bins[3]),
                                   two(bins[4], bins[5]), two(bins[6], bins[7]));
      for (uint32_t peer = warp_id(); peer < cluster.size; peer += kWarps) {
        store_counted(map_shared(to + lane, peer), own, map_shared(barrier, peer));
      }
    }
  }

  // One warp finds the digit of the row's counts. There are two whole functions, because a
  // cluster's two sums and its search form one stream of instructions.
  __device__ __forceinline__ void pick_digit(int round, uint32_t need, uint32_t kept) {
    if (together()) return pick_shared_digit(round, need, kept);
    uint32_t bins[kLaneBins];
    load_bins(smem.hist[round], bins);
    drop_bins(bins, kept);
    pick_bin(bins, need, [&](const Pick& pick) { publish(pick, 0u, 0u); });
  }

  // The sum over all ranks, its digit, and the share of the lower ranks.
  __device__ __forceinline__ void pick_shared_digit(int round, uint32_t need, uint32_t kept) {
    const int lane = lane_id();
    const uint4* from = static_cast<const uint4*>(received) + round * cluster.size * kWarpSize;
    barrier_wait(&smem.hist_barrier[round], 0u);
    uint32_t total[4] = {0u, 0u, 0u, 0u};
    uint32_t lower[4] = {0u, 0u, 0u, 0u};
#pragma unroll 4
    for (uint32_t rank = 0; rank < cluster.size; ++rank) {
      const uint4 v = from[rank * kWarpSize + lane];
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        total[i] += words[i];
        lower[i] += rank < cluster.rank ? words[i] : 0u;
      }
    }
    uint32_t upto[kLaneBins];
    uint32_t of_lower[kLaneBins];
#pragma unroll
    for (int i = 0; i < kLaneBins; ++i) {
      upto[i] = (total[i / 2] >> (16 * (i & 1))) & 0xffffu;
      of_lower[i] = (lower[i / 2] >> (16 * (i & 1))) & 0xffffu;
    }
    drop_bins(upto, kept);
    drop_bins(of_lower, kept);
    // The lower ranks' counts before each lane are summed up during the search.
    uint32_t lower_own = 0;
#pragma unroll
    for (int i = 0; i < kLaneBins; ++i) lower_own += of_lower[i];
    const uint32_t lower_reached = warp_inclusive_sum(lower_own);
    pick_bin(upto, need, [&](const Pick& pick) {
      uint32_t lower_before = pick.found ? lower_reached - lower_own : lower_reached;
      uint32_t lower_count = 0;
#pragma unroll
      for (int i = 0; i < kLaneBins; ++i) {
        const uint32_t bin = kLaneBins * lane + i;
        lower_before += pick.found && bin < pick.bin ? of_lower[i] : 0u;
        lower_count += pick.found && bin == pick.bin ? of_lower[i] : 0u;
      }
      publish(pick, lower_before, lower_count);
    });
  }
};

}  // namespace dsv4
