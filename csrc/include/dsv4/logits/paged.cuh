// Index logits over the paged FP8 cache (decode): rows = batch * next_n, each request's keys behind
// its block table.
//
// A CTA is one warpgroup, and two or four fit a multiprocessor. It takes its share of the blocks
// (pages of 64 keys) of all requests, request by request; as many rows of a request as an
// instruction has columns for share one read of its keys. Pages are copied to a ring in shared
// memory some blocks ahead; the matrix unit works on a block while the sums of the one before are
// turned into scores. A single request's blocks are dealt to the CTAs in turn, so that each knows
// its first page before it knows the length.
//
// Scores are float32 until they are rounded once, and a key's score depends on the key and the
// query alone.
#pragma once

#include <cstdint>

#include "dsv4/logits/key_ring.cuh"
#include "dsv4/logits/params.cuh"
#include "dsv4/logits/score.cuh"
#include "dsv4/logits/work_share.cuh"

namespace dsv4 {

// kRows rows are scored together: one, or as many as an instruction has columns for.
template <int kHeads_, bool kOneRow>
struct PagedConfig {
  static constexpr int kHeads = kHeads_;
  static constexpr int kRows = kOneRow ? 1 : kMmaColumns / kHeads;
  static constexpr int kStages = kOneRow ? 4 : 5;  // blocks of keys in the ring
  static constexpr int kCtas = kOneRow ? 4 : 2;    // a multiprocessor
};

template <class Config>
struct PagedShared {
  using Rows = RowSet<Config::kHeads, Config::kRows>;
  using Ring = KeyRing<Config::kStages>;
  static constexpr int kBytes = Rows::kBytes + Ring::kBytes;

  Rows rows;
  Ring ring;

  __device__ __forceinline__ explicit PagedShared(uint8_t* memory) {
    rows.queries = memory;
    ring.keys = memory + Config::kRows * Rows::kQueryBytes;
    ring.scales = reinterpret_cast<float*>(ring.keys + Config::kStages * kBlockScales);
    rows.weights = ring.scales + Config::kStages * kBlockKeys;
  }
};

// Rows first ... first + count - 1 of a request, at most kRows; `row` is the first of them among
// those of the call.
struct RequestRows {
  int32_t request;
  int32_t first;
  int32_t count;
  int32_t row;

  __device__ __forceinline__ RequestRows(const Queries& queries, int32_t request, int32_t first,
                                         int32_t most)
      : request(request),
        first(first),
        count(min(queries.next_n - first, most)),
        row(request * queries.next_n + first) {}
};

// Begins the copy of their queries and weights.
template <class Config>
__device__ __forceinline__ void copy_rows(const Queries& queries, const RequestRows& rows,
                                          const PagedShared<Config>& shared) {
#pragma unroll
  for (int j = 0; j < Config::kRows; ++j) {
    if (Config::kRows > 1 && j >= rows.count) continue;
    shared.rows.copy(j, queries.row(rows.request, rows.first + j),
                     queries.weights + (rows.row + j) * queries.weight_stride);
  }
}

// A range's blocks against rows of its request, which are on their way.
template <class Out, class Config>
class RangeScorer {
 public:
  __device__ __forceinline__ RangeScorer(const PagedLogitsParams& p, const BlockRange& range,
                                         PageNumbers& pages, const RequestRows& rows,
                                         const PagedShared<Config>& shared)
      : p_(p),
        range_(range),
        pages_(pages),
        shared_(shared),
        turns_((range.last - range.first + range.step - 1) / range.step) {
#pragma unroll
    for (int s = 0; s < kAhead; ++s) begin_copy(s);
#pragma unroll
    for (int o = 0; o < kOwn; ++o) {
      const int32_t at = first_own_row<kRows>() + o, row = rows.row + at;
      length_[o] = kRows == 1 || at < rows.count ? clip_length(p, p.lengths.of(row)) : 0;
      out_[o] = static_cast<Out*>(p.output.out) + row * p.output.stride + own_key();
    }
  }

  // Begins a block, and finishes the one before while the matrix unit works.
  __device__ __forceinline__ void run() {
    Sums even, odd;
    arrive(0);
    begin(even, 0);
    weights_.load(shared_.rows.weights);
    int32_t turn = 1;
    for (; turn + 1 < turns_; turn += 2) {
      arrive(turn);
      begin(odd, turn);
      mma_wait<1>();
      finish(even, turn - 1);
      arrive(turn + 1);
      begin(even, turn + 1);
      mma_wait<1>();
      finish(odd, turn);
    }
    if (turn < turns_) {
      arrive(turn);
      begin(odd, turn);
      mma_wait<1>();
      finish(even, turn - 1);
      mma_wait<0>();
      finish(odd, turn);
    } else {
      mma_wait<0>();
      finish(even, turn - 1);
    }
    copies_wait<0>();
  }

 private:
  static constexpr int kHeads = Config::kHeads, kRows = Config::kRows, kOwn = kOwnRows<kRows>;
  using Sums = MmaSums<kRows * kHeads>;

  // The slot of block b is free once every warp is done with it, which is known two blocks later.
  static constexpr int kAhead = Config::kStages - 2;

  // A page that does not exist leaves its slot as it is.
  __device__ __forceinline__ void begin_copy(int32_t turn) {
    if (turn < turns_) {
      const int32_t page = pages_.get(turn);
      if (exists(page)) {
        const uint8_t* from = p_.cache + page * p_.page_stride;
        shared_.ring.template copy<16>(turn % Config::kStages, from,
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

  __device__ __forceinline__ void begin(Sums& sums, int32_t turn) {
    shared_.ring.multiply(sums, turn % Config::kStages, shared_.rows.queries);
  }

  __device__ __forceinline__ void finish(Sums& sums, int32_t turn) {
    pin(sums.v);
    float score[kOwn];
    sum_heads<kHeads, kRows>(sums.v, weights_, score);
    const float scale = shared_.ring.scale(turn % Config::kStages);
    const bool there = exists(pages_.recall(turn));
    const int32_t key = (range_.first + turn * range_.step) * kBlockKeys;
#pragma unroll
    for (int o = 0; o < kOwn; ++o) {
      if (writes_score<kRows>() && key + own_key() < length_[o]) {
        round_to(there ? score[o] * scale : -INFINITY, out_[o] + key);
      }
    }
  }

  const PagedLogitsParams& p_;
  const BlockRange& range_;
  PageNumbers& pages_;
  const PagedShared<Config>& shared_;
  int32_t turns_;
  HeadWeights<kHeads, kRows> weights_;
  Out* out_[kOwn];
  int32_t length_[kOwn];
};

template <class Out, class Config>
__global__ void __launch_bounds__(kGroupThreads, Config::kCtas)
    paged_logits_kernel(const __grid_constant__ PagedLogitsParams p) {
  extern __shared__ __align__(kSwizzleBytes) uint8_t memory[];
  const PagedShared<Config> shared(memory);
  constexpr bool kOneRow = Config::kRows == 1;
  const int32_t next_n = kOneRow ? 1 : p.queries.next_n;
  pdl_wait();
  pdl_launch_dependents();

  // A single request's length, pages and query are on their way at the same time: its table row may
  // be read beyond the length, not beyond its width.
  const bool single = p.batch == 1;
  const int32_t step = static_cast<int32_t>(gridDim.x);
  BlockList<kOneRow> list(p);
  BlockRange range{0, static_cast<int32_t>(blockIdx.x), 0, step};
  PageNumbers pages(p.block_table, single ? p.table_width : 0, range.first, step);
  uint32_t block = 0, end = 0;  // of the list
  if (single) {
    copy_rows(p.queries, RequestRows(p.queries, 0, 0, Config::kRows), shared);
    range.last = static_cast<int32_t>(blocks_of<kOneRow>(p, 0));
    end = range.first < range.last ? 1 : 0;
  } else {
    const uint32_t total = list.total();
    const uint32_t each = total / gridDim.x, more = total - each * gridDim.x;
    block = blockIdx.x * each + (blockIdx.x < more ? blockIdx.x : more);
    end = block + each + (blockIdx.x < more ? 1 : 0);
  }
  bool copied = single;  // the first rows
  while (block < end) {
    if (!single) {
      range = list.find(block, end);
      if (range.first >= range.last) break;
      const int32_t last = range.last < p.table_width ? range.last : p.table_width;
      pages = PageNumbers(p.block_table + range.request * p.table_stride, last, range.first, 1);
    }
    for (int32_t first = 0; first < next_n; first += Config::kRows) {
      const RequestRows rows(p.queries, range.request, first, Config::kRows);
      if (!copied) {
        __syncthreads();  // no thread still reads the rows before
        copy_rows(p.queries, rows, shared);
      }
      copied = false;
      PageNumbers own = pages;
      RangeScorer<Out, Config>(p, range, own, rows, shared).run();
    }
    block += single ? 1 : range.last - range.first;
  }
  copies_wait<0>();
}

}  // namespace dsv4
