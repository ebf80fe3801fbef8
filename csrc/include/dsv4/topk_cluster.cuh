// Top-k with the row held on chip: one cluster of C CTAs a row (C = 1: one CTA), each score read
// once.
//
//   1. load       each CTA takes a contiguous slice of the row, 16 bytes a load, and keeps a copy
//   of
//                 it in shared memory
//   2. bound      a lower bound of the k-th largest *group maximum* of the slice. Maxima of
//   disjoint
//                 groups are distinct elements, so at least k elements reach it: nothing below can
//                 be among the slice's, and so the row's, k largest. True of any data.
//   3. gather     the elements that reach the bound, as a list in row order (about k of them)
//   4. threshold  radix digits over the list only. The CTAs of a cluster push their 256-bin
//   histograms
//                 into each other's shared memory, one cluster barrier a digit; after it every CTA
//                 knows the row's digit and, from the counts of the lower ranks, where its own part
//                 of the answer goes and which share of the ties is its own. There is no leader.
//   5. write      ascending positions
//
// The bound of step 2 is taken from one histogram of limited resolution. Where that lets more
// elements through than the list has room for (all scores equal, a plateau, scores spread over more
// than eight octaves) the exact bound is computed by digits; with it the list cannot overflow:
// fewer than k groups lie above it, and of the elements equal to it the first k are enough, since
// ties go to the lowest index.
//
// Everything is decided on the device by each row's own length: a row up to `solo_length` is one
// CTA's work whatever the width of the buffer, and the CTAs of a cluster share such rows among
// them.
//
// Time is instructions more than bytes: a warp runs some 700 from end to end, about 5 cycles each.
#pragma once

#include "dsv4/radix_pick.cuh"
#include "dsv4/row_vectors.cuh"
#include "dsv4/topk_sort.cuh"

namespace dsv4 {

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
  // A histogram is filled in round q, read until the barrier of round q + 1, cleared right after
  // that barrier and filled again in round q + 3, behind the barrier of round q + 2.
  alignas(16) uint32_t hist[3][kBins];
  alignas(16) uint32_t total[kBins];  // of the cluster
  alignas(16) uint32_t lower[kBins];  // of the ranks below this one
  uint64_t bounds[16];                // each rank's bound and best key
  uint32_t warp_best[kWarpSize];
  uint32_t warp_gathered[kWarpSize];
  uint32_t warp_equal[kWarpSize];
  uint32_t warp_chosen[kWarpSize];
  alignas(16) uint4 scores[Config::kCapacity];  // raw; a listed element is replaced by its key
  // Then, in this order: list[TopkClusterLayout::list_capacity], received[2][C][kBins] where C > 1,
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
    received = sizeof(TopkClusterSmem<Config>) + (list_capacity * sizeof(uint16_t) + 15) / 16 * 16;
    tail = received + (cluster > 1 ? 2 * cluster * kBins * sizeof(uint32_t) : 0);
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

template <class Config>
struct TopkClusterWorker {
  using Policy = typename Config::Policy;
  using Key = typename Policy::Key;
  using Smem = TopkClusterSmem<Config>;
  using Vectors = RowVectors<Policy>;
  static constexpr int kElems = Policy::kElems;
  static constexpr int kBits = Policy::kBits;
  static constexpr int kVectors = Config::kVectors;
  static constexpr int kThreads = Config::kThreads;
  static constexpr int kWarps = Config::kWarps;
  static constexpr int kScans = (kVectors + 2) / 3;  // three steps' counts to a word

  const TopkParams& p;
  Smem& smem;
  const TopkClusterLayout<Config> layout;
  uint32_t size;       // CTAs of the cluster
  uint32_t rank;       // of this one
  bool used;           // whether shared memory holds a row already
  bool joined;         // whether the cluster's start-up barrier has been waited for
  int slot;            // histogram of this round, 0 ... 2
  uint32_t exchanges;  // digits exchanged so far

  __device__ __forceinline__ TopkClusterWorker(const TopkParams& params, void* memory)
      : p(params),
        smem(*static_cast<Smem*>(memory)),
        layout(params, cluster_size()),
        size(cluster_size()),
        rank(cluster_rank()),
        used(false),
        joined(false),
        slot(0),
        exchanges(0) {}

  __device__ __forceinline__ unsigned char* at(uint32_t offset) const {
    return reinterpret_cast<unsigned char*>(&smem) + offset;
  }
  __device__ __forceinline__ uint16_t* list() const {
    return reinterpret_cast<uint16_t*>(at(sizeof(Smem)));
  }
  __device__ __forceinline__ Key* keys() const { return reinterpret_cast<Key*>(smem.scores); }

  // Rounds: fill hist(), then close_round(), then read what close_round returned.
  __device__ __forceinline__ uint32_t* hist() { return smem.hist[slot]; }

  __device__ __forceinline__ const uint32_t* close_round() {
    __syncthreads();
    const int previous = slot == 0 ? 2 : slot - 1;
    if (threadIdx.x < kBins / 4) {
      reinterpret_cast<uint4*>(smem.hist[previous])[threadIdx.x] = make_uint4(0, 0, 0, 0);
    }
    const uint32_t* filled = smem.hist[slot];
    slot = slot == 2 ? 0 : slot + 1;
    return filled;
  }

  // The cluster's start-up barrier: no CTA's shared memory is written before that CTA runs.
  __device__ __forceinline__ void join() {
    if (size > 1 && !joined) cluster_wait();
    joined = true;
  }

  __device__ __forceinline__ void cluster_sync() {
    cluster_arrive();
    cluster_wait();
  }

  // The row's bound is the largest of the slices'. `bounds` is written again for the next row only
  // after that row's writer passed this row's first digit exchange, hence after all have read it.
  __device__ __forceinline__ void share_bound(uint32_t& bound, uint32_t& best) {
    join();
    if (threadIdx.x < size) {
      store_remote(map_shared(&smem.bounds[rank], threadIdx.x),
                   (static_cast<uint64_t>(best) << 32) | bound);
    }
    cluster_sync();
    const uint64_t of_rank = lane_id() < size ? smem.bounds[lane_id()] : 0u;
    bound = __reduce_max_sync(kFullWarp, static_cast<uint32_t>(of_rank));
    best = __reduce_max_sync(kFullWarp, static_cast<uint32_t>(of_rank >> 32));
  }

  struct SharedPick {
    Pick pick;
    uint32_t lower_before;  // of lower ranks, in bins before the picked one
    uint32_t lower_count;   // ... in the picked one
  };

  // One digit over the whole cluster.
  //
  // received is double-buffered over all exchanges of this kernel. A peer pushes exchange q into
  // half q & 1 only after it passed the cluster barrier of exchange q - 1, at which every CTA
  // arrived after it had read exchange q - 2, the last user of that half. After the last barrier
  // nobody writes to a peer any more, so a CTA may exit while others still read their own shared
  // memory.
  __device__ __forceinline__ SharedPick exchange(const uint32_t* filled, uint32_t need) {
    uint32_t* half =
        reinterpret_cast<uint32_t*>(at(layout.received)) + (exchanges & 1u) * size * kBins;
    ++exchanges;
    for (uint32_t i = threadIdx.x; i < size * (kBins / 4); i += kThreads) {
      const uint32_t peer = (i / (kBins / 4)) ^ rank;  // sizes are powers of two
      const uint32_t quad = i % (kBins / 4);
      store_remote(map_shared(half + rank * kBins + 4 * quad, peer),
                   reinterpret_cast<const uint4*>(filled)[quad]);
    }
    cluster_sync();
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) {
      uint32_t total = 0;
      uint32_t lower = 0;
#pragma unroll 4
      for (uint32_t from = 0; from < size; ++from) {
        const uint32_t count = half[from * kBins + bin];
        total += count;
        lower += from < rank ? count : 0u;
      }
      smem.total[bin] = total;
      smem.lower[bin] = lower;
    }
    __syncthreads();
    SharedPick result;
    result.pick = pick_bin(smem.total, need);
    uint32_t lower_before = 0;
#pragma unroll
    for (int i = 0; i < kBins / kWarpSize; ++i) {
      const uint32_t bin = i * kWarpSize + lane_id();
      lower_before += bin < result.pick.bin ? smem.lower[bin] : 0u;
    }
    result.lower_before = __reduce_add_sync(kFullWarp, lower_before);
    result.lower_count = smem.lower[result.pick.bin];
    return result;
  }

  // The k-th largest group maximum of the slice, exactly; 0 where there are fewer than k groups.
  __device__ __forceinline__ uint32_t exact_bound(int32_t count, int32_t depth, int32_t mine,
                                                  uint32_t k, bool fine) {
    uint32_t prefix = 0;
    uint32_t need = k;
#pragma unroll 1
    for (int shift = kBits - 8; shift >= 0; shift -= 8) {
      uint32_t* bins = hist();
      const auto add = [&](uint32_t key) {
        const uint32_t top = key >> shift;
        if (key != 0 && (top >> 8) == prefix) atomicAdd(bins + (255u - (top & 255u)), 1u);
      };
#pragma unroll 1
      for (int step = 0; step < depth; ++step) {
        if (mine + step * kWarpSize >= count) break;
        const uint4 v = smem.scores[mine + step * kWarpSize];
        if (fine) {
#pragma unroll
          for (int part = 0; part < Policy::kFine; ++part) add(Policy::fine_key(v, part));
        } else {
          add(Policy::best_key(Policy::best(v)));
        }
      }
      const Pick pick = pick_bin(close_round(), need);
      if (!pick.found) return 0;
      prefix = (prefix << 8) | (255u - pick.bin);
      need -= pick.before;
    }
    return prefix;
  }

  // Lists the elements above the bound and the first k of those equal to it; returns how many. The
  // rare path: it reads the slice back from shared memory, a vector at a time.
  __device__ __forceinline__ uint32_t gather_limited(const Vectors& vectors, int32_t begin,
                                                     int32_t count, int32_t depth, int32_t mine,
                                                     uint32_t bound) {
    const uint32_t k = p.k;
    const bool any = bound < Policy::kLowest;  // every number is above it, and NaN equals it
    const uint32_t limit = Policy::bits(any ? Policy::kLowest : bound);
    const auto classify = [&](int step, uint32_t& above, uint32_t& equal) {
      const int32_t v = mine + step * kWarpSize;
      above = equal = 0;
      if (v >= count) return;
      const uint4 scores = smem.scores[v];
      const uint32_t reach = Policy::at_least(scores, limit);
      above = any ? reach : Policy::above(scores, limit);
      equal = (any ? vectors.valid_mask(begin + v) : reach) & ~above;
    };
    uint32_t above;
    uint32_t equal;
    uint32_t packed = 0;
#pragma unroll 1
    for (int step = 0; step < depth; ++step) {
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
#pragma unroll 1
    for (int step = 0; step < depth; ++step) {
      classify(step, above, equal);
      const uint32_t here = __popc(above) | (__popc(equal) << 16);
      const uint32_t upto = warp_inclusive_sum(here);
      uint32_t a = above_before + ((upto - here) & 0xffffu);
      uint32_t e = equal_before + ((upto - here) >> 16);
      const uint32_t is_equal = equal;
      list_elements(above | equal, (mine + step * kWarpSize) * kElems, [&](int element) {
        if ((is_equal >> element) & 1u) {
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

  // Where each step's elements of this lane go, relative to the warp's first: step-major, then
  // lane. Returns the warp's total.
  __device__ __forceinline__ uint32_t scan_steps(const uint32_t (&masks)[kVectors],
                                                 uint32_t (&offset)[kVectors]) {
    uint32_t total = 0;
#pragma unroll
    for (int scan = 0; scan < kScans; ++scan) {
      uint32_t packed = 0;
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        if (scan * 3 + i < kVectors) packed |= __popc(masks[scan * 3 + i]) << (10 * i);
      }
      const uint32_t upto = warp_inclusive_sum(packed);
      const uint32_t before = upto - packed;
      const uint32_t all = __shfl_sync(kFullWarp, upto, kWarpSize - 1);
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        if (scan * 3 + i >= kVectors) break;
        offset[scan * 3 + i] = total + ((before >> (10 * i)) & 1023u);
        total += (all >> (10 * i)) & 1023u;
      }
    }
    return total;
  }

  __device__ __forceinline__ uint32_t sum_below(const uint32_t* of_warp, uint32_t& all) {
    const int lane = lane_id();
    const uint32_t own = lane < kWarps ? of_warp[lane] : 0u;
    all = __reduce_add_sync(kFullWarp, own);
    return __reduce_add_sync(kFullWarp, lane < warp_id() ? own : 0u);
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
    // Another warp may still be writing the previous row's answer from scores and list.
    if (used) __syncthreads();
    used = true;
#pragma unroll
    for (int step = 0; step < kVectors; ++step) {
      if (step < depth) smem.scores[mine + step * kWarpSize] = scores[step];
    }

    // ---- 2. Bound -------------------------------------------------------------------------------
    // Key 0 (NaN, padding) never enters a histogram: a bound is a number's key, or 0.
    const bool fine = static_cast<uint32_t>(count) < k + k / 4;
    uint32_t best;   // largest key of the slice
    uint32_t bound;  // 0: let everything through
    bool refine;     // whether the exact bound is wanted instead
    {
      // Groups of two vectors where those are still at least 2k: half the histogram traffic.
      constexpr int kPaired = kVectors / 2;
      const bool coarse = kVectors > 1 && static_cast<uint32_t>(count) >= 4 * k;
      typename Policy::Best single[kVectors];
#pragma unroll
      for (int step = 0; step < kVectors; ++step) single[step] = Policy::best(scores[step]);
      typename Policy::Best all = single[0];
#pragma unroll
      for (int step = 1; step < kVectors; ++step) all = Policy::better(all, single[step]);
      best = __reduce_max_sync(kFullWarp, Policy::best_key(all));
      if (lane == 0) smem.warp_best[warp] = best;
      __syncthreads();
      best = __reduce_max_sync(kFullWarp, lane < kWarps ? smem.warp_best[lane] : 0u);

      uint32_t* bins = hist();
      const uint32_t top = best >> (kBits - 16);
      const auto add = [&](uint32_t key) {
        const uint32_t bin = (top - (key >> (kBits - 16))) >> Policy::kWindowShift;
        if (key != 0) atomicAdd(bins + min(bin, 255u), 1u);
      };
      if (fine) {
#pragma unroll
        for (int step = 0; step < kVectors; ++step) {
          if (step >= depth) break;
#pragma unroll
          for (int part = 0; part < Policy::kFine; ++part)
            add(Policy::fine_key(scores[step], part));
        }
      } else if (coarse) {
#pragma unroll
        for (int i = 0; i < kPaired; ++i) {
          if (2 * i < depth)
            add(Policy::best_key(Policy::better(single[2 * i], single[2 * i + 1])));
        }
      } else {
#pragma unroll
        for (int step = 0; step < kVectors; ++step) {
          if (step < depth) add(Policy::best_key(single[step]));
        }
      }
      const Pick pick = pick_bin(close_round(), k);
      // The last bin is open towards lower keys. Fewer than k groups: everything is let through,
      // and fits (count < 1.25 k vectors, or NaN almost everywhere, which the exact bound deals
      // with).
      const uint32_t depth_of_bin = ((pick.bin + 1) << Policy::kWindowShift) - 1;
      bound = pick.bin == 255u || top < depth_of_bin ? 0u : (top - depth_of_bin) << (kBits - 16);
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
      uint32_t masks[kVectors];
      uint32_t offset[kVectors];
      const uint32_t limit = Policy::bits(bound);
#pragma unroll
      for (int step = 0; step < kVectors; ++step) {
        masks[step] = step < depth ? Policy::at_least(scores[step], limit) : 0u;
      }
      const uint32_t own = scan_steps(masks, offset);
      if (lane == 0) smem.warp_gathered[warp] = own;
      __syncthreads();
      const uint32_t base = sum_below(smem.warp_gathered, gathered);
      refine = gathered > layout.list_capacity;
      if (!refine) {
#pragma unroll
        for (int step = 0; step < kVectors; ++step) {
          uint32_t position = base + offset[step];
          list_elements(masks[step], (mine + step * kWarpSize) * kElems,
                        [&](int) { return position++; });
        }
      }
    } else {
      refine = true;
    }
    if (refine) {
      bound = max(bound, exact_bound(count, depth, mine, k, fine));
      gathered = gather_limited(vectors, begin, count, depth, mine, bound);
    }
    __syncthreads();
    // From here on a warp owns a run of the list, again in row order.
    const uint32_t run = (gathered + kThreads - 1) / kThreads * kWarpSize;
    const uint32_t run_begin = min(gathered, warp * run);
    const uint32_t run_end = min(gathered, run_begin + run);
    const uint16_t* listed = list();
    const Key* key_of = keys();

    // ---- 4. Threshold ---------------------------------------------------------------------------
    // Digits of distance = best - key, from 0 at the top. `prefix` is the threshold's so far; of
    // the keys that share it the first `need` are chosen. lower_*: what the lower ranks hold of
    // each.
    uint32_t prefix = 0;
    uint32_t need = k;
    uint32_t lower_before = 0;
    uint32_t lower_equal = 0;
    int shift = 32 - __clz(row_best - row_bound);
    do {
      const int step = min(shift, 8);
      shift -= step;
      uint32_t* bins = hist();
      for (uint32_t i = run_begin + lane; i < run_end; i += kWarpSize) {
        const uint32_t digits = (row_best - key_of[listed[i]]) >> shift;
        if ((digits >> step) == prefix) atomicAdd(bins + (digits & ((1u << step) - 1u)), 1u);
      }
      const uint32_t* filled = close_round();
      Pick pick;
      if (together) {
        const SharedPick shared = exchange(filled, need);
        pick = shared.pick;
        lower_before += shared.lower_before;
        lower_equal = shared.lower_count;
      } else {
        pick = pick_bin(filled, need);
      }
      prefix = (prefix << step) | pick.bin;
      need -= pick.before;
      if (pick.count == need) break;  // the whole bin is chosen: later digits decide nothing
    } while (shift > 0);

    // ---- 5. Write -------------------------------------------------------------------------------
    // Counts travel packed: before the threshold in the low 12 bits, equal in the high 20.
    uint32_t chosen = 0;
    for (uint32_t i = run_begin; i < run_end; i += kWarpSize) {
      const uint32_t digits =
          i + lane < run_end ? (row_best - key_of[listed[i + lane]]) >> shift : ~0u;
      const bool inside = i + lane < run_end;
      chosen += __popc(__ballot_sync(kFullWarp, inside && digits < prefix)) |
                (__popc(__ballot_sync(kFullWarp, inside && digits == prefix)) << 12);
    }
    if (lane == 0) smem.warp_chosen[warp] = chosen;
    __syncthreads();
    uint32_t all;
    const uint32_t packed = sum_below(smem.warp_chosen, all);
    uint32_t above = lower_before + (packed & 0xfffu);
    uint32_t equal = lower_equal + (packed >> 12);
    const RowOutput output(p, row);
    const uint32_t first = lower_before + min(lower_equal, need);
    const bool stage = output.pages != nullptr && !p.sort;
    int32_t* staged = reinterpret_cast<int32_t*>(at(layout.tail));
    uint64_t* entries = reinterpret_cast<uint64_t*>(at(layout.tail));
    const int32_t origin = vectors.index(begin, 0);
    for (uint32_t i = run_begin; i < run_end; i += kWarpSize) {
      const bool inside = i + lane < run_end;
      const uint32_t element = inside ? listed[i + lane] : 0u;
      const uint32_t key = inside ? key_of[element] : 0u;
      const uint32_t digits = (row_best - key) >> shift;
      const uint32_t above_mask = __ballot_sync(kFullWarp, inside && digits < prefix);
      const uint32_t equal_mask = __ballot_sync(kFullWarp, inside && digits == prefix);
      const uint32_t e = equal + __popc(equal_mask & lanes_below());
      if (inside && (digits < prefix || (digits == prefix && e < need))) {
        const uint32_t position = above + __popc(above_mask & lanes_below()) + min(e, need);
        const int32_t index = origin + static_cast<int32_t>(element);
        if (p.sort) {
          store_remote(map_shared(entries + position, together ? 0u : rank),
                       sort_entry(key, index));
        } else if (stage) {
          staged[position - first] = index;
        } else {
          output.write(position, index);
        }
      }
      above += __popc(above_mask);
      equal += __popc(equal_mask);
    }
    if (stage) {
      // One table look-up a thread instead of a chain of them.
      const uint32_t last = lower_before + (all & 0xfffu) + min(lower_equal + (all >> 12), need);
      __syncthreads();
      for (uint32_t i = first + threadIdx.x; i < last; i += kThreads) {
        output.write(i, staged[i - first]);
      }
    }
    if (p.sort) {
      // The next row's entries come behind that row's exchanges, for which rank 0 arrives only when
      // it is done here.
      if (together) {
        cluster_sync();
      } else {
        __syncthreads();
      }
      if (!together || rank == 0) sort_and_write(entries, p.k, output);
    }
  }

  // Lists the elements of one vector, each at the position that place(e) names (~0: not at all),
  // and replaces each one's score by its key.
  template <class Place>
  __device__ __forceinline__ void list_elements(uint32_t mask, int32_t first, Place place) {
    while (mask != 0) {
      const int e = __ffs(mask) - 1;
      mask &= mask - 1;
      const uint32_t position = place(e);
      if (position == ~0u) continue;
      Key& element = keys()[first + e];
      element = static_cast<Key>(Policy::key(element));
      list()[position] = static_cast<uint16_t>(first + e);
    }
  }
};

template <class Config>
__global__ __launch_bounds__(Config::kThreads, Config::kMinBlocks) void topk_cluster_kernel(
    const __grid_constant__ TopkParams p, const __grid_constant__ TopkClusterPlan plan) {
  extern __shared__ __align__(16) unsigned char memory[];
  pdl_launch_dependents();
  TopkClusterWorker<Config> worker(p, memory);
  if (worker.size > 1) cluster_arrive();
  for (int i = threadIdx.x; i < 3 * kBins; i += Config::kThreads) worker.smem.hist[0][i] = 0;
  __syncthreads();
  pdl_wait();

  // Rows in batches of 32, one lane each; first those that one CTA serves alone, dealt out over the
  // cluster's CTAs, then the others, all CTAs together. Every warp of the cluster sees the same.
  const int32_t cluster = blockIdx.x / worker.size;
  uint32_t dealt = 0;
  for (int64_t first = cluster; first < p.rows; first += int64_t{kWarpSize} * plan.clusters) {
    const int64_t row = first + int64_t{lane_id()} * plan.clusters;
    RowWindow window{0, 0};
    if (row < p.rows) window = row_window(p, static_cast<int32_t>(row));
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
