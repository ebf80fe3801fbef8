// The best scores of a row that is too long for registers, by one CTA. A sample gives a guess of
// the threshold. The row is streamed once, and the scores that reach the guess go to a list in
// shared memory, each with its place in the row.
//
// If the list gets at least k scores, and has room for all of them, it holds the k best, and the
// guess is a bound (bound.cuh). So a wrong guess costs time and never an answer: the row is done
// again from the maxima of its units (units_in_smem.cuh).
//
// The sample is evenly spaced over the row, so neither a sorted row nor scores that are alike
// within a page mislead the guess. The order of the list depends on timing. Nothing else does: the
// positions follow from bits of the scores in row order.
#pragma once

#include <cstdint>

#include "dsv4/topk/cta_slice.cuh"
#include "dsv4/topk/units_in_smem.cuh"

namespace dsv4 {

template <class Config>
class ListedScores {
 public:
  using Slice = TopkSlice<Config>;
  using Policy = typename Config::Policy;
  using Output = typename Config::Form::Output;
  using Unit = typename Policy::Unit;
  using H = typename Policy::H;
  static constexpr int kBits = Policy::kBits;
  static constexpr int kThreads = Config::kThreads;
  static constexpr int kBatch = Config::kBatch;
  static constexpr int kTurn = kThreads * kUnit;    // scores of a unit a thread
  static constexpr int kSample = kThreads * kUnit;  // scores
  static_assert(!Config::kCluster, "a slice is a row");

  __device__ __forceinline__ explicit ListedScores(const Slice& slice) : s_(slice) {}

  // ---- 1. The stream ----------------------------------------------------------------------------
  // Lists the scores that reach the guess. Returns its order, or kNone if the guess is wrong.
  __device__ __forceinline__ uint32_t stream() {
    const UnitList<Config> units{s_, 0u};
    units.keep_edges();
    const Unit sample = load_sample();
    uint32_t order = kNone;
    uint32_t raw = 0;
#pragma unroll 1
    for (int32_t step = 0; step < s_.depth; step += kBatch) {
      Unit u[kBatch];
      units.load(u, step);
      if (step == 0) {
        order = guess(sample);  // the first batch is on its way meanwhile
        if (order == kNone) return kNone;
        raw = Policy::raw_of(order);
      }
      uint32_t reach = 0;  // a byte for each unit
#pragma unroll
      for (int i = 0; i < kBatch; ++i) reach |= Policy::reaching(u[i], raw) << i * kUnit;
      const uint32_t own = __popc(reach);
      const uint32_t upto = warp_inclusive_sum(own);
      uint32_t end = 0;
      if (lane_id() == kWarpSize - 1 && upto != 0) end = atomicAdd(counters(), upto) + upto;
      end = __shfl_sync(kFullWarp, end, kWarpSize - 1);
      if (end > s_.plan.list_scores) break;
      uint2* to = list() + end - __shfl_sync(kFullWarp, upto, kWarpSize - 1) + upto - own;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const uint32_t place = units.unit(step + i) * kUnit;
#pragma unroll
        for (int e = 0; e < kUnit; ++e) {
          if ((reach >> (i * kUnit + e)) & 1u) {
            *to++ = make_uint2(Policy::element(u[i], e), place + e);
          }
        }
      }
    }
    __syncthreads();
    size_ = counters()[0];
    const bool right = size_ >= static_cast<uint32_t>(s_.p.k) && size_ <= s_.plan.list_scores;
    return right ? order : kNone;
  }

  // ---- 2. What the threshold is found from ------------------------------------------------------
  __device__ __forceinline__ uint32_t size() const { return size_; }

  // Loads the scores from `first` on, kTurn for each unit; NaN where the list has ended. Returns a
  // bit for each unit that has some.
  template <int kCount>
  __device__ __forceinline__ uint32_t fetch(Unit (&u)[kCount], uint32_t first) const {
    uint32_t some = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (first + i * kTurn < size_) {
        u[i] = at(first + i * kTurn);
        some |= 1u << i;
      }
    }
    return some;
  }

  // ---- 3. The answer ----------------------------------------------------------------------------
  // False: too many scores equal the threshold; nothing was written.
  __device__ __forceinline__ bool write(const Threshold& t) const {
    if (!mark(t)) return false;
    count_before(t);
    __syncthreads();
    int32_t* const to = s_.place();
    const int32_t index = s_.units.index(0, 0);
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < size_; i += kThreads) {
      const uint32_t place = list()[i].y;
      const uint32_t bits = chosen()[place / 32];
      const uint32_t bit = 1u << place % 32;
      if ((bits & bit) != 0) {
        to[before()[place / 32] + __popc(bits & (bit - 1u))] =
            Output::placed(s_.kept(), index + static_cast<int32_t>(place));
      }
    }
    return true;
  }

  // After stream(), if fewer than k scores lie above a crowded bin: takes these, and the first of
  // the bin's scores if they are all equal. It reads the row again. False: nothing was written.
  __device__ __forceinline__ bool write_plateau() {
    const Crowded crowded = where();
    const uint32_t k = s_.p.k;
    size_ = counters()[0];
    if (crowded.bin == kNone || crowded.order == kNone || crowded.rest >= Policy::kLastOrder ||
        size_ >= k) {
      return false;
    }
    const UnitList<Config> units{s_, 0u};
    auto* const equal = reinterpret_cast<unsigned char*>(before());  // a bit for each score
    bool differs = false;
#pragma unroll 1
    for (int32_t step = 0; step < s_.depth; ++step) {
      const int32_t g = units.unit(step);
      if (g >= s_.count) break;
      const Unit u = s_.units.load(g, s_.smem.edges);
      uint32_t is_above;
      uint32_t is_equal;
      Policy::classify(u, Policy::raw_of(crowded.rest), is_above, is_equal);
      equal[g] = static_cast<unsigned char>(is_equal);
      Policy::each_order(u, [&](uint32_t order) {
        differs |= order >> kFine == crowded.bin && order != crowded.rest;
      });
    }
    if (__syncthreads_or(differs)) return false;
    const Threshold t{crowded.rest, k - size_, 0u, 0u, true};
    if (!take_first(t)) return false;
    __syncthreads();
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < size_; i += kThreads) choose(list()[i].y);
    __syncthreads();
    count_before(t);
    int32_t* const to = s_.place();
    const int32_t index = s_.units.index(0, 0);
#pragma unroll 1
    for (int32_t word = 4 * first_word(); word < 4 * last_word(); ++word) {
      uint32_t position = before()[word];
#pragma unroll 1
      for (uint32_t bits = chosen()[word]; bits != 0; bits &= bits - 1) {
        to[position++] = Output::placed(s_.kept(), index + 32 * word + __ffs(bits) - 1);
      }
    }
    return true;
  }

 private:
  // ---- The guess --------------------------------------------------------------------------------
  // A thread's share of the sample: pieces of 16 bytes.
  static constexpr int kPieces = sizeof(Unit) / sizeof(uint4);
  __device__ __forceinline__ Unit load_sample() const {
    Unit sample;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const uint32_t piece = kPieces * threadIdx.x + i;
      const auto g = static_cast<int32_t>(piece * s_.count / (kPieces * kThreads));
      Policy::set_piece(sample, i,
                        s_.units.whole(g) ? load_vector<false>(s_.units.at(g)) : all_nan());
    }
    return sample;
  }

  // The order that some more scores than k reach, if the sample is like the row. If the bin where
  // it lies has so many scores that the list may be too short, the next bits decide.
  __device__ __forceinline__ uint32_t guess(const Unit& sample) const {
    GroupHistogram& groups = s_.smem.groups;
#pragma unroll
    for (int i = 0; i < kUnit / 2; ++i) {
      const uint32_t heads = Policy::heads(sample, i);
      groups.add_pair(H::better(heads, Policy::kLastHead * 0x10001u));  // NaN becomes -inf
    }
    __syncthreads();
    Crowded& crowded = where();
    if (warp_id() == 0) {
      if (lane_id() == 0) crowded = {kNone, kNone, 0u, 0u};
      __syncwarp();
      // 4.5 standard deviations above the mean: one row in 300,000 gets a guess that is too high.
      const float part = static_cast<float>(s_.p.k) / static_cast<float>(s_.units.length);
      const float mean = part * kSample;
      const auto rank = static_cast<uint32_t>(mean + 4.5f * sqrtf(mean * (1.0f - part)) + 3.0f);
      GroupRanks{groups, Policy::kLastHead}.pick(rank, [&](const GroupPick& pick) {
        if (pick.bound == kNoBound) return;
        const uint32_t bin = pick.bound >> 4;
        const uint32_t rest = rank - pick.before;
        if (fits(pick.reached)) {
          crowded.order = inside(bin, kCoarse, rest, pick.reached - pick.before);
        } else {
          crowded = {kNone, bin, rest, pick.before};
        }
      });
    }
    __syncthreads();
    if (crowded.order == kNone && crowded.bin != kNone) look_closer(crowded);
    return crowded.order;
  }

  // The guess, and where it lies if its bin is crowded.
  struct Crowded {
    uint32_t order;
    uint32_t bin;     // kNone: it is not crowded
    uint32_t rest;    // the guess's rank in the bin; in the end, the best order of the sample in it
    uint32_t before;  // scores of the sample in better bins
  };
  __device__ __forceinline__ Crowded& where() const {
    return *reinterpret_cast<Crowded*>(s_.smem.bound);
  }

  // Bits of an order in a bin at first, and after a closer look.
  static constexpr int kCoarse = kBits - 12;
  static constexpr int kFine = kCoarse - 8;

  // If the next eight bits leave too many scores as well, for example on a plateau, the guess is
  // the end of the better bins: write_plateau() finds the rest.
  __device__ __forceinline__ void look_closer(Crowded& crowded) const {
    uint32_t* hist = s_.smem.threshold.hist[ThresholdSmem<kBits>::kRefine];
    Policy::each_order(load_sample(), [&](uint32_t order) {
      const bool is_inside = order >> kCoarse == crowded.bin;
      atomicAdd(hist + (is_inside ? order >> kFine & 0xffu : kSink), 1u);
    });
    __syncthreads();
    if (warp_id() == 0) {
      const Pick pick = pick_bin(hist, crowded.rest);
      if (lane_id() == 0) {
        const uint32_t bin = crowded.bin << 8 | pick.bin;
        if (fits(crowded.before + pick.before + pick.count)) {
          crowded = {inside(bin, kFine, crowded.rest - pick.before, pick.count), kNone, 0u, 0u};
        } else {
          crowded = {(bin << kFine) - 1u, bin, kNone, 0u};  // kNone if the bin is the best
        }
      }
    }
    __syncthreads();
    if (crowded.bin == kNone) return;
    Policy::each_order(load_sample(), [&](uint32_t order) {
      if (order >> kFine == crowded.bin) atomicMin(&crowded.rest, order);
    });
    __syncthreads();
  }

  // Whether the list has room for as many scores of the row as `reached` of the sample stand for.
  __device__ __forceinline__ bool fits(uint32_t reached) const {
    return reached * static_cast<uint64_t>(s_.units.length) <=
           s_.plan.list_scores * static_cast<uint64_t>(kSample);
  }

  // The order of rank `rest` in a bin of `count` scores, or a little more: mostly a bin has more of
  // its scores at its end. No guess is -inf: a row with that threshold needs the wide kernel.
  static __device__ __forceinline__ uint32_t inside(uint32_t bin, int shift, uint32_t rest,
                                                    uint32_t count) {
    const float part = 0.3f + 0.7f * static_cast<float>(rest) / static_cast<float>(count);
    const uint32_t width = 1u << shift;
    const uint32_t order = (bin << shift) + min(static_cast<uint32_t>(part * width), width - 1u);
    if (order >= Policy::kLastOrder) return kNone;
    return order == 1u << (kBits - 1) ? order - 1u : order;  // not -0.0, but +0.0, which equals it
  }

  // ---- In shared memory -------------------------------------------------------------------------
  // Zero when the row begins: the scores in the list; those that equal the threshold.
  __device__ __forceinline__ uint32_t* counters() const { return s_.smem.threshold.ranked + 1; }
  __device__ __forceinline__ uint2* list() const {
    return reinterpret_cast<uint2*>(s_.at(s_.plan.lists));
  }
  // One bit for each score of the row: whether it is chosen. In the place of the masks; zero when
  // the row begins.
  __device__ __forceinline__ uint32_t* chosen() const {
    return reinterpret_cast<uint32_t*>(s_.masks());
  }
  // For each 32 scores: how many chosen scores come before them. In the same place.
  __device__ __forceinline__ uint32_t* before() const {
    return chosen() + kThreads * s_.plan.mask_steps / 4;
  }

  __device__ __forceinline__ void choose(uint32_t place) const {
    atomicOr(chosen() + place / 32, 1u << place % 32);
  }

  __device__ __forceinline__ Unit at(uint32_t first) const {
    Unit u = Policy::pad();
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
      const uint32_t i = first + e * kThreads + threadIdx.x;
      if (i < size_) Policy::set(u, e, Policy::scalar(list()[i].x));
    }
    return u;
  }

  // Sets the bits of the chosen scores: those above the threshold, and the first ones of those that
  // equal it.
  __device__ __forceinline__ bool mark(const Threshold& t) const {
    const uint32_t raw = Policy::raw_of(t.order);
    uint32_t* equals = s_.smem.threshold.rank_list;  // their places
#pragma unroll 1
    for (uint32_t first = 0; first < size_; first += kTurn) {
      uint32_t is_above;
      uint32_t is_equal;
      Policy::classify(at(first), raw, is_above, is_equal);
      uint32_t left = is_above | is_equal;
#pragma unroll 1
      while (left != 0) {
        const int e = __ffs(left) - 1;
        left &= left - 1;
        const uint32_t place = list()[first + e * kThreads + threadIdx.x].y;
        if ((is_above >> e) & 1u) {
          choose(place);
        } else {
          const uint32_t i = atomicAdd(counters() + 1, 1u);
          if (i < kRankMost) equals[i] = place;
        }
      }
    }
    __syncthreads();
    const uint32_t count = counters()[1];
    if (count > kRankMost) return false;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
      const uint32_t place = equals[i];
      uint32_t ahead = 0;
      if (count > t.need) {
#pragma unroll 1
        for (uint32_t j = 0; j < count; ++j) ahead += equals[j] < place ? 1u : 0u;
      }
      if (ahead < t.need) choose(place);
    }
    __syncthreads();
    return true;
  }

  // A thread's words of 128 scores: consecutive ones of the row.
  __device__ __forceinline__ int32_t words() const { return (s_.count + 15) / 16; }
  __device__ __forceinline__ int32_t first_word() const {
    return threadIdx.x * ((words() + kThreads - 1) / kThreads);
  }
  __device__ __forceinline__ int32_t last_word() const {
    return min(first_word() + (words() + kThreads - 1) / kThreads, words());
  }

  __device__ __forceinline__ void count_before(const Threshold& t) const {
    const auto* const bits = reinterpret_cast<const uint4*>(chosen());
    const int32_t end = last_word();
    uint32_t own = 0;
#pragma unroll 1
    for (int32_t i = first_word(); i < end; ++i) {
      const uint4 v = bits[i];
      own += __popc(v.x) + __popc(v.y) + __popc(v.z) + __popc(v.w);
    }
    uint32_t ahead = s_.counted_before(own, t).x;
#pragma unroll 1
    for (int32_t i = first_word(); i < end; ++i) {
      const uint4 v = bits[i];
      const uint32_t second = ahead + __popc(v.x);
      const uint32_t third = second + __popc(v.y);
      const uint32_t fourth = third + __popc(v.z);
      reinterpret_cast<uint4*>(before())[i] = make_uint4(ahead, second, third, fourth);
      ahead = fourth + __popc(v.w);
    }
  }

  // Chooses the first t.need of the scores whose bits are in the place of before(). False: they are
  // fewer.
  __device__ __forceinline__ bool take_first(const Threshold& t) const {
    uint32_t own = 0;
#pragma unroll 1
    for (int32_t i = 4 * first_word(); i < 4 * last_word(); ++i) own += __popc(before()[i]);
    uint32_t ahead = s_.counted_before(own << Slice::kEqualShift, t).y;
    const uint32_t of_warp = lane_id() < Config::kWarps ? s_.smem.warp_chosen[lane_id()] : 0u;
    if (__reduce_add_sync(kFullWarp, of_warp >> Slice::kEqualShift) < t.need) return false;
#pragma unroll 1
    for (int32_t i = 4 * first_word(); i < 4 * last_word(); ++i) {
      const auto taken = Slice::choose(0u, before()[i], make_uint2(0u, ahead), t.need);
      ahead += __popc(before()[i]);
      chosen()[i] = taken.bits;
    }
    return true;
  }

  const Slice& s_;
  uint32_t size_ = 0;
};

}  // namespace dsv4
