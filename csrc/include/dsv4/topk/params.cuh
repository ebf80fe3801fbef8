// The parameters of one top-k call, and the two things that every kernel does with them: it finds a
// row's window of scores, and it writes a row's answer.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dsv4/common/row_lengths.cuh"
#include "dsv4/common/warp.cuh"

namespace dsv4 {

constexpr int kTopkMax = 2048;

struct TopkParams {
  const void* logits;  // [rows, columns], stride(1) == 1
  int64_t logits_stride;
  int32_t rows;
  int32_t columns;
  int32_t k;

  RowLengths lengths;
  int32_t length_shift;  // a column stands for 2^length_shift of the things that lengths count

  IntTensor row_starts;  // [rows] or null
  int64_t row_start_stride;

  int32_t* out;  // [rows, k], stride(1) == 1
  int64_t out_stride;
  int32_t* out_raw;  // as `out`, or null
  int64_t out_raw_stride;
  int32_t* out_counts;  // [rows] or null: the number of indices of each row

  const int32_t* page_table;  // [rows / page_group, pages], stride(1) == 1; null if pages is 0
  int64_t page_table_stride;
  Divisor page_group;
  int32_t pages;
  Divisor page_size;  // 0: no page table

  bool sort;

  // A table of width 0 is a table: it has no memory, and every slot is -1.
  __host__ __device__ __forceinline__ bool paged() const { return page_size.value > 0; }

  // Every thread of one CTA of a row calls this as soon as the length is known, so that the length
  // needs no register later.
  __device__ __forceinline__ void write_count(int32_t row, int32_t length) const {
    if (out_counts != nullptr && threadIdx.x == 0) out_counts[row] = length < k ? length : k;
  }
};

// The scores that one row may read: columns [start, start + length).
struct RowWindow {
  int32_t start;
  int32_t length;
};

// Where a row's length and start are. Built before griddepcontrol.wait, read after it.
struct WindowSource {
  RowLengths::Place length_at;
  int64_t start_at;

  __device__ __forceinline__ WindowSource(const TopkParams& p, int32_t row)
      : length_at(p.lengths.place(row)), start_at(row * p.row_start_stride) {}

  __device__ __forceinline__ RowWindow read(const TopkParams& p) const {
    int64_t length = p.lengths.read(length_at);
    length = (length + (1 << p.length_shift) - 1) >> p.length_shift;
    int64_t start = 0;
    if (p.row_starts.data != nullptr) {
      start = p.row_starts[start_at];
      // A start outside the row's buffer leaves no column.
      start = start < 0 || start > p.columns ? p.columns : start;
    }
    const int64_t room = p.columns - start;
    length = length < 0 ? 0 : length > room ? room : length;
    return {static_cast<int32_t>(start), static_cast<int32_t>(length)};
  }
};

// Where one row's answer goes. Index -1 stays -1 in every form.
struct RowOutput {
  int32_t* out;
  int32_t* out_raw;
  const int32_t* pages;
  int32_t page_count;
  Divisor page_size;

  __device__ __forceinline__ RowOutput(const TopkParams& p, int32_t row, const RowWindow&)
      : RowOutput(p, row) {}

  __device__ __forceinline__ RowOutput(const TopkParams& p, int32_t row)
      : out(p.out + row * p.out_stride),
        out_raw(p.out_raw == nullptr ? nullptr : p.out_raw + row * p.out_raw_stride),
        pages(p.page_table + p.page_group.divide(row) * p.page_table_stride),
        page_count(p.pages),
        page_size(p.page_size) {}

  // Prefetches the row's pages to the L2, because each chosen index later waits for its page.
  // `rank` of `ranks` CTAs; a thread has a line of 32 pages.
  static __device__ __forceinline__ void start(const TopkParams& p, int32_t row,
                                               const RowWindow& window, uint32_t rank,
                                               uint32_t ranks) {
    const RowOutput output(p, row);
    if (output.page_size.value == 0) return;
    const int32_t page = (rank + threadIdx.x * ranks) * 32;
    if (page < output.page_count && page <= output.page_size.divide(window.length - 1)) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(output.pages + page));
    }
  }

  // Begins to keep in shared memory what a CTA's slice of the row needs; this form needs nothing.
  static __device__ __forceinline__ void keep(const TopkParams&, int32_t, const RowWindow&,
                                              int32_t*, int32_t, int32_t) {}

  // Waits for the copies that keep() began in this thread.
  static __device__ __forceinline__ void started() {}

  // The stored value of a chosen index.
  static __device__ __forceinline__ int32_t placed(const int32_t*, int32_t index) { return index; }

  // The pool slot of a row-local index. It is -1 for an index beyond the table (a length that the
  // caller's table does not cover), for a missing page (a table padded with -1), and for a slot
  // that does not fit in int32.
  __device__ __forceinline__ int32_t slot(int32_t index) const {
    if (page_size.value == 0 || index < 0) return index;
    const int32_t page = page_size.divide(index);
    if (page >= page_count) return -1;
    const int32_t number = pages[page];
    if (number < 0) return -1;
    const int64_t slot = int64_t{number} * page_size.value + (index - page * page_size.value);
    return slot > INT32_MAX ? -1 : static_cast<int32_t>(slot);
  }

  __device__ __forceinline__ void write(int32_t position, int32_t index) const {
    out[position] = slot(index);
    if (out_raw != nullptr) out_raw[position] = index;
  }

  // A row no longer than k: every position in order, then -1. It reads no score.
  __device__ __forceinline__ void write_all(int32_t length, int32_t k) const {
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < k; i += blockDim.x) write(i, i < length ? i : -1);
  }
};

// The plain form: all columns of a row, written as indices or as slots.
struct RowForm {
  using Params = TopkParams;
  using Source = WindowSource;
  using Window = RowWindow;
  using Output = RowOutput;
  static constexpr bool kSorts = true;
  // Whether everything but the scores may be read before griddepcontrol.wait.
  static __device__ __forceinline__ bool early(const Params&) { return false; }

  static size_t kept_bytes(const Params&) { return 0; }
};

}  // namespace dsv4
