// Host side: which kernel serves a call, with how many threads and CTAs a row.
#pragma once

#include <cstdint>

#include "dsv4/common.cuh"
#include "dsv4/ordered_key.cuh"
#include "dsv4/topk_layout.cuh"
#include "dsv4/topk_params.cuh"

namespace dsv4 {

enum class ScoreType { kBfloat16, kFloat16, kFloat32, kNarrowedFloat32 };

// Threads of a CTA of topk_kernel, and the kernel for rows that no cluster holds.
enum class TopkShape : int { k512, k256, kWide };

struct TopkChoice {
  TopkShape shape;
  int cluster;         // CTAs a row
  int32_t solo_units;  // longest row, in units of eight scores, that one CTA of a cluster serves
};

// Units of a row that one CTA can take.
inline int64_t most_units(TopkShape shape) {
  return shape == TopkShape::k512   ? int64_t{512} * kTopkUnitSteps
         : shape == TopkShape::k256 ? int64_t{256} * kTopkUnitSteps
                                    : 0;
}

// Units that the longest row of the call can take. A row may begin anywhere past a 16-byte
// boundary.
inline int64_t most_units(const TopkParams& p, ScoreType type) {
  const int bytes = type == ScoreType::kBfloat16 || type == ScoreType::kFloat16 ? 2 : 4;
  const bool aligned = reinterpret_cast<uintptr_t>(p.logits) % 16 == 0 &&
                       (p.rows == 1 || p.logits_stride * bytes % 16 == 0) &&
                       p.row_starts.data == nullptr;
  return ceil_div(p.columns + (aligned ? 0 : 16 / bytes - 1), kUnit);
}

struct DeviceLimits {
  int sms;
  int largest_cluster;
  int shared_bytes;  // a CTA may ask for
};

constexpr int32_t kSoloUnits = 1024;

// The table of choices.
//
// From sweeps of every shape and cluster on an H100 (132 multiprocessors), k = 512, 1024, 2048 x
// 1, 8, 16, 32, 64, 128 rows x 8K ... 250K (`python -m dsv4_plugin.testing.topk.sweep`); us at
// k = 512 where nothing else is said, best choice first.
//   - A row of up to 8K is one CTA's: an exchange costs more than it saves (1 x 8K: 3.52, eight
//     CTAs 3.99. float32: 5.61; 6.10).
//   - Few rows, up to a sixteenth of the multiprocessors: four CTAs each at 16K (1 x 16K: 4.11;
//     one 4.4), 8 above. Sixteen pay for up to four rows only: a device holds seven clusters of
//     that size at once. From 128K on (1 x 250K: 6.12; eight 7.71), float32 from 64K on. 256
//     threads up to 64K (8 x 32K: 4.30; 512 threads 4.55), of sixteen to 128K (1 x 128K: 5.05;
//     5.25).
//   - Up to an eighth, eight CTAs of 512 threads do not fit side by side everywhere: six at 64K
//     (16 x 64K: 5.29; eight 5.45), and 256 threads below and from 256K on (16 x 250K: 9.22;
//     10.64). float32: four up to 32K, six above (16 x 128K, k 1024: 10.8; eight 13.3).
//   - Up to a quarter: one for 16K (32 x 16K: 4.44; four 4.52), four of 256 for 32K (5.32; two of
//     512 5.55), six of 512 for 64K (6.68; 7.80). Above, four of 256 (32 x 250K: 11.47; three of
//     512 12.57), or six of 512 if k is large (k 2048: 14.49; six of 256 15.49). float32: two for
//     16K (7.0; four 7.2), four for 32K (9.4; two 9.7), above six (32 x 250K: 17.8; two 18.1), or
//     two if k is small, up to 128K (32 x 64K: 11.1; 11.9).
//   - Up to three quarters: two (64 x 64K: 8.59; one 9.41), from 32K on and float32 from 16K
//     (7.15; four of 256 8.71).
//   - Up to one row a multiprocessor: one, unless k is large: two for 32K ... 128K (128 x 32K, k
//     2048: 8.82; one 11.31), float32 for 16K (k 1024: 9.71; 11.87) and with k above 1024 from 64K
//     on (128 x 128K: 50.5; 52.2).
//   - More rows fill the multiprocessors by themselves: one.
//   - float32 has 512 threads everywhere, though 256 would gain 4 to 15 % on full rows of most of
//     these shapes: a row of 8K in a wide buffer is still one CTA's, and the registers of 256
//     threads hold 4K scores of float32 (1 x 8K in 256,000 columns, k 2048: 15.2; at its own width
//     6.3).
constexpr int64_t k8K = 8192 / kUnit, k16K = 2 * k8K, k32K = 4 * k8K, k64K = 8 * k8K,
                  k128K = 16 * k8K;  // units

struct RowShape {
  int cluster;
  TopkShape shape;
};

// Rows of more than 8K, up to a quarter as many as there are multiprocessors.
inline RowShape few_rows_16bit(int64_t rows, int64_t units, int k, int sms) {
  constexpr TopkShape k512 = TopkShape::k512, k256 = TopkShape::k256;
  if (rows <= 4 && units > k64K) return {16, units <= k128K ? k256 : k512};
  if (rows * 16 <= sms) return {units <= k16K ? 4 : 8, units <= k64K ? k256 : k512};
  if (rows * 8 <= sms) {
    if (units <= k32K) return {units <= k16K ? 4 : 6, k256};
    if (units <= k64K) return {6, k512};
    return {8, units <= k128K ? k512 : k256};
  }
  if (units <= k16K) return {1, k512};
  if (units <= k32K) return {4, k256};
  if (units <= k64K || k > 1024) return {6, k512};
  return {4, k256};
}

inline RowShape few_rows_float32(int64_t rows, int64_t units, int k, int sms) {
  constexpr TopkShape k512 = TopkShape::k512;
  if (rows <= 4 && units > k32K) return {16, k512};
  if (rows * 16 <= sms) return {units <= k16K ? 4 : 8, k512};
  if (rows * 8 <= sms) return {units <= k32K ? 4 : 6, k512};
  if (units <= k16K) return {2, k512};
  if (units <= k32K) return {4, k512};
  return {units <= k128K && k <= 512 ? 2 : 6, k512};
}

inline TopkChoice choose_topk(const TopkParams& p, ScoreType type, const DeviceLimits& device) {
  const int64_t units = most_units(p, type);
  const auto holds = [&](TopkShape shape, int cluster) {
    return ceil_div(units, cluster) <= most_units(shape);
  };
  TopkShape shape = TopkShape::k512;
  int cluster = 1;
  const int64_t rows = p.rows;
  const bool wide_scores = type == ScoreType::kFloat32;
  if (units <= k8K) {
    cluster = 1;
  } else if (rows * 4 <= device.sms) {
    const auto few_rows = wide_scores ? few_rows_float32 : few_rows_16bit;
    const RowShape found = few_rows(rows, units, p.k, device.sms);
    cluster = found.cluster;
    shape = found.shape;
  } else if (rows * 8 <= device.sms * 3) {
    cluster = units > k32K ? 4 : units > k16K || wide_scores ? 2 : 1;
  } else if (rows * 4 <= device.sms * 3) {
    cluster = units > k16K || wide_scores ? 2 : 1;
  } else if (rows <= device.sms && units <= k128K) {
    const bool two =
        wide_scores ? units <= k16K || (units > k32K && p.k > 1024) : units > k16K && p.k > 512;
    cluster = two ? 2 : 1;
  }
  if (cluster > device.largest_cluster) cluster = device.largest_cluster;
  if (!holds(shape, cluster)) shape = TopkShape::k512;
  while (!holds(shape, cluster) && cluster < device.largest_cluster) ++cluster;
  if (!holds(shape, cluster)) shape = TopkShape::kWide;
  return {shape, shape == TopkShape::kWide ? 1 : cluster, kSoloUnits};
}

}  // namespace dsv4
