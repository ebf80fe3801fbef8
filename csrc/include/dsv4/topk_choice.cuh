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
  int shared_bytes;     // a CTA may ask for
  int shared_bytes_sm;  // a multiprocessor has for its CTAs
  int reserved_bytes;   // of these, for each CTA, beside what it asks for
};

// Shared memory for each CTA with which `share` of them fit a multiprocessor, and one more does
// not. It is given out in pieces of 128 bytes.
inline int64_t bytes_of_share(int64_t share, const DeviceLimits& device) {
  const int64_t too_much = device.shared_bytes_sm / (share + 1) / 128 * 128 + 128;
  const int64_t bytes = too_much - device.reserved_bytes;
  return bytes < device.shared_bytes ? bytes : device.shared_bytes;
}

// A CTA of 512 threads alone takes a row of 8K as fast as a cluster of them; of 256, four are
// faster (1 x 8K in 256,000 columns: 3.69 us, alone 3.99; float32 5.18, alone 15).
constexpr int32_t solo_units(TopkShape shape) { return shape == TopkShape::k256 ? 512 : 1024; }

// The table of choices.
//
// From sweeps on an H200 (132 multiprocessors) of every shape and cluster, k = 512 and 2048 x 1 ...
// 128 rows, behind their logits and after what else a server runs, in buffers of 8K ... 256K
// columns with rows of 2K columns up to the full width (`python -m benchmarks.tuning.sweep
// --behind-logits`), and of rows alone (the same without it). A choice is for a width, as a server
// captures its graphs for the longest row: what counts is the geometric mean over the rows' lengths
// of the time against the best choice for each. In parentheses that of the choice and of the next
// best or former one, bfloat16 and k = 512 where nothing else is said.
//   - A row of up to 8K is one CTA's: an exchange costs more than it saves (1 x 8K: 3.9 us; eight
//     CTAs 4.5). Few of float32 are shared by four of 256 threads from 4K on.
//   - Up to a sixteenth as many rows as multiprocessors: eight CTAs, of 256 threads up to 64K (4
//     rows, 64K: 1.08; 512 threads 1.09), of 512 above (8 rows, 256K: 1.06; 256 threads 1.08).
//     Sixteen for up to four rows only, above 32K: a device holds seven clusters of that size at
//     once. Of 256 threads up to 128K (4 rows: 1.08; eight of 512 1.10).
//   - Up to an eighth: six of 512 from 32K on (16 rows, 128K: 1.06; eight of 256 1.12; 256K and k
//     2048: 1.04; 1.14).
//   - Up to a quarter: four of 512 as long as clusters of four fit side by side (24 rows and 64K:
//     1.07; six of 512 1.29), then three (32 rows, 64K: 1.07; six of 512 1.23; float32 of 160K and
//     k 2048: 1.05; 1.15).
//   - Up to half: two, float32 from 8K and others from 16K on (48 rows, 64K: 1.07; four 1.23; 64
//     rows, 256K: 1.03; three 1.22).
//   - Up to one row a multiprocessor: one (128 rows, 128K: 1.02; two 1.14; 96 rows: 1.02; 1.14;
//     float32 of 64K and k 2048: 1.03; 1.16), but two for k above 512 from 16K on (256K and k 2048:
//     1.05; one 1.19).
//   - Above two rows a multiprocessor they come in waves, and CTAs of 256 threads hide each other's
//     waits better (us, alone): 8,192 x 8K 91 (141), 8,192 x 32K 236 (333), 8,192 x 64K 440 (447).
//     Not where a thread has more units than registers hold and k is large (512 x 16K and k 2048:
//     19.5; 14.8; 8,192 x 32K and k 2048: full windows 408; 477, but causal ones 290; 229), and not
//     above 64K. float32: 16K and 32K (512 x 16K: 20.7; 26.1).
constexpr int64_t k8K = 8192 / kUnit, k16K = 2 * k8K, k32K = 4 * k8K, k64K = 8 * k8K,
                  k128K = 16 * k8K;  // units

// An exchange over sixteen costs more than it saves up to 64K (1 x 16K in 256,000 columns: 4.64 us,
// eight CTAs 4.22; 1 x 64K: 4.69; 4.55; 1 x 128K: 5.02; 5.57).
constexpr int32_t half_units(int cluster) { return cluster == 16 ? k64K : 0; }

inline TopkChoice ctas(int cluster, TopkShape shape) {
  return {shape, cluster, solo_units(shape), half_units(cluster)};
}

// Up to a quarter as many rows as there are multiprocessors, and more than an eighth: clusters that
// fit side by side with a multiprocessor for each CTA.
inline TopkChoice quarter_rows(int64_t rows, int sms) {
  return ctas(rows * 9 <= sms * 2 ? 4 : 3, TopkShape::k512);
}

// Up to a quarter: of more than 8K, float32 4K.
inline TopkChoice few_rows_16bit(int64_t rows, int64_t units, int sms) {
  constexpr TopkShape k512 = TopkShape::k512, k256 = TopkShape::k256;
  if (rows <= 4 && units > k32K) return ctas(16, units <= k128K ? k256 : k512);
  if (rows * 16 <= sms) return ctas(8, units <= k64K ? k256 : k512);
  if (rows * 8 > sms) return quarter_rows(rows, sms);
  if (units <= k32K) return ctas(units <= k16K ? 4 : 6, k256);
  return ctas(6, k512);
}

inline TopkChoice few_rows_float32(int64_t rows, int64_t units, int k, int sms) {
  constexpr TopkShape k512 = TopkShape::k512, k256 = TopkShape::k256;
  if (units <= k8K) return ctas(4, k256);
  if (rows <= 4 && units > k16K) {
    return ctas(16, units > k64K && units <= k128K ? k512 : k256);
  }
  if (rows * 16 <= sms) return ctas(8, units <= k32K ? k256 : k512);
  if (rows * 8 > sms) return quarter_rows(rows, sms);
  if (units <= k32K) return units <= k16K ? ctas(8, k256) : ctas(4, k512);
  return ctas(6, units <= k128K && k <= 512 ? k256 : k512);
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
    choice = wide_scores ? few_rows_float32(rows, units, p.k, device.sms)
                         : few_rows_16bit(rows, units, device.sms);
  } else if (rows * 2 <= device.sms) {
    choice = ctas(wide_scores || units > k16K ? 2 : 1, k512);
  } else if (rows <= device.sms) {
    choice = ctas(!wide_scores && units > k16K && p.k > 512 ? 2 : 1, k512);
  }
  const auto holds = [&] { return ceil_div(most, choice.cluster) <= most_units(choice.shape); };
  if (choice.cluster > device.largest_cluster) choice.cluster = device.largest_cluster;
  if (!holds()) choice = ctas(choice.cluster, k512);
  while (!holds() && choice.cluster < device.largest_cluster) ++choice.cluster;
  return holds() ? ctas(choice.cluster, choice.shape) : ctas(1, TopkShape::kWide);
}

}  // namespace dsv4
