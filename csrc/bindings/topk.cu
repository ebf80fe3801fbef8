// The forms of the top-k: validate -> params -> choose -> launch. In dsv4_topk_with the caller
// chooses.
#include <cstdint>

#include <cuda_runtime.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include "device_guard.h"
#include "dsv4/topk/launch.cuh"
#include "row_lengths.h"
#include "tensor_checks.h"

namespace dsv4 {
namespace {

using tvm::ffi::Optional;

ScoreType score_type(const char* name, const TensorView& logits) {
  if (is_dtype(logits, kDLBfloat, 16)) return ScoreType::kBfloat16;
  if (is_dtype(logits, kDLFloat, 16)) return ScoreType::kFloat16;
  if (!is_dtype(logits, kDLFloat, 32)) {
    TVM_FFI_THROW(TypeError) << name << " is " << dtype_name(logits.dtype())
                             << "; it must be bfloat16, float16 or float32";
  }
  return ScoreType::kFloat32;
}

void set_logits(TopkParams& p, const char* name, const TensorView& logits) {
  const DLDevice device = logits.device();
  if (device.device_type != kDLCUDA) {
    TVM_FFI_THROW(ValueError) << "logits is on " << device_name(device) << "; it must be on a GPU";
  }
  if (logits.ndim() != 2) {
    TVM_FFI_THROW(ValueError) << name << " has shape " << shape_name(logits)
                              << "; it must be [rows, columns]";
  }
  if (logits.size(1) > 1 && logits.stride(1) != 1) {
    TVM_FFI_THROW(ValueError) << name << " has stride " << logits.stride(1)
                              << " along columns; it must be 1";
  }
  if (logits.stride(0) < 0) {
    TVM_FFI_THROW(ValueError) << name << " has row stride " << logits.stride(0)
                              << "; it must not be negative";
  }
  // The last few values stay unused, so that no index computation near the end can overflow.
  constexpr int64_t kMost = INT32_MAX - 4096;
  if (logits.size(0) > kMost || logits.size(1) > kMost) {
    TVM_FFI_THROW(ValueError) << name << " has shape " << shape_name(logits) << "; at most "
                              << kMost << " rows and columns are allowed";
  }
  p.logits = data(logits);
  p.logits_stride = logits.stride(0);
  p.rows = static_cast<int32_t>(logits.size(0));
  p.columns = static_cast<int32_t>(logits.size(1));
}

// Scores, lengths and k.
void set_rows(TopkParams& p, const char* name, const TensorView& logits, const TensorView& lengths,
              int64_t k, int64_t next_n) {
  set_logits(p, name, logits);
  if (k < 1 || k > kTopkMax) {
    TVM_FFI_THROW(ValueError) << "k is " << k << "; it must be 1 ... " << kTopkMax;
  }
  p.k = static_cast<int32_t>(k);
  p.lengths = row_lengths(lengths, p.rows, next_n, logits.device());
}

void set_row_starts(TopkParams& p, const Optional<TensorView>& row_starts, DLDevice device) {
  if (!row_starts.has_value()) return;
  const TensorView t = row_starts.value();
  check_index_tensor("row_starts", t, device);
  if (t.ndim() != 1 || t.size(0) != p.rows) {
    TVM_FFI_THROW(ValueError) << "row_starts has shape " << shape_name(t) << "; it must be ["
                              << p.rows << "], one start a row";
  }
  p.row_starts = {data(t), is_dtype(t, kDLInt, 64)};
  p.row_start_stride = t.stride(0);
}

int32_t* output_rows(const char* name, const TensorView& t, const TopkParams& p, DLDevice device) {
  check_int32_rows(name, t, device);
  if (t.size(0) != p.rows || t.size(1) != p.k) {
    TVM_FFI_THROW(ValueError) << name << " has shape " << shape_name(t) << "; it must be ["
                              << p.rows << ", " << p.k << "], rows by k";
  }
  if (p.rows > 1 && t.stride(0) < p.k) {
    TVM_FFI_THROW(ValueError) << name << " has row stride " << t.stride(0)
                              << ", so its rows overlap; it must be at least k = " << p.k;
  }
  return static_cast<int32_t*>(const_cast<void*>(data(t)));
}

void set_out(TopkParams& p, const char* name, const TensorView& out, DLDevice device) {
  p.out = output_rows(name, out, p, device);
  p.out_stride = out.stride(0);
}

void set_out_raw(TopkParams& p, const char* name, const TensorView& out, DLDevice device) {
  p.out_raw = output_rows(name, out, p, device);
  p.out_raw_stride = out.stride(0);
}

void set_page_table(TopkParams& p, const char* name, const Optional<TensorView>& page_table,
                    int64_t next_n, int64_t page_size, DLDevice device) {
  if (!page_table.has_value()) return;
  const TensorView t = page_table.value();
  check_int32_rows(name, t, device);
  if (t.size(0) == p.rows) {
    p.page_group = Divisor::of(1);
  } else if (t.size(0) * next_n == p.rows) {
    p.page_group = Divisor::of(static_cast<int32_t>(next_n));
  } else {
    TVM_FFI_THROW(ValueError) << name << " has " << t.size(0) << " rows with " << p.rows
                              << " rows of logits and next_n " << next_n
                              << "; it must have one a row or one for each next_n rows";
  }
  if (page_size < 1 || page_size > INT32_MAX) {
    TVM_FFI_THROW(ValueError) << "page_size is " << page_size << "; it must be at least 1";
  }
  p.page_table = static_cast<const int32_t*>(data(t));
  p.page_table_stride = t.stride(0);
  p.pages = static_cast<int32_t>(t.size(1) > INT32_MAX ? INT32_MAX : t.size(1));
  p.page_size = Divisor::of(static_cast<int32_t>(page_size));
}

void set_out_counts(TopkParams& p, const Optional<TensorView>& out_counts, DLDevice device) {
  if (out_counts.has_value()) {
    p.out_counts = int32_vector("out_counts", out_counts.value(), p.rows, device);
  }
}

struct TopkCall {
  TopkParams p;
  ScoreType type;
  DLDevice device;
};

TopkCall topk_call(TensorView logits, TensorView lengths, TensorView out,
                   Optional<TensorView> out_raw, Optional<TensorView> row_starts,
                   Optional<TensorView> page_table, int64_t k, int64_t next_n, int64_t page_size,
                   bool sort, Optional<TensorView> out_counts) {
  TopkParams p{};
  const ScoreType type = score_type("logits", logits);
  set_rows(p, "logits", logits, lengths, k, next_n);
  const DLDevice device = logits.device();
  p.sort = sort;
  set_row_starts(p, row_starts, device);
  set_out(p, "out", out, device);
  if (out_raw.has_value()) set_out_raw(p, "out_raw", out_raw.value(), device);
  set_page_table(p, "page_table", page_table, next_n, page_size, device);
  set_out_counts(p, out_counts, device);
  return {p, type, device};
}

void topk(TensorView logits, TensorView lengths, TensorView out, Optional<TensorView> out_raw,
          Optional<TensorView> row_starts, Optional<TensorView> page_table, int64_t k,
          int64_t next_n, int64_t page_size, bool sort, Optional<TensorView> out_counts) {
  const TopkCall call = topk_call(logits, lengths, out, out_raw, row_starts, page_table, k, next_n,
                                  page_size, sort, out_counts);
  if (call.p.rows == 0) return;
  const Launch launch("dsv4_topk", call.device);
  launch.check(launch_topk<RowForm>(call.p, call.type, call.device.device_id, launch.stream()));
}

// Runs the top-k with the caller's choice instead of the table's, for the sweeps that the table is
// made from and for tests of every shape. threads: 256 or 512; 0 means 512 and a guess of the
// threshold, 1024 the kernel for any width.
// solo: the longest row, in scores, that one CTA of a cluster serves.
void topk_with(TensorView logits, TensorView lengths, TensorView out, Optional<TensorView> out_raw,
               Optional<TensorView> row_starts, Optional<TensorView> page_table, int64_t k,
               int64_t next_n, int64_t page_size, bool sort, Optional<TensorView> out_counts,
               int64_t threads, int64_t cluster, int64_t solo) {
  const TopkCall call = topk_call(logits, lengths, out, out_raw, row_starts, page_table, k, next_n,
                                  page_size, sort, out_counts);
  if (threads != 0 && threads != 256 && threads != 512 && threads != 1024) {
    TVM_FFI_THROW(ValueError) << "threads is " << threads << "; it must be 0, 256, 512 or 1024";
  }
  const TopkShape shape = threads == 0     ? TopkShape::kGuess
                          : threads == 256 ? TopkShape::k256
                          : threads == 512 ? TopkShape::k512
                                           : TopkShape::kWide;
  if (shape == TopkShape::kGuess && call.type != ScoreType::kFloat32) {
    TVM_FFI_THROW(TypeError) << "logits is " << dtype_name(logits.dtype())
                             << "; with threads 0 it must be float32";
  }
  const Launch launch("dsv4_topk_with", call.device);
  const int device = call.device.device_id;
  DeviceLimits limits{};
  launch.check(device_limits(device, &limits));
  const bool clusters = shape == TopkShape::k256 || shape == TopkShape::k512;
  const int64_t most = clusters ? limits.largest_cluster : 1;
  if (cluster < 1 || cluster > most) {
    TVM_FFI_THROW(ValueError) << "cluster is " << cluster << "; with " << threads
                              << " threads it must be 1 ... " << most << " here";
  }
  const int64_t units = most_units(call.p, call.type);
  if (shape != TopkShape::kWide && ceil_div(units, cluster) > most_units(shape)) {
    TVM_FFI_THROW(ValueError) << cluster << " x " << threads << " threads hold rows of "
                              << cluster * most_units(shape) * kUnit << " scores, logits has "
                              << call.p.columns << " columns";
  }
  // In a longer row every CTA of a cluster has some units.
  constexpr int64_t kShortest = kMaxCluster * 8 * kUnit;
  const int64_t longest = most_units(shape == TopkShape::kWide ? TopkShape::k512 : shape) * kUnit;
  if (solo < kShortest || solo > longest || solo % kUnit != 0) {
    TVM_FFI_THROW(ValueError) << "solo is " << solo << "; it must be a multiple of " << kUnit
                              << " from " << kShortest << " to " << longest;
  }
  if (call.p.rows == 0) return;
  const int ctas = static_cast<int>(cluster);
  const TopkChoice choice{shape, ctas, static_cast<int32_t>(solo / kUnit), half_units(ctas)};
  launch.check(launch_choice<RowForm>(call.p, call.type, choice, device, limits, launch.stream()));
}

// Here columns are blocks of keys, and lengths count keys.
void select_blocks(TensorView maxima, TensorView lengths, TensorView out,
                   Optional<TensorView> out_counts, int64_t k, int64_t next_n) {
  TopkParams p{};
  const ScoreType type = score_type("maxima", maxima);
  set_rows(p, "maxima", maxima, lengths, k, next_n);
  const DLDevice device = maxima.device();
  static_assert(kCandidateKeys == 1 << 3, "the length's shift");
  p.length_shift = 3;
  set_out(p, "out", out, device);
  set_out_counts(p, out_counts, device);
  if (p.rows == 0) return;
  const Launch launch("dsv4_select_blocks", device);
  launch.check(launch_topk<RowForm>(p, type, device.device_id, launch.stream()));
}

// `behind_logits`: dsv4_candidate_logits is the last kernel in the stream, and it wrote `logits`.
void select_candidates(const char* name, bool behind_logits, const TensorView& logits,
                       const TensorView& candidates, const TensorView& lengths,
                       const TensorView& out, const Optional<TensorView>& out_slots,
                       const Optional<TensorView>& out_counts,
                       const Optional<TensorView>& block_table, int64_t k, int64_t next_n,
                       int64_t page_size) {
  CandidateTopkParams p{};
  const ScoreType type = score_type("logits", logits);
  set_rows(p, "logits", logits, lengths, k, next_n);
  const DLDevice device = logits.device();
  check_int32_rows("candidates", candidates, device);
  const int64_t count = candidates.size(1);
  if (candidates.size(0) != p.rows || count < 1 || count > kCandidateMax ||
      p.columns != count * kCandidateKeys) {
    TVM_FFI_THROW(ValueError) << "candidates is " << shape_name(candidates) << "; it must be ["
                              << p.rows << ", 1 ... " << kCandidateMax << "], and logits "
                              << kCandidateKeys << " times as wide, not " << shape_name(logits);
  }
  p.candidates = static_cast<const int32_t*>(data(candidates));
  p.candidate_stride = candidates.stride(0);
  p.count = static_cast<int32_t>(count);
  if (out_slots.has_value()) {
    // A page table turns positions into slots.
    if (!block_table.has_value()) {
      TVM_FFI_THROW(ValueError) << "out_slots needs block_table, which has the pages of the slots";
    }
    set_out(p, "out_slots", out_slots.value(), device);
    set_out_raw(p, "out", out, device);
    set_page_table(p, "block_table", block_table, next_n, page_size, device);
  } else {
    set_out(p, "out", out, device);
  }
  set_out_counts(p, out_counts, device);
  if (p.rows == 0) return;
  const Launch launch(name, device);
  int sms = 0;
  launch.check(multiprocessors(device.device_id, &sms));
  // With more rows the logits leave no room for waiting CTAs (32 rows: 27.5 us without, 26.9 with
  // early start; 64 rows: 46.5 and 47.2).
  p.early = behind_logits && int64_t{p.rows} * 4 <= sms;
  launch.check(launch_topk<CandidateForm>(p, type, device.device_id, launch.stream()));
}

template <bool kBehindLogits>
void select_candidates(TensorView logits, TensorView candidates, TensorView lengths, TensorView out,
                       Optional<TensorView> out_slots, Optional<TensorView> out_counts,
                       Optional<TensorView> block_table, int64_t k, int64_t next_n,
                       int64_t page_size) {
  select_candidates(kBehindLogits ? "dsv4_select_behind_logits" : "dsv4_select_candidates",
                    kBehindLogits, logits, candidates, lengths, out, out_slots, out_counts,
                    block_table, k, next_n, page_size);
}

}  // namespace
}  // namespace dsv4

TVM_FFI_DLL_EXPORT_TYPED_FUNC(dsv4_topk, dsv4::topk);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(dsv4_topk_with, dsv4::topk_with);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(dsv4_select_blocks, dsv4::select_blocks);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(dsv4_select_candidates, dsv4::select_candidates<false>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(dsv4_select_behind_logits, dsv4::select_candidates<true>);
