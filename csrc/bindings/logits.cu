// dsv4_paged_logits, dsv4_ragged_logits: validate, fill the params, launch.
#include <cstdint>

#include <cuda_runtime.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>

#include "device_guard.h"
#include "dsv4/logits/launch.cuh"
#include "row_lengths.h"
#include "tensor_checks.h"

namespace dsv4 {
namespace {

LogitsType set_output(LogitsOutput& o, const TensorView& out, int64_t rows, DLDevice device) {
  LogitsType type = LogitsType::kFloat32;
  if (is_dtype(out, kDLBfloat, 16)) {
    type = LogitsType::kBfloat16;
  } else if (is_dtype(out, kDLFloat, 16)) {
    type = LogitsType::kFloat16;
  } else if (!is_dtype(out, kDLFloat, 32)) {
    TVM_FFI_THROW(TypeError) << "out is " << dtype_name(out.dtype())
                             << "; it must be bfloat16, float16 or float32";
  }
  check_device("out", out, device);
  if (out.ndim() != 2 || out.size(0) != rows || (out.size(1) > 1 && out.stride(1) != 1) ||
      (rows > 1 && out.stride(0) < out.size(1))) {
    TVM_FFI_THROW(ValueError) << "out is " << shape_name(out) << "; it must be [" << rows
                              << ", columns] with unit inner stride and rows that do not overlap";
  }
  // The last block of a row may be computed past its columns.
  constexpr int64_t kMost = INT32_MAX - 4096;
  if (out.size(1) > kMost) {
    TVM_FFI_THROW(ValueError) << "out has " << out.size(1) << " columns; at most " << kMost
                              << " are allowed";
  }
  o = {const_cast<void*>(data(out)), out.stride(0), static_cast<int32_t>(out.size(1))};
  return type;
}

// The last two dimensions of q are [heads, 128] bytes without gaps.
void check_heads(const TensorView& q) {
  const int n = q.ndim();
  if (q.size(n - 1) != kKeyBytes || (q.size(n - 2) != 64 && q.size(n - 2) != 32) ||
      q.stride(n - 1) != 1 || q.stride(n - 2) != kKeyBytes) {
    TVM_FFI_THROW(ValueError) << "q is " << shape_name(q)
                              << "; its last dimensions must be [64 or 32 heads, 128], contiguous";
  }
}

void check_bytes(const char* name, const TensorView& t, int ndim) {
  if (!is_dtype(t, kDLUInt, 8)) {
    TVM_FFI_THROW(TypeError) << name << " is " << dtype_name(t.dtype())
                             << "; it must be uint8, the bytes of float8_e4m3fn";
  }
  if (t.device().device_type != kDLCUDA) {
    TVM_FFI_THROW(ValueError) << name << " is on " << device_name(t.device())
                              << "; it must be on a GPU";
  }
  if (t.ndim() != ndim) {
    TVM_FFI_THROW(ValueError) << name << " is " << shape_name(t) << "; it must have " << ndim
                              << " dimensions";
  }
}

void set_weights(Queries& queries, const TensorView& weights, int64_t rows, int64_t heads,
                 DLDevice device) {
  if (!is_dtype(weights, kDLFloat, 32)) {
    TVM_FFI_THROW(TypeError) << "weights is " << dtype_name(weights.dtype())
                             << "; it must be float32";
  }
  check_device("weights", weights, device);
  if (weights.ndim() != 2 || weights.size(0) != rows || weights.size(1) != heads ||
      weights.stride(1) != 1) {
    TVM_FFI_THROW(ValueError) << "weights is " << shape_name(weights) << "; it must be [" << rows
                              << ", " << heads << "] with unit inner stride";
  }
  queries.weights = static_cast<const float*>(data(weights));
  queries.weight_stride = weights.stride(0);
}

void paged_logits(TensorView q, TensorView pages, TensorView weights, TensorView lengths,
                  TensorView block_table, TensorView out) {
  PagedLogitsParams p{};
  check_bytes("q", q, 4);
  check_heads(q);
  const DLDevice device = q.device();
  const int64_t batch = q.size(0), next_n = q.size(1), heads = q.size(2), rows = batch * next_n;
  if (rows > INT32_MAX) {
    TVM_FFI_THROW(ValueError) << "q has " << rows << " rows; at most " << INT32_MAX
                              << " are allowed";
  }
  check_aligned("q", data(q), q.stride(0));
  check_aligned("q", data(q), q.stride(1));
  p.queries.q = static_cast<const uint8_t*>(data(q));
  p.queries.request_stride = q.stride(0);
  p.queries.row_stride = q.stride(1);
  p.queries.next_n = static_cast<int32_t>(next_n);
  set_weights(p.queries, weights, rows, heads, device);
  const LogitsType type = set_output(p.output, out, rows, device);

  check_bytes("pages", pages, 2);
  check_device("pages", pages, device);
  if (pages.size(1) < kBlockBytes || pages.stride(1) != 1 || pages.size(0) > INT32_MAX) {
    TVM_FFI_THROW(ValueError) << "pages is " << shape_name(pages)
                              << "; it must be [pages, >= " << kBlockBytes
                              << "] with unit inner stride";
  }
  check_aligned("pages", data(pages), pages.size(0) > 1 ? pages.stride(0) : 0);
  p.cache = static_cast<const uint8_t*>(data(pages));
  p.page_stride = pages.stride(0);
  p.pages = static_cast<int32_t>(pages.size(0));

  check_int32_rows("block_table", block_table, device);
  if (block_table.size(0) != batch) {
    TVM_FFI_THROW(ValueError) << "block_table is " << shape_name(block_table) << "; it must be ["
                              << batch << ", pages of a request]";
  }
  p.block_table = static_cast<const int32_t*>(data(block_table));
  p.table_stride = block_table.stride(0);
  p.table_width =
      static_cast<int32_t>(block_table.size(1) > INT32_MAX ? INT32_MAX : block_table.size(1));
  p.batch = static_cast<int32_t>(batch);
  if (batch * ceil_div(p.output.columns, kBlockKeys) > INT32_MAX) {
    TVM_FFI_THROW(ValueError) << "out is " << shape_name(out) << ": more than " << INT32_MAX
                              << " blocks of " << kBlockKeys << " columns";
  }
  if (rows == 0) return;
  p.lengths = row_lengths(lengths, static_cast<int32_t>(rows), next_n, device);

  const Launch launch("dsv4_paged_logits", device);
  launch.check(
      launch_paged_logits(p, type, static_cast<int>(heads), device.device_id, launch.stream()));
}

void set_bounds(const char* name, IntTensor& bounds, int64_t& stride, const TensorView& t,
                int64_t rows, DLDevice device) {
  check_index_tensor(name, t, device);
  if (t.ndim() != 1 || t.size(0) != rows) {
    TVM_FFI_THROW(ValueError) << name << " is " << shape_name(t) << "; it must be [" << rows
                              << "], one a row";
  }
  bounds = {data(t), is_dtype(t, kDLInt, 64)};
  stride = t.stride(0);
}

void ragged_logits(TensorView q, TensorView k, TensorView k_scale, TensorView weights,
                   TensorView row_starts, TensorView row_ends, TensorView out) {
  RaggedLogitsParams p{};
  check_bytes("q", q, 3);
  check_heads(q);
  const DLDevice device = q.device();
  const int64_t rows = q.size(0), heads = q.size(1);
  // The runs of a tile are counted in the grid's second dimension.
  constexpr int64_t kMostKeys = int64_t{65535} * 8 * kBlockKeys;
  if (rows > INT32_MAX || k.size(0) > kMostKeys) {
    TVM_FFI_THROW(ValueError) << "there are " << rows << " rows and " << k.size(0)
                              << " keys; at most " << INT32_MAX << " and " << kMostKeys
                              << " are allowed";
  }
  check_aligned("q", data(q), q.stride(0));
  p.queries.q = static_cast<const uint8_t*>(data(q));
  p.queries.request_stride = q.stride(0);
  p.queries.next_n = 1;
  set_weights(p.queries, weights, rows, heads, device);
  const LogitsType type = set_output(p.output, out, rows, device);

  check_bytes("k", k, 2);
  check_device("k", k, device);
  if (k.size(1) != kKeyBytes || k.stride(1) != 1 || (k.size(0) > 1 && k.stride(0) != kKeyBytes)) {
    TVM_FFI_THROW(ValueError) << "k is " << shape_name(k) << "; it must be [keys, " << kKeyBytes
                              << "], contiguous";
  }
  check_aligned("k", data(k), kKeyBytes);
  if (!is_dtype(k_scale, kDLFloat, 32)) {
    TVM_FFI_THROW(TypeError) << "k_scale is " << dtype_name(k_scale.dtype())
                             << "; it must be float32";
  }
  check_device("k_scale", k_scale, device);
  if (k_scale.ndim() != 1 || k_scale.size(0) != k.size(0) ||
      (k_scale.size(0) > 1 && k_scale.stride(0) != 1)) {
    TVM_FFI_THROW(ValueError) << "k_scale is " << shape_name(k_scale) << "; it must be ["
                              << k.size(0) << "], contiguous";
  }
  p.k = static_cast<const uint8_t*>(data(k));
  p.k_scale = static_cast<const float*>(data(k_scale));
  p.keys = static_cast<int32_t>(k.size(0));
  set_bounds("row_starts", p.row_starts, p.row_start_stride, row_starts, rows, device);
  set_bounds("row_ends", p.row_ends, p.row_end_stride, row_ends, rows, device);
  p.rows = static_cast<int32_t>(rows);
  if (rows == 0) return;

  const Launch launch("dsv4_ragged_logits", device);
  launch.check(
      launch_ragged_logits(p, type, static_cast<int>(heads), device.device_id, launch.stream()));
}

}  // namespace
}  // namespace dsv4

TVM_FFI_DLL_EXPORT_TYPED_FUNC(dsv4_paged_logits, dsv4::paged_logits);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(dsv4_ragged_logits, dsv4::ragged_logits);
