// The parameters of a call of the index logits.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "dsv4/common/row_lengths.cuh"
#include "dsv4/common/warp.cuh"

namespace dsv4 {

constexpr int kKeyBytes = 128;                        // e4m3 values of a key
constexpr int kBlockKeys = 64;                        // keys scored together
constexpr int kBlockValues = kBlockKeys * kKeyBytes;  // bytes of their values
constexpr int kBlockBytes = kBlockValues + kBlockKeys * 4;
constexpr int kPieceKeys = 8;                     // keys of a piece: one candidate of a row
constexpr int kPieces = kBlockKeys / kPieceKeys;  // pieces per block

// A page of the cache: the e4m3 values of its keys, then their float32 scales.
template <int kKeys_>
struct Page {
  static constexpr int kKeys = kKeys_;
  static constexpr int kScales = kKeys * kKeyBytes;  // where the scales begin
  static constexpr int kBytes = kScales + kKeys * 4;
  static constexpr int kOfBlock = kBlockKeys / kKeys;  // pages per block
};

// A page of FP4 keys: 64 bytes per key, then four scales per key.
struct Fp4Page {
  static constexpr int kKeys = kBlockKeys;
  static constexpr int kKeyBytes = 64;
  static constexpr int kKeyScales = 4;  // ue8m0, one for each 32 values
  static constexpr int kScales = kKeys * kKeyBytes;
  static constexpr int kBytes = kScales + kKeys * kKeyScales;
  static constexpr int kOfBlock = 1;
};

// The longest row that a kernel takes: a block may reach past its end, and the number of the
// block's last key must not overflow.
constexpr int32_t kMostColumns = INT32_MAX - 4096;

// q [rows, heads, 128] and weights [rows, heads], with row = request * next_n + j. They are e4m3
// and float32, or both bfloat16 for FP4 keys. Strides in bytes.
struct Queries {
  const uint8_t* q;
  int64_t request_stride;
  int64_t row_stride;
  const uint8_t* weights;
  int64_t weight_stride;  // from row to row
  int32_t next_n;

  __device__ __forceinline__ const uint8_t* row(int32_t request, int32_t j) const {
    return q + request * request_stride + j * row_stride;
  }
  __device__ __forceinline__ const uint8_t* weights_of(int32_t row) const {
    return weights + row * weight_stride;
  }
};

// out [rows, columns], stride(1) == 1; its dtype is the kernel's.
struct LogitsOutput {
  void* out;
  int64_t stride;  // elements
  int32_t columns;
};

// The pages of the requests.
struct PagedKeys {
  const uint8_t* cache;
  int64_t page_stride;  // bytes
  int32_t pages;

  const int32_t* block_table;  // [batch, table_width], stride(1) == 1
  int64_t table_stride;
  int32_t table_width;

  __device__ __forceinline__ bool exists(int32_t page) const {
    return static_cast<uint32_t>(page) < static_cast<uint32_t>(pages);
  }
  __device__ __forceinline__ const uint8_t* page(int32_t number) const {
    return cache + number * page_stride;
  }
};

struct PagedLogitsParams {
  Queries queries;
  LogitsOutput output;  // the scores; out may be null if maxima are asked for
  LogitsOutput maxima;  // of pieces
  int32_t columns;      // the longest row: what the outputs have room for
  RowLengths lengths;
  PagedKeys keys;
  int32_t batch;
};

// The parameters that both forms of candidate logits share.
struct CandidateParams {
  Queries queries;
  LogitsOutput output;  // columns: kPieceKeys for each candidate

  const int32_t* candidates;  // [rows, count], stride(1) == 1
  int64_t candidate_stride;
  int32_t count;
  int32_t rows;
  int32_t* out_lengths;  // [rows] or null: columns that a row sees
};

struct PagedCandidateParams : CandidateParams {
  RowLengths lengths;
  Divisor next_n;
  int32_t columns;  // keys of the longest row: what the table has room for
  PagedKeys keys;
};

// Gathered keys, and which of them each row sees.
struct RaggedKeys {
  const uint8_t* k;  // [keys, 128] e4m3, rows one after the other
  const float* k_scale;
  int32_t keys;

  IntTensor row_starts;  // [rows]
  int64_t row_start_stride;
  IntTensor row_ends;
  int64_t row_end_stride;
};

struct RaggedLogitsParams {
  Queries queries;  // next_n is 1
  LogitsOutput output;
  RaggedKeys keys;
  int32_t rows;
};

struct RaggedCandidateParams : CandidateParams {
  RaggedKeys keys;
};

// The window of a row: column j is key start + j. Of the keys [start, end) those from 0 on exist;
// the other columns of the row have no key.
struct KeyWindow {
  int32_t start = 0;
  int32_t end = 0;
  int32_t columns = 0;

  KeyWindow() = default;

  // A window of at most `most` columns.
  __device__ __forceinline__ KeyWindow(const RaggedKeys& keys, int32_t row, int32_t most) {
    const int64_t from = keys.row_starts[row * keys.row_start_stride];
    const int64_t to = keys.row_ends[row * keys.row_end_stride];
    if (to <= from) return;
    const uint64_t count = static_cast<uint64_t>(to) - static_cast<uint64_t>(from);
    columns = count < static_cast<uint64_t>(most) ? static_cast<int32_t>(count) : most;
    if (from >= keys.keys || from <= -columns) return;  // no key exists
    start = static_cast<int32_t>(from);
    end = static_cast<int32_t>(from + columns < keys.keys ? from + columns : keys.keys);
  }

  // The window of a row of this warp, from the lane that has it.
  __device__ __forceinline__ KeyWindow of(int lane) const {
    KeyWindow other;
    other.start = __shfl_sync(kFullWarp, start, lane);
    other.end = __shfl_sync(kFullWarp, end, lane);
    return other;
  }

  __device__ __forceinline__ bool whole() const { return start >= 0 && end - start == columns; }
};

__device__ __forceinline__ void round_to(float v, float* out) { *out = v; }
__device__ __forceinline__ void round_to(float v, __half* out) { *out = __float2half_rn(v); }
__device__ __forceinline__ void round_to(float v, __nv_bfloat16* out) {
  *out = __float2bfloat16_rn(v);
}

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

}  // namespace dsv4
