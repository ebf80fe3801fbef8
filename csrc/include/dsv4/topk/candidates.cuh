// The form of the top-k for candidates. The row's columns are the keys of a list of pieces of 8
// keys, as the candidate logits write them. The columns that the row sees follow from the list and
// from the row's number of keys. A chosen column is written as its key's position.
#pragma once

#include <cstdint>

#include "dsv4/common/async_copy.cuh"
#include "dsv4/common/warp.cuh"
#include "dsv4/topk/params.cuh"

namespace dsv4 {

constexpr int kCandidateMax = 2048;  // pieces per row
constexpr int kCandidateKeys = 8;    // keys per piece

// `lengths` count keys. In an ascending list with -1 at the end, the row sees columns up to the
// last candidate.
struct CandidateTopkParams : TopkParams {
  const int32_t* candidates;  // [rows, count], stride(1) == 1
  int64_t candidate_stride;
  int32_t count;
  // The previous kernel in the stream writes the scores and nothing else, and it let this kernel
  // start after its own wait (candidate_logits_kernel). So everything but the scores was written by
  // kernels that have ended, and this kernel need not wait for it. These reads go to L2
  // (ld.global.cg), because a line in an L1 may be older than the writes of those kernels.
  bool early;
};

struct CandidateWindow : RowWindow {
  int32_t keys;  // of the row
};

// Where a row's list and its number of keys are.
struct CandidateSource {
  RowLengths::Place keys_at;
  const int32_t* list;

  __device__ __forceinline__ CandidateSource(const CandidateTopkParams& p, int32_t row)
      : keys_at(p.lengths.place(row)), list(p.candidates + row * p.candidate_stride) {}

  __device__ __forceinline__ CandidateWindow read(const CandidateTopkParams& p) const {
    int32_t last = __ldcg(list + p.count - 1);  // loaded together with the number of keys
    const int64_t length = p.lengths.read_from_l2(keys_at);
    const int32_t keys = static_cast<int32_t>(length < 0           ? 0
                                              : length > INT32_MAX ? INT32_MAX
                                                                   : length);
    const auto pieces = static_cast<int32_t>((keys + (kCandidateKeys - 1u)) / kCandidateKeys);
    int32_t held = p.count;
    if (pieces < held) {
      held = pieces;
      last = held > 0 ? __ldcg(list + held - 1) : -1;
    }
    if (last < 0) {
      // A row normally has one candidate per piece, up to `count`; this row has fewer.
      held = find_end(list, held > 0 ? held - 1 : 0);
      last = held > 0 ? __ldcg(list + held - 1) : 0;
    }
    const int32_t seen = last < pieces ? min(keys - last * kCandidateKeys, kCandidateKeys) : 0;
    const int32_t length_seen = held > 0 ? (held - 1) * kCandidateKeys + seen : 0;
    // The result of the reduction is in a uniform register, which helps the loops over the row.
    const auto uniform = static_cast<int32_t>(__reduce_max_sync(kFullWarp, length_seen));
    return {{0, uniform}, keys};
  }

 private:
  // The first of the list's entries below `end` that is negative, or `end`. Rare. All threads do
  // the same work, one entry after the other.
  static __device__ __forceinline__ int32_t find_end(const int32_t* list, int32_t end) {
    int32_t begin = 0;
#pragma unroll 1
    while (begin < end) {
      const int32_t middle = (begin + end) / 2;
      if (__ldcg(list + middle) >= 0) {
        begin = middle + 1;
      } else {
        end = middle;
      }
    }
    return begin;
  }
};

// A column as its key's position. A position that is no key of the row is written as -1, whatever
// the list holds.
struct CandidateOutput : RowOutput {
  const int32_t* list;
  int32_t keys;

  __device__ __forceinline__ CandidateOutput(const CandidateTopkParams& p, int32_t row,
                                             const CandidateWindow& window)
      : RowOutput(p, row), list(p.candidates + row * p.candidate_stride), keys(window.keys) {}

  static __device__ __forceinline__ int32_t position(int32_t candidate, int32_t keys,
                                                     int32_t column) {
    constexpr uint32_t kMost = INT32_MAX / kCandidateKeys;
    const auto piece = static_cast<uint32_t>(candidate);
    const auto found = static_cast<int32_t>(piece * kCandidateKeys) + column % kCandidateKeys;
    return piece <= kMost && found < keys ? found : -1;
  }

  // ---- The list in shared memory: `kept` has the number of keys, and from kList on the list -----
  static constexpr int kList = 4;

  static __device__ __forceinline__ void start(const CandidateTopkParams&, int32_t,
                                               const CandidateWindow&, uint32_t, uint32_t) {}

  // Begins to copy there what units begin ... begin + count - 1 of the row need. A unit's scores
  // are those of its piece and, if the row begins inside a unit, of the previous piece.
  static __device__ __forceinline__ void keep(const CandidateTopkParams& p, int32_t row,
                                              const CandidateWindow& window, int32_t* kept,
                                              int32_t begin, int32_t count) {
    const int32_t* list = p.candidates + row * p.candidate_stride;
    if (threadIdx.x == 0) *kept = window.keys;
    const int32_t held = (window.length + kCandidateKeys - 1) / kCandidateKeys;
    const int32_t end = min(begin + count, held);
#pragma unroll 1
    for (int32_t i = max(begin - 1, 0) + threadIdx.x; i < end; i += blockDim.x) {
      if (p.early) {
        kept[kList + i] = __ldcg(list + i);
      } else {
        copy_word(kept + kList + i, list + i);
      }
    }
    copies_commit();
  }

  static __device__ __forceinline__ void started() { copies_wait<0>(); }

  // The stored value of a chosen column; valid after started() and a barrier of the CTA.
  static __device__ __forceinline__ int32_t placed(const int32_t* kept, int32_t column) {
    return position(kept[kList + column / kCandidateKeys], *kept, column);
  }

  // ---- Rare rows: the list in global memory -----------------------------------------------------
  __device__ __forceinline__ void write(int32_t at, int32_t column) const {
    const int32_t* candidate = list + column / kCandidateKeys;
    RowOutput::write(at, column < 0 ? -1 : position(__ldcg(candidate), keys, column));
  }

  __device__ __forceinline__ void write_all(int32_t length, int32_t k) const {
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < k; i += blockDim.x) write(i, i < length ? i : -1);
  }
};

struct CandidateForm {
  using Params = CandidateTopkParams;
  using Source = CandidateSource;
  using Window = CandidateWindow;
  using Output = CandidateOutput;
  static constexpr bool kSorts = false;
  static __device__ __forceinline__ bool early(const Params& p) { return p.early; }

  // Bytes of shared memory that Output::keep fills.
  static size_t kept_bytes(const Params& p) { return (Output::kList + p.count) * sizeof(int32_t); }
};

}  // namespace dsv4
