// Index logits over the paged FP8 cache (decode): rows = batch * next_n; each request's block table
// has its keys. On request the kernel writes the largest score of every piece of 8 keys, with the
// scores or instead of them.
//
// A CTA is one warpgroup, and two or four fit on a multiprocessor. It takes its share of the blocks
// (64 keys: one page, or two pages of 32 keys) of all requests, request by request. As many rows of
// a request as an instruction has columns for share one read of its keys. If there is a single
// request, the CTAs get its blocks in turn, so that each knows its first page before it knows the
// length.
//
// Scores are float32 until they are rounded once. A key's score depends on the key and the query
// alone.
#pragma once

#include <cstdint>

#include "dsv4/logits/params.cuh"
#include "dsv4/logits/pipeline.cuh"
#include "dsv4/logits/work_share.cuh"

namespace dsv4 {

// kRows rows are scored together: one, or several as columns of one instruction.
template <int kHeads_, int kRows_, int kPageKeys, bool kMaxima_>
struct PagedConfig {
  using Page = dsv4::Page<kPageKeys>;
  static constexpr int kHeads = kHeads_;
  static constexpr int kRows = kRows_;
  // Blocks of keys in the ring. For single rows with 64 heads four are enough to keep a
  // multiprocessor busy. With 32 heads five are faster (64 x 256K: 543 us, with four 588), and four
  // CTAs have room for them.
  static constexpr int kStages = kRows == 1 && kHeads == 64 ? 4 : 5;
  static constexpr int kCtas = kRows == 1 ? 4 : 2;  // per multiprocessor
  static constexpr bool kMaxima = kMaxima_;         // whether the maxima of pieces are written
  static constexpr int kGroup = kRows == 1 ? 1 : kAllRows;
  using Shared = PipelineShared<PagedConfig>;
};

// Rows first ... first + count - 1 of a request, at most kRows. `row` is the number of the first of
// them in the call.
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
                                          const PipelineShared<Config>& shared) {
#pragma unroll
  for (int j = 0; j < Config::kRows; ++j) {
    if (Config::kRows > 1 && j >= rows.count) continue;
    shared.rows.copy(j, queries.row(rows.request, rows.first + j),
                     queries.weights_of(rows.row + j));
  }
}

__device__ __forceinline__ float larger_or_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

// The largest score of every piece of a row. `row`: its maxima.
//
// A piece's keys are the own_key()s of eight lanes of a warp whose numbers differ in bits 2, 3 and
// 4, so all lanes of a warp call this. `key`: this lane's key; `score`: -inf if the row does not
// see it.
template <int kRows, class Out>
__device__ __forceinline__ void write_maximum(Out* row, int32_t key, int32_t length, float score) {
#pragma unroll
  for (int step = 4; step < kWarpSize; step *= 2) {
    score = larger_or_nan(score, __shfl_xor_sync(kFullWarp, score, step));
  }
  const int32_t piece = key / kPieceKeys;
  if (lane_id() >= 4 || !writes_score<kRows>() || piece * kPieceKeys >= length) return;
  // The newest piece and a piece with a NaN are always among the best.
  const bool pinned = piece == (length - 1) / kPieceKeys || score != score;
  round_to(pinned ? INFINITY : score, row + piece);
}

// Where a thread's scores go, for rows of a request.
template <class Out, class Config>
struct RangeOutput {
  static constexpr int kRows = Config::kRows, kOwn = kOwnRows<kRows>;

  Out* out[kOwn];  // for own_key(); null if there is none
  Out* maxima[kOwn];
  int32_t length[kOwn];
  bool scores;

  __device__ __forceinline__ RangeOutput(const PagedLogitsParams& p, const RequestRows& rows)
      : scores(!Config::kMaxima || p.output.out != nullptr) {
#pragma unroll
    for (int o = 0; o < kOwn; ++o) {
      const int32_t at = first_own_row<kRows>() + o, row = rows.row + at;
      length[o] = kRows == 1 || at < rows.count ? clip_length(p.lengths.of(row), p.columns) : 0;
      out[o] = static_cast<Out*>(p.output.out) + row * p.output.stride + own_key();
      maxima[o] = static_cast<Out*>(p.maxima.out) + row * p.maxima.stride;
    }
  }

  __device__ __forceinline__ void hold_pointers() {
#pragma unroll
    for (int o = 0; o < kOwn; ++o) {
      hold(out[o]);
      if (Config::kMaxima) hold(maxima[o]);
    }
  }

  // The scores of own_key() in the block from `key` on. `there`: the key's page exists.
  __device__ __forceinline__ void write(int32_t key, bool there, const float (&score)[kOwn]) const {
#pragma unroll
    for (int o = 0; o < kOwn; ++o) {
      Out rounded;
      round_to(there ? score[o] : -INFINITY, &rounded);
      const bool seen = key + own_key() < length[o];
      if (scores && writes_score<kRows>() && seen) out[o][key] = rounded;
      if constexpr (Config::kMaxima) {
        write_maximum<kRows>(maxima[o], key + own_key(), length[o],
                             seen ? widen(rounded) : -INFINITY);
      }
    }
  }
};

// A range's blocks times rows of its request, which are on their way.
template <class Out, class Config, class Pages>
__device__ __forceinline__ void score_range(const PagedLogitsParams& p, const BlockRange& range,
                                            Pages& pages, const RequestRows& rows,
                                            const PipelineShared<Config>& shared) {
  using Page = typename Config::Page;

  // A missing page leaves its part of the slot unchanged.
  const auto copy = [&](int32_t turn, int slot) {
#pragma unroll
    for (int part = 0; part < Page::kOfBlock; ++part) {
      const int32_t page = pages.get(turn, part);
      if (!p.keys.exists(page)) continue;
      const uint8_t* from = p.keys.page(page);
      shared.ring.template copy<16, Page::kKeys>(
          slot, from, reinterpret_cast<const float*>(from + Page::kScales), Page::kKeys,
          part * Page::kKeys);
    }
  };
  const int32_t turns = (range.last - range.first + range.step - 1) / range.step;
  BlockPipeline<Config, decltype(copy)> pipeline(shared, turns, copy);
  const RangeOutput<Out, Config> output(p, rows);
  pipeline.run([&](int32_t turn, const float (&score)[kOwnRows<Config::kRows>]) {
    const bool there =
        p.keys.exists(pages.recall(turn, Page::kOfBlock == 1 ? 0 : own_key() / Page::kKeys));
    output.write((range.first + turn * range.step) * kBlockKeys, there, score);
  });
}

template <class Out, class Config>
__global__ void __launch_bounds__(kGroupThreads, Config::kCtas)
    paged_logits_kernel(const __grid_constant__ PagedLogitsParams p) {
  using Pages = PageNumbers<Config::Page::kOfBlock>;
  extern __shared__ __align__(kSwizzleBytes) uint8_t memory[];
  const typename Config::Shared shared(memory);
  pdl_wait();
  pdl_launch_dependents();

  // The length, pages and query of a single request are on their way at the same time. Its table
  // row may be read beyond the length, but not beyond the table's width.
  const RowGroups<Config::kGroup> groups(p);
  const bool single = groups.count == 1;
  const int32_t step = static_cast<int32_t>(gridDim.x);
  BlockList<Config::kGroup> list(groups);
  BlockRange range{0, static_cast<int32_t>(blockIdx.x), 0, step};
  Pages pages(p.keys.block_table, single ? p.keys.table_width : 0, range.first, step);
  uint32_t block = 0, end = 0;  // numbers in the list
  if (single) {
    copy_rows(p.queries, RequestRows(p.queries, 0, 0, Config::kRows), shared);
    range.last = static_cast<int32_t>(groups.blocks(0));
    end = range.first < range.last ? 1 : 0;
  } else {
    const uint32_t total = list.total();
    const uint32_t each = total / gridDim.x, more = total - each * gridDim.x;
    block = blockIdx.x * each + (blockIdx.x < more ? blockIdx.x : more);
    end = block + each + (blockIdx.x < more ? 1 : 0);
  }
  bool copied = single;  // whether the first rows are copied
  while (block < end) {
    if (!single) {
      range = list.find(block, end);
      if (range.first >= range.last) break;
      const int32_t entries = min(range.last * Config::Page::kOfBlock, p.keys.table_width);
      pages = Pages(p.keys.block_table + groups.request(range.group) * p.keys.table_stride, entries,
                    range.first, 1);
    }
    const int32_t request = groups.request(range.group), last = groups.end(range.group);
    for (int32_t first = groups.begin(range.group); first < last; first += Config::kRows) {
      const RequestRows rows(p.queries, request, first, Config::kRows);
      if (!copied) {
        __syncthreads();  // all threads have read the previous rows
        copy_rows(p.queries, rows, shared);
      }
      copied = false;
      Pages own = pages;
      score_range<Out>(p, range, own, rows, shared);
    }
    block += single ? 1 : range.last - range.first;
  }
  copies_wait<0>();
}

}  // namespace dsv4
