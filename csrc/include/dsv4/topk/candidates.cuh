// The form of the top-k for candidates: the row's columns are the keys of a list of pieces of 8, as
// the candidate logits write them. The columns that it sees follow from the list and from its number
// of keys, and a chosen column is written as its key's position.
#pragma once

#include <cstdint>

#include "dsv4/common/warp.cuh"
#include "dsv4/topk/params.cuh"

namespace dsv4 {

constexpr int kCandidateMax = 2048;  // pieces a row
constexpr int kCandidateKeys = 8;    // keys a piece

// `lengths` count keys. Of a list that ascends with -1 behind, columns are seen up to the last one.
struct CandidateTopkParams : TopkParams {
  const int32_t* candidates;  // [rows, count], stride(1) == 1
  int64_t candidate_stride;
  int32_t count;
};

// Where a row's list and its number of keys are found.
struct CandidateWindow {
  RowLengths::Place keys_at;
  const int32_t* list;

  __device__ __forceinline__ CandidateWindow(const CandidateTopkParams& p, int32_t row)
      : keys_at(p.lengths.place(row)), list(p.candidates + row * p.candidate_stride) {}

  __device__ __forceinline__ RowWindow read(const CandidateTopkParams& p) const {
    int32_t last = list[p.count - 1];  // on its way together with the number of keys
    int64_t keys = p.lengths.read(keys_at);
    keys = keys < 0 ? 0 : keys > INT32_MAX ? INT32_MAX : keys;
    const int64_t pieces = ceil_div(keys, kCandidateKeys);
    int32_t held = p.count;
    if (pieces < held) {
      held = static_cast<int32_t>(pieces);
      last = held > 0 ? list[held - 1] : -1;
    }
    if (last < 0) {
      // A row has as many candidates as it has pieces, up to `count`; this one has fewer.
      held = find_end(list, held > 0 ? held - 1 : 0);
      last = held > 0 ? list[held - 1] : 0;
    }
    const int64_t left = keys - int64_t{last} * kCandidateKeys;
    const int64_t seen = left < 0 ? 0 : left > kCandidateKeys ? kCandidateKeys : left;
    const int32_t length = held > 0 ? (held - 1) * kCandidateKeys + static_cast<int32_t>(seen) : 0;
    return {0, static_cast<int32_t>(__reduce_max_sync(kFullWarp, length))};
  }

 private:
  // The first of the list's entries below `end` that is below zero, or `end`. Rare. All threads do
  // the same, one entry after the other, so that the length stays in a uniform register.
  static __device__ __forceinline__ int32_t find_end(const int32_t* list, int32_t end) {
    int32_t begin = 0;
#pragma unroll 1
    while (begin < end) {
      const int32_t middle = (begin + end) / 2;
      if (list[middle] >= 0) {
        begin = middle + 1;
      } else {
        end = middle;
      }
    }
    return begin;
  }
};

// A column as its key's position. What is not a key that the row sees is written as -1, whatever the
// list holds.
struct CandidateOutput : RowOutput {
  const int32_t* list;
  int64_t keys;

  __device__ __forceinline__ CandidateOutput(const CandidateTopkParams& p, int32_t row)
      : RowOutput(p, row),
        list(p.candidates + row * p.candidate_stride),
        keys(p.lengths.of(row)) {}

  // Sends for the list of a row of `length` columns.
  __device__ __forceinline__ void fetch_pages(int32_t length, uint32_t rank, uint32_t ranks) const {
    const int32_t entry = (rank + threadIdx.x * ranks) * 32;
    if (entry * kCandidateKeys < length) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(list + entry));
    }
  }

  __device__ __forceinline__ int32_t position(int32_t column) const {
    if (column < 0) return -1;
    constexpr uint32_t kMost = INT32_MAX / kCandidateKeys;
    const int32_t piece = list[column / kCandidateKeys];
    const int32_t found = piece * kCandidateKeys + column % kCandidateKeys;
    return static_cast<uint32_t>(piece) <= kMost && found < keys ? found : -1;
  }

  __device__ __forceinline__ void write(int32_t at, int32_t column) const {
    RowOutput::write(at, position(column));
  }

  __device__ __forceinline__ void write_all(int32_t length, int32_t k) const {
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < k; i += blockDim.x) write(i, i < length ? i : -1);
  }
};

struct CandidateForm {
  using Params = CandidateTopkParams;
  using Window = CandidateWindow;
  using Output = CandidateOutput;
  static constexpr bool kLooksUp = true;
  static constexpr bool kSorts = false;
};

}  // namespace dsv4
