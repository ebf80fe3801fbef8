// What a call of the index logits is told.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "dsv4/common/row_lengths.cuh"

namespace dsv4 {

constexpr int kKeyBytes = 128;                        // e4m3 values of a key
constexpr int kBlockKeys = 64;                        // keys scored together, and keys of a page
constexpr int kBlockScales = kBlockKeys * kKeyBytes;  // where a page's float32 scales begin
constexpr int kBlockBytes = kBlockScales + kBlockKeys * 4;

// q [rows, heads, 128] e4m3 and weights [rows, heads], where row = request * next_n + j.
struct Queries {
  const uint8_t* q;
  int64_t request_stride;  // bytes
  int64_t row_stride;      // bytes
  const float* weights;
  int64_t weight_stride;  // elements, from row to row
  int32_t next_n;

  __device__ __forceinline__ const uint8_t* row(int32_t request, int32_t j) const {
    return q + request * request_stride + j * row_stride;
  }
};

// out [rows, columns], stride(1) == 1; its dtype is the kernel's.
struct LogitsOutput {
  void* out;
  int64_t stride;  // elements
  int32_t columns;
};

struct PagedLogitsParams {
  Queries queries;
  LogitsOutput output;
  RowLengths lengths;

  const uint8_t* cache;
  int64_t page_stride;  // bytes
  int32_t pages;

  const int32_t* block_table;  // [batch, table_width], stride(1) == 1
  int64_t table_stride;
  int32_t table_width;
  int32_t batch;
};

struct RaggedLogitsParams {
  Queries queries;  // next_n is 1
  LogitsOutput output;

  const uint8_t* k;  // [keys, 128] e4m3, rows one after the other
  const float* k_scale;
  int32_t keys;

  IntTensor row_starts;  // [rows]
  int64_t row_start_stride;
  IntTensor row_ends;
  int64_t row_end_stride;
  int32_t rows;
};

__device__ __forceinline__ void round_to(float v, float* out) { *out = v; }
__device__ __forceinline__ void round_to(float v, __half* out) { *out = __float2half_rn(v); }
__device__ __forceinline__ void round_to(float v, __nv_bfloat16* out) {
  *out = __float2bfloat16_rn(v);
}

}  // namespace dsv4
