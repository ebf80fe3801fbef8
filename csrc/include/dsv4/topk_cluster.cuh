// Top-k with the row held on chip: one cluster of C CTAs a row (C = 1: one CTA), each score read
// once.
//
//   1. load       each CTA takes a contiguous slice of the row into registers, 16 bytes a load
//   2. bound      a lower bound of the k-th largest *group maximum* of the slice. Maxima of
//   disjoint
//                 groups are distinct elements, so at least k elements reach it: nothing below can
//                 be among the slice's, and so the row's, k largest. True of any data.
//   3. gather     the elements that reach the bound, as a list in row order (little more than k)
//   4. threshold  radix digits over the list only. The CTAs of a cluster push their histograms into
//   each
//                 other's shared memory; once a CTA holds all of them it knows the row's digit and,
//                 from the counts of the lower ranks, where its own part of the answer goes and
//                 which share of the ties is its own. There is no leader and no second round trip.
//   5. write      ascending positions
//
// The bound of step 2 comes from one histogram of the keys' upper 11 bits, so it is the floor of a
// bin. Where that lets more elements through than the list has room for (all scores equal, a
// plateau), the exact bound is computed by digits; with it the list cannot overflow: fewer than k
// groups lie above it, and of the elements equal to it the first k are enough, since ties go to the
// lowest index.
//
// Everything is decided on the device by each row's own length: a row up to `solo_length` is one
// CTA's work whatever the width of the buffer, and the CTAs of a cluster share such rows among
// them.
#pragma once

#include "dsv4/row_vectors.cuh"
#include "dsv4/topk_sort.cuh"

namespace dsv4 {

constexpr int kSoloDigit = 11;
constexpr int kSoloBins = 1 << kSoloDigit;
constexpr int kSharedDigit = 8;  // what the CTAs of a cluster exchange: 1 KB a pair
constexpr int kSharedBins = 1 << kSharedDigit;

// What the host chooses for topk_cluster_kernel beside the template arguments.
struct TopkClusterPlan {
  int32_t clusters;     // resident at once; cluster c serves rows c, c + clusters, ...
  int32_t solo_length;  // longest row that one CTA serves alone
};

template <class Policy_, int kThreads_, int kVectors_>
struct TopkClusterConfig {
  using Policy = Policy_;
  static constexpr int kThreads = kThreads_;
  static constexpr int kVectors = kVectors_;  // a thread loads this many vectors of the slice
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kCapacity = kThreads * kVectors;  // vectors of a slice
  static constexpr int kMinBlocks = 1024 / kThreads;     // 64 registers a thread

  static_assert(kWarps <= kWarpSize, "one lane reads one warp's count");
  static_assert(kCapacity * Policy::kElems <= 65536,
                "the list holds 16-bit positions in the slice");
  static_assert(kTopkMax < (1 << 12), "elements above the threshold: 12 bits of a packed count");
  static_assert((Policy::kElems + 1) * kTopkMax < (1 << 20), "its equals: 20 bits");
  static_assert(kWarpSize * Policy::kElems < (1 << 10),
                "a step of a warp: 10 bits of a packed count");
};

template <class Config>
struct TopkClusterSmem {
  // All zero whenever no round is open: each round's readers clear what they read.
  alignas(16) uint32_t hist[kSoloBins];
  alignas(8) uint64_t bounds_barrier;
  uint64_t digits_barrier[2];
  uint64_t bounds[16];  // each rank's bound and best key
  alignas(16) uint4 picked;
  uint2 picked_lower;
  uint32_t warp_best[kWarpSize];
  uint32_t warp_total[kWarpSize];
  uint32_t warp_lower[kWarpSize];
  uint32_t warp_gathered[kWarpSize];
  uint32_t warp_equal[kWarpSize];
  uint32_t warp_chosen[kWarpSize];
  // Then, in this order: items[list_capacity], received[2][C][kSharedBins] where C > 1,
  // entries[power of two >= k] (sort) or staged[k] (page table).
};

// Byte offsets of the parts of shared memory whose size the call decides.
template <class Config>
struct TopkClusterLayout {
  uint32_t list_capacity;
  uint32_t received;
  uint32_t tail;
  uint32_t bytes;

  __host__ __device__ TopkClusterLayout(const TopkParams& p, uint32_t cluster) {
    constexpr uint32_t kElems = Config::Policy::kElems;
    constexpr uint32_t kSlice = Config::kCapacity * kElems;
    // Fewer than k groups of kElems above the exact bound, and k of its equals.
    const uint32_t most = (kElems + 1) * p.k;
    list_capacity = most < kSlice ? most : kSlice;
    received = (sizeof(TopkClusterSmem<Config>) +
                list_capacity * sizeof(typename Config::Policy::Item) + 15) /
               16 * 16;
    tail = received + (cluster > 1 ? 2 * cluster * kSharedBins * sizeof(uint32_t) : 0);
    bytes = tail;
    if (p.sort) {
      uint32_t entries = 1;
      while (entries < static_cast<uint32_t>(p.k)) entries *= 2;
      bytes += entries * sizeof(uint64_t);
    } else if (p.page_table != nullptr) {
      bytes += p.k * sizeof(int32_t);
    }
  }
};

// The bin of a histogram (bin 0 holds the best keys) at which the running count reaches `need`.
struct TopkPick {
  uint32_t bin;
  uint32_t before;        // count in the bins before it
  uint32_t count;         // count in the bin itself
  bool found;             // whether the histogram holds `need` at all
  uint32_t lower_before;  // the share of the lower ranks in both
  uint32_t lower_count;
};

template <class Config>
struct TopkClusterWorker {
  using Policy = typename Config::Policy;
  using Item = typename Policy::Item;
  using Smem = TopkClusterSmem<Config>;
  using Vectors = RowVectors<Policy>;
  static constexpr int kElems = Policy::kElems;
  static constexpr int kBits = Policy::kBits;
  static constexpr int kVectors = Config::kVectors;
  static constexpr int kThreads = Config::kThreads;
  static constexpr int kWarps = Config::kWarps;
  static constexpr int kScans = (kVectors + 2) / 3;  // three steps' counts to a word
  static constexpr int kKept = 2;                    // list items a lane keeps in registers

  const TopkParams& p;
  Smem& smem;
  const TopkClusterLayout<Config> layout;
  uint32_t size;       // CTAs of the cluster
  uint32_t rank;       // of this one
  bool joined;         // whether the cluster's start-up barrier has been waited for
  uint32_t shares;     // rows whose bounds were exchanged so far
  uint32_t exchanges;  // digits exchanged so far

  __device__ __forceinline__ TopkClusterWorker(const TopkParams& params, void* memory)
      : p(params),
        smem(*static_cast<Smem*>(memory)),
        layout(params, cluster_size()),
        size(cluster_size()),
        rank(cluster_rank()),
        joined(false),
        shares(0),
        exchanges(0) {}

  // Before griddepcontrol.wait: none of this touches global memory.
  __device__ __forceinline__ void start() {
    if (size > 1) {
      if (threadIdx.x == 0) {
        barrier_init(&smem.bounds_barrier);
        barrier_init(&smem.digits_barrier[0]);
        barrier_init(&smem.digits_barrier[1]);
        barrier_init_fence();
      }
      cluster_arrive();
    }
    for (int i = threadIdx.x; i < kSoloBins / 4; i += kThreads) {
      reinterpret_cast<uint4*>(smem.hist)[i] = make_uint4(0, 0, 0, 0);
    }
    __syncthreads();
  }

  // The cluster's start-up barrier: no CTA's shared memory is written before that CTA runs.
  __device__ __forceinline__ void join() {
    if (size > 1 && !joined) cluster_wait();
    joined = true;
  }

  __device__ __forceinline__ unsigned char* at(uint32_t offset) const {
    return reinterpret_cast<unsigned char*>(&smem) + offset;
  }
  __device__ __forceinline__ Item* items() const {
    return reinterpret_cast<Item*>(at(sizeof(Smem)));
  }

  // Sum of one word a warp: over all warps, and over the warps before this one.
  __device__ __forceinline__ uint32_t sum_below(const uint32_t* of_warp, uint32_t& all) {
    const int lane = lane_id();
    const uint32_t own = lane < kWarps ? of_warp[lane] : 0u;
    all = __reduce_add_sync(kFullWarp, own);
    return __reduce_add_sync(kFullWarp, lane < warp_id() ? own : 0u);
  }

  // Closes a round over hist[0, kSoloBins). Each thread reads and clears bins of its own; the first
  // barrier below stands between that and the next round's additions.
  __device__ __forceinline__ TopkPick pick_solo(uint32_t need) {
    constexpr int kOwn = kSoloBins / kThreads;
    static_assert(kOwn == 2 || kOwn == 4 || kOwn == 8, "vector reads of the histogram");
    __syncthreads();
    uint32_t upto[kOwn];
    uint32_t* own_bins = smem.hist + threadIdx.x * kOwn;
    if constexpr (kOwn == 2) {
      const uint2 v = *reinterpret_cast<uint2*>(own_bins);
      *reinterpret_cast<uint2*>(own_bins) = make_uint2(0, 0);
      upto[0] = v.x;
      upto[1] = v.y;
    } else {
#pragma unroll
      for (int i = 0; i < kOwn; i += 4) {
        const uint4 v = *reinterpret_cast<uint4*>(own_bins + i);
        *reinterpret_cast<uint4*>(own_bins + i) = make_uint4(0, 0, 0, 0);
        upto[i] = v.x;
        upto[i + 1] = v.y;
        upto[i + 2] = v.z;
        upto[i + 3] = v.w;
      }
    }
#pragma unroll
    for (int i = 1; i < kOwn; ++i) upto[i] += upto[i - 1];
    const uint32_t reached = warp_inclusive_sum(upto[kOwn - 1]);
    if (lane_id() == kWarpSize - 1) smem.warp_total[warp_id()] = reached;
    __syncthreads();
    uint32_t all;
    const uint32_t outside = sum_below(smem.warp_total, all) + reached - upto[kOwn - 1];
    if (outside < need && need <= outside + upto[kOwn - 1]) {
      uint32_t bin = 0;
      uint32_t before = 0;
      uint32_t through = upto[0];
#pragma unroll
      for (int i = 1; i < kOwn; ++i) {
        if (upto[i - 1] < need - outside) {
          bin = i;
          before = upto[i - 1];
          through = upto[i];
        }
      }
      smem.picked = make_uint4(threadIdx.x * kOwn + bin, outside + before, through - before, 0u);
    }
    __syncthreads();
    const uint4 picked = smem.picked;
    return {picked.x, picked.y, picked.z, all >= need, 0u, 0u};
  }

  // The same over hist[0, kSharedBins) of every CTA of the cluster.
  //
  // received is double-buffered over all exchanges of this kernel. A peer pushes exchange q + 2
  // into the half of exchange q only after it holds all of exchange q + 1, this CTA's part
  // included, and that was sent after the barriers below, hence after exchange q was read. The last
  // exchange is waited for by every CTA, so none exits while a peer still writes to it.
  __device__ __forceinline__ TopkPick pick_shared(uint32_t need) {
    constexpr int kPickWarps = kSharedBins / kWarpSize;
    static_assert(kThreads >= kSharedBins, "one thread a bin");
    const int lane = lane_id();
    const int warp = warp_id();
    uint32_t* half =
        reinterpret_cast<uint32_t*>(at(layout.received)) + (exchanges & 1u) * size * kSharedBins;
    uint64_t* barrier = &smem.digits_barrier[exchanges & 1u];
    __syncthreads();
    if (threadIdx.x == 0) barrier_expect(barrier, size * kSharedBins * sizeof(uint32_t));
    for (uint32_t i = threadIdx.x; i < size * (kSharedBins / 4); i += kThreads) {
      const uint32_t peer = (i / (kSharedBins / 4)) ^ rank;  // sizes are powers of two
      const uint32_t quad = i % (kSharedBins / 4);
      store_counted(map_shared(half + rank * kSharedBins + 4 * quad, peer),
                    reinterpret_cast<const uint4*>(smem.hist)[quad], map_shared(barrier, peer));
    }
    uint32_t total = 0;
    uint32_t lower = 0;
    uint32_t reached = 0;
    uint32_t lower_reached = 0;
    if (warp < kPickWarps) {
      barrier_wait(barrier, (exchanges >> 1) & 1u);
#pragma unroll 4
      for (uint32_t from = 0; from < size; ++from) {
        const uint32_t count = half[from * kSharedBins + threadIdx.x];
        total += count;
        lower += from < rank ? count : 0u;
      }
      reached = warp_inclusive_sum(total);
      lower_reached = warp_inclusive_sum(lower);
      if (lane == kWarpSize - 1) {
        smem.warp_total[warp] = reached;
        smem.warp_lower[warp] = lower_reached;
      }
    }
    ++exchanges;
    __syncthreads();
    if (threadIdx.x < kSharedBins) smem.hist[threadIdx.x] = 0;  // every thread has sent its part
    if (warp < kPickWarps) {
      const bool earlier = lane < warp;
      const uint32_t outside =
          __reduce_add_sync(kFullWarp, earlier ? smem.warp_total[lane] : 0u) + reached - total;
      const uint32_t lower_outside =
          __reduce_add_sync(kFullWarp, earlier ? smem.warp_lower[lane] : 0u) + lower_reached -
          lower;
      if (outside < need && need <= outside + total) {
        smem.picked = make_uint4(threadIdx.x, outside, total, 0u);
        smem.picked_lower = make_uint2(lower_outside, lower);
      }
    }
    __syncthreads();
    const uint4 picked = smem.picked;
    const uint2 of_lower = smem.picked_lower;
    return {picked.x, picked.y, picked.z, true, of_lower.x, of_lower.y};
  }

  // The row's bound is the largest of the slices'. `bounds` is written for the next row only after
  // that row's writer holds this row's first digit from everybody, hence after all have read it.
  __device__ __forceinline__ void share_bound(uint32_t& bound, uint32_t& best) {
    join();
    if (threadIdx.x == 0) barrier_expect(&smem.bounds_barrier, size * sizeof(uint64_t));
    if (threadIdx.x < size) {
      store_counted(map_shared(&smem.bounds[rank], threadIdx.x),
                    (static_cast<uint64_t>(best) << 32) | bound,
                    map_shared(&smem.bounds_barrier, threadIdx.x));
    }
    barrier_wait(&smem.bounds_barrier, shares & 1u);
    ++shares;
    const uint64_t of_rank = lane_id() < size ? smem.bounds[lane_id()] : 0u;
    bound = __reduce_max_sync(kFullWarp, static_cast<uint32_t>(of_rank));
    best = __reduce_max_sync(kFullWarp, static_cast<uint32_t>(of_rank >> 32));
  }

  // Adds every group of the slice to the histogram by `bin(key)`; ~0 leaves it out.
  template <class Bin>
  __device__ __forceinline__ void add_group(uint32_t key, Bin bin) {
    const uint32_t b = bin(key);
    if (key != 0 && b != ~0u) atomicAdd(smem.hist + b, 1u);  // key 0: NaN or padding
  }

  // The k-th largest group maximum of the slice, exactly; 0 where fewer than k groups hold a
  // number.
  __device__ __forceinline__ uint32_t exact_bound(const uint4 (&scores)[kVectors], int32_t depth,
                                                  uint32_t k, bool fine) {
    uint32_t prefix = 0;
    uint32_t need = k;
#pragma unroll 1
    for (int shift = kBits - 8; shift >= 0; shift -= 8) {
      const auto bin = [&](uint32_t key) {
        const uint32_t top = key >> shift;
        return (top >> 8) == prefix ? 255u - (top & 255u) : ~0u;
      };
#pragma unroll
      for (int step = 0; step < kVectors; ++step) {
        if (step >= depth) break;
        if (fine) {
#pragma unroll
          for (int part = 0; part < Policy::kFine; ++part) {
            add_group(Policy::fine_key(scores[step], part), bin);
          }
        } else {
          add_group(Policy::best_key(Policy::best(scores[step])), bin);
        }
      }
      const TopkPick pick = pick_solo(need);
      if (!pick.found) return 0;
      prefix = (prefix << 8) | (255u - pick.bin);
      need -= pick.before;
    }
    return prefix;
  }

  // Lists the masked elements of one vector, each at the place that place(e) names (~0: nowhere).
  template <class Place>
  __device__ __forceinline__ void list_elements(const uint4& scores, uint32_t mask, uint32_t first,
                                                Place place) {
#pragma unroll
    for (int e = 0; e < kElems; ++e) {
      if ((mask >> e) & 1u) {
        const uint32_t position = place(e);
        if (position != ~0u) items()[position] = Policy::item(scores, e, first + e);
      }
    }
  }

  // Lists the elements above the bound and the first k of those equal to it; returns how many.
  __device__ __forceinline__ uint32_t gather_limited(const uint4 (&scores)[kVectors],
                                                     const Vectors& vectors, int32_t begin,
                                                     int32_t count, int32_t depth, int32_t mine,
                                                     uint32_t bound) {
    const uint32_t k = p.k;
    const bool any = bound < Policy::kLowest;  // every number is above it, and NaN equals it
    const uint32_t limit = Policy::bits(any ? Policy::kLowest : bound);
    const auto classify = [&](int step, uint32_t& above, uint32_t& equal) {
      const int32_t v = mine + step * kWarpSize;
      above = equal = 0;
      if (step >= depth || v >= count) return;
      const uint32_t reach = Policy::at_least(scores[step], limit);
      above = any ? reach : Policy::above(scores[step], limit);
      equal = (any ? vectors.valid_mask(begin + v) : reach) & ~above;
    };
    uint32_t above;
    uint32_t equal;
    uint32_t packed = 0;
#pragma unroll
    for (int step = 0; step < kVectors; ++step) {
      classify(step, above, equal);
      packed += __popc(above) | (__popc(equal) << 16);
    }
    const uint32_t own_above = __reduce_add_sync(kFullWarp, packed & 0xffffu);
    const uint32_t own_equal = __reduce_add_sync(kFullWarp, packed >> 16);
    __syncthreads();  // a first attempt may still be reading warp_gathered
    if (lane_id() == 0) {
      smem.warp_gathered[warp_id()] = own_above;
      smem.warp_equal[warp_id()] = own_equal;
    }
    __syncthreads();
    uint32_t all_above;
    uint32_t all_equal;
    uint32_t above_before = sum_below(smem.warp_gathered, all_above);
    uint32_t equal_before = sum_below(smem.warp_equal, all_equal);
#pragma unroll
    for (int step = 0; step < kVectors; ++step) {
      if (step >= depth) break;
      classify(step, above, equal);
      const uint32_t here = __popc(above) | (__popc(equal) << 16);
      const uint32_t upto = warp_inclusive_sum(here);
      uint32_t a = above_before + ((upto - here) & 0xffffu);
      uint32_t e = equal_before + ((upto - here) >> 16);
      list_elements(scores[step], above | equal, (mine + step * kWarpSize) * kElems, [&](int i) {
        if ((equal >> i) & 1u) {
          const uint32_t place = e++;
          return place < k ? a + place : ~0u;
        }
        return a++ + min(e, k);
      });
      const uint32_t step_all = __shfl_sync(kFullWarp, upto, kWarpSize - 1);
      above_before += step_all & 0xffffu;
      equal_before += step_all >> 16;
    }
    return all_above + min(all_equal, k);
  }

  // The element masks of all steps, a byte (or half of one) each, and where the elements go:
  // relative to the warp's first, step by step, lane by lane.
  struct Steps {
    uint32_t mask_words[(kVectors + 3) / 4];
    uint32_t before[kScans];  // of the lanes below, three steps of 10 bits to a word
    uint32_t of_warp[kScans];

    __device__ __forceinline__ uint32_t mask(int step) const {
      return (mask_words[step / 4] >> (8 * (step % 4))) & 0xffu;
    }
    __device__ __forceinline__ uint32_t field(const uint32_t (&words)[kScans], int step) const {
      return (words[step / 3] >> (10 * (step % 3))) & 1023u;
    }
    __device__ __forceinline__ uint32_t total() const {
      uint32_t sum = 0;
#pragma unroll
      for (int step = 0; step < kVectors; ++step) sum += field(of_warp, step);
      return sum;
    }
  };

  __device__ __forceinline__ Steps mask_steps(const uint4 (&scores)[kVectors], int32_t depth,
                                              uint32_t limit) {
    Steps steps;
#pragma unroll
    for (uint32_t& words : steps.mask_words) words = 0;
#pragma unroll
    for (int step = 0; step < kVectors; ++step) {
      if (step >= depth) break;
      steps.mask_words[step / 4] |= Policy::at_least(scores[step], limit) << (8 * (step % 4));
    }
#pragma unroll
    for (int scan = 0; scan < kScans; ++scan) {
      uint32_t packed = 0;
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        if (scan * 3 + i < kVectors) packed |= __popc(steps.mask(scan * 3 + i)) << (10 * i);
      }
      const uint32_t upto = warp_inclusive_sum(packed);
      steps.before[scan] = upto - packed;
      steps.of_warp[scan] = __shfl_sync(kFullWarp, upto, kWarpSize - 1);
    }
    return steps;
  }

  __device__ void select(int32_t row, RowWindow window, bool together) {
    const int lane = lane_id();
    const int warp = warp_id();
    const uint32_t k = p.k;
    if (window.length <= p.k) {
      RowOutput(p, row).write_all(window.length, p.k);
      return;
    }
    const Vectors vectors(p, row, window);

    // ---- 1. Load --------------------------------------------------------------------------------
    // This CTA's vectors are [begin, begin + count). A warp takes 32 * depth of them in a row, so
    // that warp, then step, then lane is the row's order.
    int32_t begin = 0;
    int32_t count = vectors.count;
    if (together) {
      const int32_t share = (vectors.count + size - 1) / size;
      begin = min(vectors.count, static_cast<int32_t>(rank) * share);
      count = min(vectors.count - begin, share);
    }
    const int32_t depth = (count + kThreads - 1) / kThreads;
    const int32_t mine = warp * kWarpSize * depth + lane;  // + 32 * step
    uint4 scores[kVectors];
    {
      const int32_t first = max(0, vectors.whole_begin - begin);
      const int32_t last =
          min(vectors.whole_end - begin, min(count, (warp + 1) * kWarpSize * depth));
      const typename Policy::Scalar* from = vectors.at(begin + mine);
#pragma unroll
      for (int step = 0; step < kVectors; ++step) {
        const int32_t v = mine + step * kWarpSize;
        scores[step] = Policy::pad();
        if (v >= first && v < last) scores[step] = Policy::load(from + step * kWarpSize * kElems);
      }
      if (vectors.whole_begin != 0 || vectors.whole_end != vectors.count) {
#pragma unroll 1
        for (int end = 0; end < 2; ++end) {
          const int32_t g = end == 0 ? 0 : vectors.count - 1;
          const int32_t ahead = g - begin - mine;
          if (vectors.whole(g) || g - begin >= count || ahead < 0 || ahead % kWarpSize != 0 ||
              ahead / kWarpSize >= depth) {
            continue;
          }
          const uint4 partial = vectors.load_partial(g);
#pragma unroll
          for (int step = 0; step < kVectors; ++step) {
            if (step == ahead / kWarpSize) scores[step] = partial;
          }
        }
      }
    }

    // ---- 2. Bound -------------------------------------------------------------------------------
    const bool fine = static_cast<uint32_t>(count) < k + k / 4;
    uint32_t best;   // largest key of the slice
    uint32_t bound;  // 0: let everything through
    bool refine;     // whether the exact bound is wanted instead
    {
      // Groups of two vectors where those are still at least 2k: half the histogram traffic.
      const bool coarse = kVectors > 1 && static_cast<uint32_t>(count) >= 4 * k;
      typename Policy::Best single[kVectors];
#pragma unroll
      for (int step = 0; step < kVectors; ++step) single[step] = Policy::best(scores[step]);
      const auto bin = [](uint32_t key) { return kSoloBins - 1 - (key >> (kBits - 11)); };
      if (fine) {
#pragma unroll
        for (int step = 0; step < kVectors; ++step) {
          if (step >= depth) break;
#pragma unroll
          for (int part = 0; part < Policy::kFine; ++part) {
            add_group(Policy::fine_key(scores[step], part), bin);
          }
        }
      } else if (coarse) {
#pragma unroll
        for (int step = 0; step + 1 < kVectors; step += 2) {
          if (step < depth) {
            add_group(Policy::best_key(Policy::better(single[step], single[step + 1])), bin);
          }
        }
      } else {
#pragma unroll
        for (int step = 0; step < kVectors; ++step) {
          if (step < depth) add_group(Policy::best_key(single[step]), bin);
        }
      }
#pragma unroll
      for (int step = 1; step < kVectors; ++step)
        single[0] = Policy::better(single[0], single[step]);
      best = __reduce_max_sync(kFullWarp, Policy::best_key(single[0]));
      if (lane == 0) smem.warp_best[warp] = best;
      const TopkPick pick = pick_solo(k);
      best = __reduce_max_sync(kFullWarp, lane < kWarps ? smem.warp_best[lane] : 0u);
      // Where fewer than k groups hold a number everything is let through: that is fewer than
      // k * kElems numbers, and of the NaN the first k.
      bound = pick.found ? (kSoloBins - 1 - pick.bin) << (kBits - 11) : 0u;
      refine = bound < Policy::kLowest && (pick.found || coarse);
    }
    uint32_t row_best = best;
    uint32_t row_bound = bound;
    if (together) {
      share_bound(row_bound, row_best);
      bound = row_bound;
      refine = refine && bound < Policy::kLowest;
    }

    // ---- 3. Gather ------------------------------------------------------------------------------
    uint32_t gathered = 0;
    if (!refine && bound >= Policy::kLowest) {
      const Steps steps = mask_steps(scores, depth, Policy::bits(bound));
      if (lane == 0) smem.warp_gathered[warp] = steps.total();
      __syncthreads();
      uint32_t base = sum_below(smem.warp_gathered, gathered);
      refine = gathered > layout.list_capacity;
      if (!refine) {
#pragma unroll
        for (int step = 0; step < kVectors; ++step) {
          if (step >= depth) break;
          uint32_t position = base + steps.field(steps.before, step);
          list_elements(scores[step], steps.mask(step), (mine + step * kWarpSize) * kElems,
                        [&](int) { return position++; });
          base += steps.field(steps.of_warp, step);
        }
      }
    } else {
      refine = true;
    }
    if (refine) {
      bound = max(bound, exact_bound(scores, depth, k, fine));
      gathered = gather_limited(scores, vectors, begin, count, depth, mine, bound);
    }
    __syncthreads();
    // From here on a warp owns a run of the list, again in row order.
    const uint32_t run = (gathered + kThreads - 1) / kThreads * kWarpSize;
    const uint32_t run_begin = min(gathered, warp * run);
    const uint32_t run_end = min(gathered, run_begin + run);
    const Item* listed = items();
    // The first kKept steps of a run stay in registers: nearly always all of them.
    uint32_t kept_distance[kKept];  // ~0: no item
    uint32_t kept_position[kKept];
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const uint32_t at = run_begin + i * kWarpSize + lane;
      kept_distance[i] = ~0u;
      kept_position[i] = 0;
      if (at < run_end) {
        const Item item = listed[at];
        kept_distance[i] = row_best - Policy::item_key(item);
        kept_position[i] = Policy::item_position(item);
      }
    }
    const uint32_t rest_begin = run_begin + kKept * kWarpSize;

    // ---- 4. Threshold ---------------------------------------------------------------------------
    // Digits of distance = best - key, from 0 at the top. `prefix` is the threshold's so far; of
    // the keys that share it the first `need` are chosen. lower_*: what the lower ranks hold of
    // each.
    uint32_t prefix = 0;
    uint32_t need = k;
    uint32_t lower_before = 0;
    uint32_t lower_equal = 0;
    int shift = 32 - __clz(row_best - row_bound);
    const int digit = together ? kSharedDigit : kSoloDigit;
    do {
      const int step = min(shift, digit);
      shift -= step;
      const auto add = [&](uint32_t distance) {
        const uint32_t digits = distance >> shift;
        if ((digits >> step) == prefix) atomicAdd(smem.hist + (digits & ((1u << step) - 1u)), 1u);
      };
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        if (run_begin + i * kWarpSize + lane < run_end) add(kept_distance[i]);
      }
      for (uint32_t i = rest_begin + lane; i < run_end; i += kWarpSize) {
        add(row_best - Policy::item_key(listed[i]));
      }
      const TopkPick pick = together ? pick_shared(need) : pick_solo(need);
      lower_before += pick.lower_before;
      lower_equal = pick.lower_count;
      prefix = (prefix << step) | pick.bin;
      need -= pick.before;
      if (pick.count == need) break;  // the whole bin is chosen: later digits decide nothing
    } while (shift > 0);

    // ---- 5. Write -------------------------------------------------------------------------------
    // Counts travel packed: before the threshold in the low 12 bits, equal in the high 20.
    const auto count_step = [&](bool inside, uint32_t distance) {
      const uint32_t digits = distance >> shift;
      return __popc(__ballot_sync(kFullWarp, inside && digits < prefix)) |
             (__popc(__ballot_sync(kFullWarp, inside && digits == prefix)) << 12);
    };
    uint32_t chosen = 0;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      chosen += count_step(run_begin + i * kWarpSize + lane < run_end, kept_distance[i]);
    }
    for (uint32_t i = rest_begin; i < run_end; i += kWarpSize) {
      const bool inside = i + lane < run_end;
      chosen += count_step(inside, inside ? row_best - Policy::item_key(listed[i + lane]) : 0u);
    }
    if (lane == 0) smem.warp_chosen[warp] = chosen;
    __syncthreads();
    uint32_t all;
    const uint32_t packed = sum_below(smem.warp_chosen, all);
    uint32_t above = lower_before + (packed & 0xfffu);
    uint32_t equal = lower_equal + (packed >> 12);
    const uint32_t first = lower_before + min(lower_equal, need);
    const bool stage = p.page_table != nullptr && !p.sort;
    int32_t* staged = reinterpret_cast<int32_t*>(at(layout.tail));
    uint64_t* entries = reinterpret_cast<uint64_t*>(at(layout.tail));
    const int32_t origin = vectors.index(begin, 0);
    int32_t* const out = p.out + row * p.out_stride;
    const auto write_step = [&](bool inside, uint32_t distance, uint32_t element) {
      const uint32_t digits = distance >> shift;
      const bool is_above = inside && digits < prefix;
      const bool is_equal = inside && digits == prefix;
      const uint32_t above_mask = __ballot_sync(kFullWarp, is_above);
      const uint32_t equal_mask = __ballot_sync(kFullWarp, is_equal);
      const uint32_t e = equal + __popc(equal_mask & lanes_below());
      if (is_above || (is_equal && e < need)) {
        const uint32_t position = above + __popc(above_mask & lanes_below()) + min(e, need);
        const int32_t index = origin + static_cast<int32_t>(element);
        if (p.sort) {
          store_remote(map_shared(entries + position, together ? 0u : rank),
                       sort_entry(row_best - distance, index));
        } else if (stage) {
          staged[position - first] = index;
        } else {
          out[position] = index;
          if (p.out_raw != nullptr) p.out_raw[row * p.out_raw_stride + position] = index;
        }
      }
      above += __popc(above_mask);
      equal += __popc(equal_mask);
    };
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      write_step(run_begin + i * kWarpSize + lane < run_end, kept_distance[i], kept_position[i]);
    }
    for (uint32_t i = rest_begin; i < run_end; i += kWarpSize) {
      const bool inside = i + lane < run_end;
      const Item item = inside ? listed[i + lane] : Item{};
      write_step(inside, row_best - Policy::item_key(item), Policy::item_position(item));
    }
    if (stage) {
      // One table look-up a thread instead of a chain of them.
      const uint32_t last = lower_before + (all & 0xfffu) + min(lower_equal + (all >> 12), need);
      __syncthreads();
      const RowOutput output(p, row);
      for (uint32_t i = first + threadIdx.x; i < last; i += kThreads) {
        output.write(i, staged[i - first]);
      }
    }
    if (p.sort) {
      // The next row's entries come behind that row's exchanges, for which rank 0 arrives only when
      // it is done here.
      if (together) {
        cluster_arrive();
        cluster_wait();
      } else {
        __syncthreads();
      }
      if (!together || rank == 0) sort_and_write(entries, p.k, RowOutput(p, row));
    }
  }
};

template <class Config>
__global__ __launch_bounds__(Config::kThreads, Config::kMinBlocks) void topk_cluster_kernel(
    const __grid_constant__ TopkParams p, const __grid_constant__ TopkClusterPlan plan) {
  extern __shared__ __align__(16) unsigned char memory[];
  pdl_launch_dependents();
  TopkClusterWorker<Config> worker(p, memory);
  worker.start();

  // Rows in batches of 32, one lane each; first those that one CTA serves alone, dealt out over the
  // cluster's CTAs, then the others, all CTAs together. Every warp of the cluster sees the same.
  const int32_t cluster = blockIdx.x / worker.size;
  uint32_t dealt = 0;
  int64_t row = cluster + int64_t{lane_id()} * plan.clusters;
  WindowSource source(p, row < p.rows ? static_cast<int32_t>(row) : 0);
  pdl_wait();
  for (int64_t first = cluster; first < p.rows; first += int64_t{kWarpSize} * plan.clusters) {
    if (first != cluster) {
      row = first + int64_t{lane_id()} * plan.clusters;
      source = WindowSource(p, row < p.rows ? static_cast<int32_t>(row) : 0);
    }
    RowWindow window{0, 0};
    if (row < p.rows) window = source.read(p);
    const uint32_t present = __ballot_sync(kFullWarp, row < p.rows);
    const bool alone = worker.size == 1 || window.length <= max(p.k, plan.solo_length);
    uint32_t solo = present & __ballot_sync(kFullWarp, alone);
    uint32_t shared = present & ~solo;
    while ((solo | shared) != 0) {
      const bool together = solo == 0;
      uint32_t& queue = together ? shared : solo;
      const int owner = __ffs(queue) - 1;
      queue &= queue - 1;
      if (!together && (dealt++ & (worker.size - 1)) != worker.rank) continue;
      const RowWindow mine{__shfl_sync(kFullWarp, window.start, owner),
                           __shfl_sync(kFullWarp, window.length, owner)};
      worker.select(static_cast<int32_t>(first + int64_t{owner} * plan.clusters), mine, together);
    }
  }
  worker.join();  // no CTA leaves the start-up barrier half done
}

}  // namespace dsv4
