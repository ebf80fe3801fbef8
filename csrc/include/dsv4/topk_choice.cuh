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
  int32_t half_units;  // and half of an even number of CTAs
};

// Units of a row that one CTA can take.
inline int64_t most_units(TopkShape shape) {
  return shape == TopkShape::kWide ? 0
                                   : int64_t{shape == TopkShape::k256 ? 256 : 512} * kTopkUnitSteps;
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

// A CTA of 512 threads alone takes a row of 8K as fast as a cluster of them; of 256, four are
// faster (1 x 8K in 256,000 columns: 3.69 us, alone 3.99; float32 5.18, alone 15).
constexpr int32_t solo_units(TopkShape shape) { return shape == TopkShape::k256 ? 512 : 1024; }

// The table of choices.
//
// From sweeps of every shape and cluster on an H200 (132 multiprocessors), k = 512, 1024, 2048 x
// 1 ... 128 rows x 8K ... 250K, 192 ... 8,192 rows x 8K ... 128K, and 8K ... 128K in buffers of
// 256,000 columns (`python -m dsv4_plugin.testing.topk.sweep`); us at k = 512 where nothing else is
// said, best choice first.
//   - A row of up to 8K is one CTA's: an exchange costs more than it saves (1 x 8K: 3.55, eight
//     CTAs 3.95). Few of float32 are shared by four of 256 threads from 4K on (5.21; one 5.62).
//   - Few rows, up to a sixteenth of the multiprocessors: eight CTAs each (1 x 16K, k 2048: 4.27;
//     four 4.48). Sixteen pay for up to four rows only, above 32K: a device holds seven clusters of
//     that size at once (1 x 250K: 6.09; eight 7.52). 256 threads up to 64K (8 x 32K: 4.14; 512
//     threads 4.36), of sixteen to 128K (1 x 128K: 4.95; 5.06).
//   - Up to an eighth, eight CTAs of 512 threads do not fit side by side everywhere: six at 64K
//     (16 x 64K: 5.22; eight 5.66), and eight of 256 above (16 x 128K: 7.75; 8.17).
//   - Up to a quarter: four of 256 (32 x 16K: 4.35; one of 512 4.57. 32 x 250K: 11.28; three of
//     512 12.45), but six of 512 for 64K (6.97; 7.67) and for 128K if k is large, then eight of 256
//     (32 x 250K, k 2048: 13.2; six of 512 14.5).
//   - float32 has half the scores in registers. Eight of 256 up to 16K (1 x 16K: 3.96; four of 512
//     4.43), sixteen of 256 for up to four rows (1 x 250K: 8.90; 9.51) except at 128K, which
//     sixteen of 512 keep in registers (7.62; 8.29). 32 rows have four of 256 unless k is large (32
//     x 250K: 15.4; six of 512 17.0).
//   - Up to three quarters: two (64 x 64K: 8.56; one 9.37), from 32K on and float32 from 16K
//     (7.21; four of 256 8.84).
//   - Up to one row a multiprocessor: one, unless k is large: two for 32K ... 128K (128 x 32K, k
//     2048: 9.18; one 11.23), float32 for 16K (k 1024: 9.98; 11.84) and with k above 1024 from 64K
//     on (128 x 128K: 42.2; 42.5).
//   - Above two rows a multiprocessor they come in waves, and CTAs of 256 threads hide each other's
//     waits better: 8,192 x 8K 91 (141), 8,192 x 32K 236 (333), 8,192 x 64K 440 (447). Not where a
//     thread has more units than registers hold and k is large (512 x 16K, k 2048: 19.5; 14.8;
//     8,192 x 32K, k 2048: full windows 408; 477, but causal ones 290; 229), and not above 64K.
//     float32: 16K and 32K (512 x 16K: 20.7; 26.1).
constexpr int64_t k8K = 8192 / kUnit, k16K = 2 * k8K, k32K = 4 * k8K, k64K = 8 * k8K,
                  k128K = 16 * k8K;  // units

// An exchange over sixteen costs more than it saves up to 64K (1 x 16K in 256,000 columns: 4.64 us,
// eight CTAs 4.22; 1 x 64K: 4.69; 4.55; 1 x 128K: 5.02; 5.57).
constexpr int32_t half_units(int cluster) { return cluster == 16 ? k64K : 0; }

inline TopkChoice ctas(int cluster, TopkShape shape) {
  return {shape, cluster, solo_units(shape), half_units(cluster)};
}

// Up to a quarter as many rows as there are multiprocessors: of more than 8K, float32 4K.
inline TopkChoice few_rows_16bit(int64_t rows, int64_t units, int k, int sms) {
  constexpr TopkShape k512 = TopkShape::k512, k256 = TopkShape::k256;
  if (rows <= 4 && units > k32K) return ctas(16, units <= k128K ? k256 : k512);
  if (rows * 16 <= sms) return ctas(8, units <= k64K ? k256 : k512);
  if (rows * 8 <= sms) {
    if (units <= k32K) return ctas(units <= k16K ? 4 : 6, k256);
    return units <= k64K ? ctas(6, k512) : ctas(8, k256);
  }
  if (units > k32K && (units <= k64K || (units <= k128K && k > 1024))) return ctas(6, k512);
  return ctas(units > k128K && k > 1024 ? 8 : 4, k256);
}

inline TopkChoice few_rows_float32(int64_t rows, int64_t units, int k, int sms) {
  constexpr TopkShape k512 = TopkShape::k512, k256 = TopkShape::k256;
  if (units <= k8K) return ctas(4, k256);
  if (rows <= 4 && units > k16K) {
    return ctas(16, units > k64K && units <= k128K ? k512 : k256);
  }
  if (rows * 16 <= sms) return ctas(8, units <= k32K ? k256 : k512);
  if (rows * 8 <= sms) {
    if (units <= k32K) return units <= k16K ? ctas(8, k256) : ctas(4, k512);
    return ctas(6, units <= k128K && k <= 512 ? k256 : k512);
  }
  if (k > 1024) return units <= k64K ? ctas(8, k256) : ctas(6, k512);
  return ctas(4, units > k16K && units <= k32K && k > 512 ? k512 : k256);
}

// More rows than fit at once with 512 threads each: whether 256 are better.
inline bool many_rows_of_256(int64_t units, int k, bool wide_scores) {
  if (units <= k8K) return !wide_scores;
  if (units <= k16K) return wide_scores || k <= 512;
  if (units <= k32K) return k <= (wide_scores ? 512 : 1024);
  return units <= k64K && !wide_scores && k <= 512;
}

inline TopkChoice choose_topk(const TopkParams& p, ScoreType type, const DeviceLimits& device) {
  constexpr TopkShape k512 = TopkShape::k512, k256 = TopkShape::k256;
  const int64_t units = ceil_div(p.columns, kUnit);
  const int64_t most = most_units(p, type);  // one more where rows begin anywhere
  const int64_t rows = p.rows;
  const bool wide_scores = type == ScoreType::kFloat32;
  TopkChoice choice = ctas(1, k512);
  if (rows > 2 * device.sms) {
    if (many_rows_of_256(units, p.k, wide_scores)) choice = ctas(1, k256);
  } else if (units <= (wide_scores && rows * 4 <= device.sms ? k8K / 2 : k8K)) {
    // one
  } else if (rows * 4 <= device.sms) {
    choice = (wide_scores ? few_rows_float32 : few_rows_16bit)(rows, units, p.k, device.sms);
  } else if (rows * 8 <= device.sms * 3) {
    choice = ctas(units > k32K ? 4 : units > k16K || wide_scores ? 2 : 1, k512);
  } else if (rows * 4 <= device.sms * 3) {
    choice = ctas(units > k16K || wide_scores ? 2 : 1, k512);
  } else if (rows <= device.sms && units <= k128K) {
    const bool two =
        wide_scores ? units <= k16K || (units > k32K && p.k > 1024) : units > k16K && p.k > 512;
    choice = ctas(two ? 2 : 1, k512);
  }
  const auto holds = [&] { return ceil_div(most, choice.cluster) <= most_units(choice.shape); };
  if (choice.cluster > device.largest_cluster) choice.cluster = device.largest_cluster;
  if (!holds()) choice = ctas(choice.cluster, k512);
  while (!holds() && choice.cluster < device.largest_cluster) ++choice.cluster;
  return holds() ? ctas(choice.cluster, choice.shape) : ctas(1, TopkShape::kWide);
}

}  // namespace dsv4
