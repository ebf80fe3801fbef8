// Logits of all keys, logits of candidates, and maxima of pieces: validate, fill the params,
// launch. Paged keys are FP4 if q is bfloat16.
#include <algorithm>
#include <cstdint>

#include <cuda_runtime.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include "device_guard.h"
#include "dsv4/logits/launch.cuh"
#include "fp4_logits.h"
#include "row_lengths.h"
#include "tensor_checks.h"

namespace dsv4 {
namespace {

using tvm::ffi::Optional;

LogitsType set_output(const char* name, LogitsOutput& o, const TensorView& out, int64_t rows,
                      DLDevice device) {
  LogitsType type = LogitsType::kFloat32;
  if (is_dtype(out, kDLBfloat, 16)) {
    type = LogitsType::kBfloat16;
  } else if (is_dtype(out, kDLFloat, 16)) {
    type = LogitsType::kFloat16;
  } else if (!is_dtype(out, kDLFloat, 32)) {
    TVM_FFI_THROW(TypeError) << name << " is " << dtype_name(out.dtype())
                             << "; it must be bfloat16, float16 or float32";
  }
  check_device(name, out, device);
  if (out.ndim() != 2 || out.size(0) != rows || (out.size(1) > 1 && out.stride(1) != 1) ||
      (rows > 1 && out.stride(0) < out.size(1))) {
    TVM_FFI_THROW(ValueError) << name << " is " << shape_name(out) << "; it must be [" << rows
                              << ", columns] with unit inner stride and rows that do not overlap";
  }
  if (out.size(1) > kMostColumns) {
    TVM_FFI_THROW(ValueError) << name << " has " << out.size(1) << " columns; at most "
                              << kMostColumns << " are allowed";
  }
  o = {const_cast<void*>(data(out)), out.stride(0), static_cast<int32_t>(out.size(1))};
  return type;
}

bool reads_fp4(const TensorView& q) { return is_dtype(q, kDLBfloat, 16); }

// The last two dimensions of q are [heads, 128] without gaps.
void check_heads(const TensorView& q) {
  const int n = q.ndim();
  if (q.size(n - 1) != kKeyBytes || (q.size(n - 2) != 64 && q.size(n - 2) != 32) ||
      q.stride(n - 1) != 1 || q.stride(n - 2) != kKeyBytes) {
    TVM_FFI_THROW(ValueError) << "q is " << shape_name(q)
                              << "; its last dimensions must be [64 or 32 heads, 128], contiguous";
  }
  if (reads_fp4(q) && q.size(n - 2) != 32) {
    TVM_FFI_THROW(ValueError) << "q is " << shape_name(q)
                              << " of bfloat16; it must have 32 heads for FP4 keys";
  }
}

void check_on_gpu(const char* name, const TensorView& t, int ndim) {
  if (t.device().device_type != kDLCUDA) {
    TVM_FFI_THROW(ValueError) << name << " is on " << device_name(t.device())
                              << "; it must be on a GPU";
  }
  if (t.ndim() != ndim) {
    TVM_FFI_THROW(ValueError) << name << " is " << shape_name(t) << "; it must have " << ndim
                              << " dimensions";
  }
}

void check_bytes(const char* name, const TensorView& t, int ndim) {
  if (!is_dtype(t, kDLUInt, 8)) {
    TVM_FFI_THROW(TypeError) << name << " is " << dtype_name(t.dtype())
                             << "; it must be uint8, the bytes of float8_e4m3fn";
  }
  check_on_gpu(name, t, ndim);
}

void set_weights(Queries& queries, const TensorView& weights, const TensorView& q) {
  const bool fp4 = reads_fp4(q);
  const int64_t heads = q.size(q.ndim() - 2),
                rows = q.ndim() == 4 ? q.size(0) * q.size(1) : q.size(0);
  if (fp4 ? !is_dtype(weights, kDLBfloat, 16) : !is_dtype(weights, kDLFloat, 32)) {
    TVM_FFI_THROW(TypeError) << "weights is " << dtype_name(weights.dtype()) << "; it must be "
                             << (fp4 ? "bfloat16 where q is" : "float32");
  }
  check_device("weights", weights, q.device());
  if (weights.ndim() != 2 || weights.size(0) != rows || weights.size(1) != heads ||
      weights.stride(1) != 1) {
    TVM_FFI_THROW(ValueError) << "weights is " << shape_name(weights) << "; it must be [" << rows
                              << ", " << heads << "] with unit inner stride";
  }
  queries.weights = static_cast<const uint8_t*>(data(weights));
  queries.weight_stride = weights.stride(0) * (fp4 ? 2 : 4);
}

// q [batch, next_n, heads, 128] and weights [batch * next_n, heads].
void set_paged_queries(Queries& queries, const TensorView& q, const TensorView& weights) {
  if (reads_fp4(q)) {
    check_on_gpu("q", q, 4);
  } else {
    check_bytes("q", q, 4);
  }
  check_heads(q);
  const int64_t rows = q.size(0) * q.size(1), bytes = reads_fp4(q) ? 2 : 1;
  if (rows > INT32_MAX) {
    TVM_FFI_THROW(ValueError) << "q has " << rows << " rows; at most " << INT32_MAX
                              << " are allowed";
  }
  check_aligned("q", data(q), q.stride(0) * bytes);
  check_aligned("q", data(q), q.stride(1) * bytes);
  queries.q = static_cast<const uint8_t*>(data(q));
  queries.request_stride = q.stride(0) * bytes;
  queries.row_stride = q.stride(1) * bytes;
  queries.next_n = static_cast<int32_t>(q.size(1));
  set_weights(queries, weights, q);
}

// Returns the columns that the table has room for.
int32_t set_paged_keys(PagedKeys& keys, const TensorView& pages, const TensorView& block_table,
                       const TensorView& q, int64_t block_size) {
  const DLDevice device = q.device();
  const int64_t batch = q.size(0);
  if ((block_size != 32 || reads_fp4(q)) && block_size != 64) {
    TVM_FFI_THROW(ValueError) << "block_size is " << block_size << "; it must be "
                              << (reads_fp4(q) ? "64 for FP4 keys" : "32 or 64");
  }
  check_bytes("pages", pages, 2);
  check_device("pages", pages, device);
  const int64_t need = reads_fp4(q) ? Fp4Page::kBytes : block_size * (kKeyBytes + 4);
  // A kernel counts the pieces of all pages.
  const int64_t most = INT32_MAX / (block_size / kPieceKeys);
  if (pages.size(1) < need || pages.stride(1) != 1 || pages.size(0) > most) {
    TVM_FFI_THROW(ValueError) << "pages is " << shape_name(pages) << "; it must be [at most "
                              << most << " pages, >= " << need << "] with unit inner stride";
  }
  check_aligned("pages", data(pages), pages.size(0) > 1 ? pages.stride(0) : 0);
  if (reads_fp4(q) && pages.size(0) > 1 && (pages.stride(0) < 0 || pages.stride(0) > UINT32_MAX)) {
    TVM_FFI_THROW(ValueError) << "pages are " << pages.stride(0)
                              << " bytes apart; FP4 keys take 0 to " << UINT32_MAX;
  }
  keys.cache = static_cast<const uint8_t*>(data(pages));
  keys.page_stride = pages.stride(0);
  keys.pages = static_cast<int32_t>(pages.size(0));

  check_int32_rows("block_table", block_table, device);
  if (block_table.size(0) != batch) {
    TVM_FFI_THROW(ValueError) << "block_table is " << shape_name(block_table) << "; it must be ["
                              << batch << ", pages of a request]";
  }
  keys.block_table = static_cast<const int32_t*>(data(block_table));
  keys.table_stride = block_table.stride(0);
  const int64_t width = std::min<int64_t>(block_table.size(1), INT32_MAX);
  keys.table_width = static_cast<int32_t>(width);
  return static_cast<int32_t>(std::min<int64_t>(width * block_size, kMostColumns));
}

// Scores the pages of batch requests for their queries. The caller gives `out`, `maxima` or both.
void paged(const char* name, const TensorView& q, const TensorView& pages,
           const TensorView& weights, const TensorView& lengths, const TensorView& block_table,
           const Optional<TensorView>& out, const Optional<TensorView>& maxima,
           int64_t block_size) {
  PagedLogitsParams p{};
  set_paged_queries(p.queries, q, weights);
  const DLDevice device = q.device();
  const int64_t batch = q.size(0), next_n = q.size(1), rows = batch * next_n;
  LogitsType type{};
  if (out.has_value()) type = set_output("out", p.output, out.value(), rows, device);
  if (maxima.has_value()) {
    const LogitsType other = set_output("maxima", p.maxima, maxima.value(), rows, device);
    if (out.has_value() && other != type) {
      TVM_FFI_THROW(TypeError) << "maxima is " << dtype_name(maxima.value().dtype())
                               << "; it must be of the dtype of the logits, "
                               << dtype_name(out.value().dtype());
    }
    type = other;
  }
  if (reads_fp4(q) && type != LogitsType::kBfloat16) {
    TVM_FFI_THROW(TypeError) << "the scores of FP4 keys are bfloat16; so must be their output";
  }
  set_paged_keys(p.keys, pages, block_table, q, block_size);
  p.columns = out.has_value() ? p.output.columns : kMostColumns;
  if (maxima.has_value()) {
    const int64_t room = int64_t{p.maxima.columns} * kPieceKeys;
    p.columns = static_cast<int32_t>(std::min<int64_t>(p.columns, room));
  }
  p.batch = static_cast<int32_t>(batch);
  const int64_t groups = reads_fp4(q) ? rows : batch;  // the most that there can be
  if (groups * ceil_div(p.columns, kBlockKeys) > INT32_MAX) {
    TVM_FFI_THROW(ValueError) << "there are " << groups
                              << (reads_fp4(q) ? " rows of " : " requests of ") << p.columns
                              << " columns: more than " << INT32_MAX << " blocks of " << kBlockKeys;
  }
  if (rows == 0) return;
  p.lengths = row_lengths(lengths, static_cast<int32_t>(rows), next_n, device);

  const Launch launch(name, device);
  if (reads_fp4(q)) {
    launch.check(launch_fp4_logits(p, device.device_id, launch.stream()));
    return;
  }
  launch.check(launch_paged_logits(p, type, static_cast<int>(q.size(2)),
                                   static_cast<int>(block_size), device.device_id,
                                   launch.stream()));
}

void paged_logits(TensorView q, TensorView pages, TensorView weights, TensorView lengths,
                  TensorView block_table, TensorView out, int64_t block_size) {
  paged("dsv4_paged_logits", q, pages, weights, lengths, block_table, out, {}, block_size);
}

void block_maxima(TensorView q, TensorView pages, TensorView weights, TensorView lengths,
                  TensorView block_table, TensorView out, Optional<TensorView> logits,
                  int64_t block_size) {
  paged("dsv4_block_maxima", q, pages, weights, lengths, block_table, logits, out, block_size);
}

// The part that both forms of candidate logits share. Returns the dtype of `out`.
LogitsType set_candidates(CandidateParams& p, const TensorView& candidates, const TensorView& out,
                          const Optional<TensorView>& out_lengths, int64_t rows, DLDevice device) {
  check_int32_rows("candidates", candidates, device);
  const int64_t count = candidates.size(1);
  if (candidates.size(0) != rows || count > kMostColumns / kPieceKeys ||
      rows * ceil_div(count, kPieces) > INT32_MAX) {
    TVM_FFI_THROW(ValueError) << "candidates is " << shape_name(candidates) << "; it must be ["
                              << rows << ", K], and rows and K must not be too many";
  }
  p.candidates = static_cast<const int32_t*>(data(candidates));
  p.candidate_stride = candidates.stride(0);
  p.count = static_cast<int32_t>(count);
  p.rows = static_cast<int32_t>(rows);
  const LogitsType type = set_output("out", p.output, out, rows, device);
  if (out.size(1) != count * kPieceKeys) {
    TVM_FFI_THROW(ValueError) << "out is " << shape_name(out) << "; it must have " << kPieceKeys
                              << " columns for each of " << count << " candidates";
  }
  if (out_lengths.has_value()) {
    p.out_lengths = int32_vector("out_lengths", out_lengths.value(), rows, device);
  }
  return type;
}

void candidate_logits(TensorView q, TensorView pages, TensorView weights, TensorView candidates,
                      TensorView lengths, TensorView block_table, TensorView out,
                      Optional<TensorView> out_lengths, int64_t block_size) {
  PagedCandidateParams p{};
  set_paged_queries(p.queries, q, weights);
  const DLDevice device = q.device();
  const int64_t batch = q.size(0), next_n = q.size(1), rows = batch * next_n;
  const LogitsType type = set_candidates(p, candidates, out, out_lengths, rows, device);
  p.columns = set_paged_keys(p.keys, pages, block_table, q, block_size);
  if (reads_fp4(q) && type != LogitsType::kBfloat16) {
    TVM_FFI_THROW(TypeError) << "the scores of FP4 keys are bfloat16; so must be out";
  }
  if (rows == 0) return;
  p.next_n = Divisor::of(static_cast<int32_t>(next_n));
  p.lengths = row_lengths(lengths, static_cast<int32_t>(rows), next_n, device);

  const Launch launch("dsv4_candidate_logits", device);
  if (reads_fp4(q)) {
    launch.check(launch_fp4_logits(p, device.device_id, launch.stream()));
    return;
  }
  launch.check(launch_candidate_logits(p, type, static_cast<int>(q.size(2)),
                                       static_cast<int>(block_size), device.device_id,
                                       launch.stream()));
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

// q [rows, heads, 128] and weights [rows, heads].
void set_ragged_queries(Queries& queries, const TensorView& q, const TensorView& weights) {
  check_bytes("q", q, 3);
  check_heads(q);
  if (q.size(0) > INT32_MAX) {
    TVM_FFI_THROW(ValueError) << "q has " << q.size(0) << " rows; at most " << INT32_MAX
                              << " are allowed";
  }
  check_aligned("q", data(q), q.stride(0));
  queries.q = static_cast<const uint8_t*>(data(q));
  queries.request_stride = q.stride(0);
  queries.next_n = 1;
  set_weights(queries, weights, q);
}

void set_ragged_keys(RaggedKeys& keys, const TensorView& k, const TensorView& k_scale,
                     const TensorView& row_starts, const TensorView& row_ends, int64_t rows,
                     DLDevice device) {
  // Columns of a row stay far below what int32 holds.
  constexpr int64_t kMostKeys = int64_t{65535} * 8 * kBlockKeys;
  check_bytes("k", k, 2);
  check_device("k", k, device);
  if (k.size(1) != kKeyBytes || k.stride(1) != 1 || (k.size(0) > 1 && k.stride(0) != kKeyBytes)) {
    TVM_FFI_THROW(ValueError) << "k is " << shape_name(k) << "; it must be [keys, " << kKeyBytes
                              << "], contiguous";
  }
  if (k.size(0) > kMostKeys) {
    TVM_FFI_THROW(ValueError) << "there are " << k.size(0) << " keys; at most " << kMostKeys
                              << " are allowed";
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
  keys.k = static_cast<const uint8_t*>(data(k));
  keys.k_scale = static_cast<const float*>(data(k_scale));
  keys.keys = static_cast<int32_t>(k.size(0));
  set_bounds("row_starts", keys.row_starts, keys.row_start_stride, row_starts, rows, device);
  set_bounds("row_ends", keys.row_ends, keys.row_end_stride, row_ends, rows, device);
}

void ragged_logits(TensorView q, TensorView k, TensorView k_scale, TensorView weights,
                   TensorView row_starts, TensorView row_ends, TensorView out, bool one_request) {
  RaggedLogitsParams p{};
  set_ragged_queries(p.queries, q, weights);
  const DLDevice device = q.device();
  const int64_t rows = q.size(0);
  const LogitsType type = set_output("out", p.output, out, rows, device);
  set_ragged_keys(p.keys, k, k_scale, row_starts, row_ends, rows, device);
  p.rows = static_cast<int32_t>(rows);
  if (rows == 0) return;

  const Launch launch("dsv4_ragged_logits", device);
  launch.check(launch_ragged_logits(p, type, static_cast<int>(q.size(1)), one_request,
                                    device.device_id, launch.stream()));
}

void candidate_logits_ragged(TensorView q, TensorView k, TensorView k_scale, TensorView weights,
                             TensorView candidates, TensorView row_starts, TensorView row_ends,
                             TensorView out, Optional<TensorView> out_lengths) {
  RaggedCandidateParams p{};
  set_ragged_queries(p.queries, q, weights);
  const DLDevice device = q.device();
  const int64_t rows = q.size(0);
  const LogitsType type = set_candidates(p, candidates, out, out_lengths, rows, device);
  set_ragged_keys(p.keys, k, k_scale, row_starts, row_ends, rows, device);
  if (rows == 0) return;

  const Launch launch("dsv4_candidate_logits_ragged", device);
  launch.check(launch_candidate_logits(p, type, static_cast<int>(q.size(1)), device.device_id,
                                       launch.stream()));
}

}  // namespace
}  // namespace dsv4

TVM_FFI_DLL_EXPORT_TYPED_FUNC(dsv4_paged_logits, dsv4::paged_logits);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(dsv4_block_maxima, dsv4::block_maxima);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(dsv4_candidate_logits, dsv4::candidate_logits);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(dsv4_ragged_logits, dsv4::ragged_logits);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(dsv4_candidate_logits_ragged, dsv4::candidate_logits_ragged);
