// Index logits over the paged FP8 cache (decode): rows = batch * next_n, each request's keys behind
// its block table.
//
// A CTA is one warpgroup, and four fit a multiprocessor. It takes its share of the blocks (pages of
// 64 keys) of all requests, request by request; up to two rows of a request share one read of its
// keys. Pages are copied to a ring in shared memory some blocks ahead; the matrix unit works on a
// block while the sums of the one before are turned into scores. A single request's blocks are
// dealt to the CTAs in turn, so that each knows its first page before it knows the length.
//
// Scores are float32 until they are rounded once, and a key's score depends on the key and the
// query alone.
#pragma once

#include <cstdint>
#include <type_traits>

#include "dsv4/logits_blocks.cuh"
#include "dsv4/logits_params.cuh"
#include "dsv4/logits_ring.cuh"
#include "dsv4/logits_score.cuh"

namespace dsv4 {

constexpr int kPagedRows = 2;    // rows of a request scored in one pass over its keys
constexpr int kPagedStages = 4;  // blocks of keys in the ring
constexpr int kPagedCtas = 4;    // a multiprocessor

template <int kHeads>
struct PagedShared {
  using Ring = KeyRing<kPagedStages>;
  static constexpr int kRowBytes = kQueryBytes<kHeads>;
  static constexpr int bytes(int rows) { return Ring::kBytes + rows * (kRowBytes + kHeads * 4); }

  uint8_t* queries;  // [rows][kRowBytes]
  Ring ring;
  float* weights;  // [rows][kHeads]

  __device__ __forceinline__ PagedShared(uint8_t* memory, int rows) : queries(memory) {
    ring.keys = queries + rows * kRowBytes;
    ring.scales = reinterpret_cast<float*>(ring.keys + kPagedStages * kBlockScales);
    weights = ring.scales + kPagedStages * kBlockKeys;
  }

  __device__ __forceinline__ const uint8_t* query(int32_t row) const {
    return queries + row * kRowBytes;
  }
};

// What a warpgroup brings to shared memory for one row.
template <int kHeads>
struct RowCopy {
  QueryCopy<kHeads, kGroupThreads> query;
  float weight;

  __device__ __forceinline__ void fetch(const PagedLogitsParams& p, int32_t request, int32_t j) {
    query.fetch(p.queries.row(request, j));
    const int64_t row = request * p.queries.next_n + j;
    if (threadIdx.x < kHeads) {
      weight = p.queries.weights[row * p.queries.weight_stride + threadIdx.x];
    }
  }

  __device__ __forceinline__ void stage(const PagedShared<kHeads>& shared, int32_t at) const {
    query.stage(shared.queries + at * kQueryBytes<kHeads>);
    if (threadIdx.x < kHeads) shared.weights[at * kHeads + threadIdx.x] = weight;
  }
};

// Blocks x rows of a range, one after the other: a unit is one block against one row.
template <class Out, int kHeads, int kRows>
class RangeScorer {
 public:
  __device__ __forceinline__ RangeScorer(const PagedLogitsParams& p, const BlockRange& range,
                                         PageNumbers& pages, int32_t first_row,
                                         const PagedShared<kHeads>& shared)
      : p_(p),
        range_(range),
        pages_(pages),
        shared_(shared),
        turns_((range.last - range.first + range.step - 1) / range.step),
        row0_(range.request * p.queries.next_n + first_row) {}

  __device__ __forceinline__ void run(const RowCopy<kHeads>& first, int32_t first_row) {
    __syncthreads();  // nobody reads what the range before left in shared memory
#pragma unroll
    for (int s = 0; s < kAhead; ++s) begin_copy(s);
    const RowLengths& lengths = p_.lengths;
#pragma unroll
    for (int j = 0; j < kRows; ++j) length_[j] = clip_length(p_, lengths.of(row0_ + j));
    first.stage(shared_, 0);
#pragma unroll
    for (int j = 1; j < kRows; ++j) {
      RowCopy<kHeads> other;
      other.fetch(p_, range_.request, first_row + j);
      other.stage(shared_, j);
    }
    mma_shared_fence();
    __syncthreads();
    score_units();
    copies_wait<0>();
  }

 private:
  // The slot of block b is free once every warp is done with it, which is known two blocks later.
  static constexpr int kAhead = kPagedStages - 2;

  using Weights = std::conditional_t<kRows == 1, RegisterWeights<kHeads>, SharedWeights<kHeads>>;

  // A page that does not exist leaves its slot as it is.
  __device__ __forceinline__ void begin_copy(int32_t turn) {
    if (turn < turns_) {
      const int32_t page = pages_.get(turn);
      if (exists(page)) {
        const uint8_t* from = p_.cache + page * p_.page_stride;
        shared_.ring.template copy<16>(turn % kPagedStages, from,
                                       reinterpret_cast<const float*>(from + kBlockScales));
      }
    }
    copies_commit();  // an empty group where there is nothing left: they are counted
  }

  __device__ __forceinline__ bool exists(int32_t page) const {
    return static_cast<uint32_t>(page) < static_cast<uint32_t>(p_.pages);
  }

  // The blocks up to `turn` are there, and the slot of block turn + kAhead is free.
  __device__ __forceinline__ void arrive(int32_t turn) {
    copies_wait<kAhead - 1>();
    mma_shared_fence();
    __syncthreads();
    begin_copy(turn + kAhead);
  }

  __device__ __forceinline__ void begin(MmaSums<kHeads>& sums, int32_t unit) {
    shared_.ring.multiply(sums, unit / kRows % kPagedStages, shared_.query(unit % kRows));
  }

  __device__ __forceinline__ void finish(MmaSums<kHeads>& sums, int32_t unit,
                                         const Weights& weights) {
    pin(sums.v);
    const int32_t turn = unit / kRows, row = unit % kRows;
    const float sum =
        sum_heads<kHeads>(sums.v, weights.row(row)) * shared_.ring.scale(turn % kPagedStages);
    const float score = exists(pages_.recall(turn)) ? sum : -INFINITY;
    const int32_t column = (range_.first + turn * range_.step) * kBlockKeys + own_key();
    if (writes_score() && column < (row == 0 ? length_[0] : length_[kRows - 1])) {
      Out* out = static_cast<Out*>(p_.output.out) + (row0_ + row) * p_.output.stride;
      round_to(score, out + column);
    }
  }

  // Begins a unit, and finishes the one before while the matrix unit works.
  __device__ __forceinline__ void score_units() {
    static_assert(kRows <= 2, "a block begins at every unit, or at every other");
    const Weights weights(shared_.weights);
    const int32_t units = turns_ * kRows;
    MmaSums<kHeads> even, odd;
    arrive(0);
    begin(even, 0);
    int32_t unit = 1;
    for (; unit + 1 < units; unit += 2) {
      if (kRows == 1) arrive(unit);
      begin(odd, unit);
      mma_wait<1>();
      finish(even, unit - 1, weights);
      arrive((unit + 1) / kRows);
      begin(even, unit + 1);
      mma_wait<1>();
      finish(odd, unit, weights);
    }
    // With two rows there is always a unit left, but nvcc 13.0 is not to know: it would fold this
    // into the loop and then wait for each instruction (ptxas note C7514).
    if (unit < units) {
      if (kRows == 1) arrive(unit);
      begin(odd, unit);
      mma_wait<1>();
      finish(even, unit - 1, weights);
      mma_wait<0>();
      finish(odd, unit, weights);
    } else {
      mma_wait<0>();
      finish(even, unit - 1, weights);
    }
  }

  const PagedLogitsParams& p_;
  const BlockRange& range_;
  PageNumbers& pages_;
  const PagedShared<kHeads>& shared_;
  int32_t turns_;
  int32_t row0_;
  int32_t length_[kRows];
};

// All rows of a request over a range of its blocks.
template <class Out, int kHeads, bool kOneRow>
__device__ __forceinline__ void score_request(const PagedLogitsParams& p, const BlockRange& range,
                                              const PageNumbers& pages,
                                              const RowCopy<kHeads>& first,
                                              const PagedShared<kHeads>& shared) {
  if (kOneRow) {
    PageNumbers own = pages;
    RangeScorer<Out, kHeads, 1>(p, range, own, 0, shared).run(first, 0);
    return;
  }
  RowCopy<kHeads> copy = first;
  int32_t row = 0;
  for (; row + 1 < p.queries.next_n; row += 2) {
    if (row > 0) copy.fetch(p, range.request, row);
    PageNumbers own = pages;
    RangeScorer<Out, kHeads, 2>(p, range, own, row, shared).run(copy, row);
  }
  if (row < p.queries.next_n) {
    if (row > 0) copy.fetch(p, range.request, row);
    PageNumbers own = pages;
    RangeScorer<Out, kHeads, 1>(p, range, own, row, shared).run(copy, row);
  }
}

template <class Out, int kHeads, bool kOneRow>
__global__ void __launch_bounds__(kGroupThreads, kPagedCtas)
    paged_logits_kernel(const __grid_constant__ PagedLogitsParams p) {
  extern __shared__ __align__(kSwizzleBytes) uint8_t memory[];
  const PagedShared<kHeads> shared(memory, kOneRow ? 1 : kPagedRows);
  RowCopy<kHeads> first;
  pdl_wait();
  pdl_launch_dependents();

  // A single request's length, pages and query are on their way at the same time: its table row may
  // be read beyond the length, not beyond its width.
  const bool single = p.batch == 1;
  const int32_t step = static_cast<int32_t>(gridDim.x);
  BlockList list(p);
  BlockRange range{0, static_cast<int32_t>(blockIdx.x), 0, step};
  PageNumbers pages(p.block_table, single ? p.table_width : 0, range.first, step);
  uint32_t block = 0, end = 0;  // of the list
  if (single) {
    first.fetch(p, 0, 0);
    range.last = static_cast<int32_t>(blocks_of(p, 0));
    end = range.first < range.last ? 1 : 0;
  } else {
    const uint32_t total = list.total();
    const uint32_t each = total / gridDim.x, more = total - each * gridDim.x;
    block = blockIdx.x * each + (blockIdx.x < more ? blockIdx.x : more);
    end = block + each + (blockIdx.x < more ? 1 : 0);
  }
  while (block < end) {
    if (!single) {
      range = list.find(block, end);
      if (range.first >= range.last) return;
      pages =
          PageNumbers(p.block_table + range.request * p.table_stride, range.last, range.first, 1);
      first.fetch(p, range.request, 0);
    }
    score_request<Out, kHeads, kOneRow>(p, range, pages, first, shared);
    block += single ? 1 : range.last - range.first;
  }
}

}  // namespace dsv4
