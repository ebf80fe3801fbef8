// Host side: the kernel that serves a call, its threads per CTA, and the CTAs per row.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dsv4/common/warp.cuh"
#include "dsv4/topk/config.cuh"
#include "dsv4/topk/ordered_key.cuh"
#include "dsv4/topk/params.cuh"

namespace dsv4 {

enum class ScoreType { kBfloat16, kFloat16, kFloat32 };

// Threads per CTA of topk_kernel; 512 threads and a guess of the threshold (select_guessed.cuh: one
// CTA per row, float32 scores); and the kernel for rows that no cluster can hold.
enum class TopkShape : int { k512, k256, kWide, kGuess };

struct TopkChoice {
  TopkShape shape;
  int cluster;  // CTAs per row
  int32_t
      solo_units;  // the longest row, in units of eight scores, that one CTA of a cluster serves
  int32_t half_units;  // the longest row, in units, that half of an even cluster serves
};

// Units of a row that one CTA can take.
inline int64_t most_units(TopkShape shape) {
  if (shape == TopkShape::kWide) return 0;
  return int64_t{shape == TopkShape::k256 ? 256 : 512} * kTopkUnitSteps;
}

// Units that the longest row of the call can have. A row may begin anywhere after a 16-byte
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
  int shared_bytes;     // that a CTA may ask for
  int shared_bytes_sm;  // that a multiprocessor has for its CTAs
  int reserved_bytes;   // of these, for each CTA, beside what it asks for
};

// Shared memory per CTA with which `share` CTAs fit on a multiprocessor and one more does not. It
// is allocated in pieces of 128 bytes.
inline int64_t bytes_of_share(int64_t share, const DeviceLimits& device) {
  const int64_t too_much = device.shared_bytes_sm / (share + 1) / 128 * 128 + 128;
  const int64_t bytes = too_much - device.reserved_bytes;
  return bytes < device.shared_bytes ? bytes : device.shared_bytes;
}

// Longest row, in units, that one CTA serves alone. A CTA of 512 threads takes a row of 8K as fast
// as a cluster does. With 256 threads four CTAs are faster (1 x 8K in 256,000 columns: 3.69 us, one
// CTA 3.99; float32 5.18 and 15).
constexpr int32_t solo_units(TopkShape shape) { return shape == TopkShape::k256 ? 512 : 1024; }

constexpr int64_t kAny = INT32_MAX;  // rows, units or k
constexpr int64_t k4K = 4096 / kUnit, k8K = 2 * k4K, k16K = 4 * k4K, k32K = 8 * k4K,
                  k64K = 16 * k4K, k128K = 32 * k4K;  // columns, in units

// Longest row, in units, that half of a cluster serves. Up to 64K, an exchange among sixteen CTAs
// costs more than it saves (1 x 16K in 256,000 columns: 4.64 us, eight CTAs 4.22; 1 x 64K: 4.69 and
// 4.55; 1 x 128K: 5.02 and 5.57).
constexpr int32_t half_units(int cluster) { return cluster == 16 ? k64K : 0; }

inline TopkChoice ctas(int cluster, TopkShape shape) {
  return {shape, cluster, solo_units(shape), half_units(cluster)};
}

// ---- The table of choices -----------------------------------------------------------------------
//
// A call takes the first line whose conditions it meets. Rows are compared with the number of
// multiprocessors. Columns are those of the buffer, not of a row: an engine captures its graphs for
// the longest row, so one choice serves rows of every length.
//
// The numbers come from sweeps on an H200 (132 multiprocessors) over every shape and cluster, k 512
// and 2048, 1 ... 128 rows, buffers of 8K ... 256K columns, and rows of 2K columns up to the full
// width. One sweep runs the top-k after its logits and the other kernels of a server (`python -m
// benchmarks.tuning.sweep --behind-logits`), the other runs it alone (the same without the option).
// A plain number is a geometric mean over the rows' lengths: the time against the best choice for
// each length. A number with us is a time. The first number is that of the line, the second that of
// the next best choice or of the former one. Numbers are for bfloat16 and k 512 unless a line says
// otherwise.

// At most `multiprocessors * num / den` rows.
struct RowShare {
  int64_t num;
  int64_t den;
};

struct TopkLine {
  RowShare share;
  int64_t rows;   // at most
  int64_t from;   // units of a row: at least
  int64_t units;  // units of a row: at most
  int64_t k;      // at most
  int cluster;    // CTAs per row
  TopkShape shape;
};

constexpr TopkShape k512 = TopkShape::k512, k256 = TopkShape::k256, kGuess = TopkShape::kGuess;
constexpr RowShare kSixteenth{1, 16}, kEighth{1, 8}, kTwoNinths{2, 9}, kQuarter{1, 4}, kHalf{1, 2},
    kOneEach{1, 1}, kTwoEach{2, 1}, kAnyShare{1, 0};

// clang-format off
constexpr TopkLine kLines16Bit[] = {
    // share     rows  from       units  k     CTAs threads  measured / next best
    {kTwoEach,   kAny, 0,         k8K,   kAny, 1,  k512},  // 1 x 8K: 3.9 us / eight CTAs 4.5 us
    // A device holds seven clusters of sixteen at once.
    {kQuarter,   4,    k32K + 1,  k128K, kAny, 16, k256},  // 4 rows: 1.08 / eight of 512 1.10
    {kQuarter,   4,    k128K + 1, kAny,  kAny, 16, k512},
    {kSixteenth, kAny, 0,         k64K,  kAny, 8,  k256},  // 4 rows, 64K: 1.08 / of 512 1.09
    {kSixteenth, kAny, 0,         kAny,  kAny, 8,  k512},  // 8 rows, 256K: 1.06 / of 256 1.08
    {kEighth,    kAny, 0,         k16K,  kAny, 4,  k256},
    {kEighth,    kAny, 0,         k32K,  kAny, 6,  k256},
    {kEighth,    kAny, 0,         kAny,  kAny, 6,  k512},  // 16 rows, 128K: 1.06 / eight of 256 1.12; 256K, k 2048: 1.04 / 1.14
    // Clusters of four fit side by side, with a multiprocessor for each CTA ...
    {kTwoNinths, kAny, 0,         kAny,  kAny, 4,  k512},  // 24 rows, 64K: 1.07 / six 1.29
    // ... and here clusters of three.
    {kQuarter,   kAny, 0,         kAny,  kAny, 3,  k512},  // 32 rows, 64K: 1.07 / six 1.23
    {kHalf,      kAny, 0,         k16K,  kAny, 1,  k512},
    {kHalf,      kAny, 0,         kAny,  kAny, 2,  k512},  // 48 rows, 64K: 1.07 / four 1.23; 64 rows, 256K: 1.03 / three 1.22
    {kOneEach,   kAny, 0,         k16K,  kAny, 1,  k512},
    {kOneEach,   kAny, 0,         kAny,  512,  1,  k512},  // 128 rows, 128K: 1.02 / two 1.14; 96 rows: 1.02 / 1.14
    {kOneEach,   kAny, 0,         kAny,  kAny, 2,  k512},  // 256K, k 2048: 1.05 / one 1.19
    {kTwoEach,   kAny, 0,         kAny,  kAny, 1,  k512},
    // From here on rows come in waves. CTAs of 256 threads hide each other's waits, unless a thread
    // has more units than its registers hold and k is large (512 x 16K, k 2048: 19.5 us / 14.8).
    {kAnyShare,  kAny, 0,         k8K,   kAny, 1,  k256},  // 8,192 x 8K: 91 us / 141
    {kAnyShare,  kAny, 0,         k16K,  512,  1,  k256},
    {kAnyShare,  kAny, 0,         k16K,  kAny, 1,  k512},
    {kAnyShare,  kAny, 0,         k32K,  1024, 1,  k256},  // 8,192 x 32K: 236 us / 333
    {kAnyShare,  kAny, 0,         k64K,  512,  1,  k256},  // 8,192 x 64K: 440 us / 447
    {kAnyShare,  kAny, 0,         kAny,  kAny, 1,  k512},  // 8,192 x 32K, k 2048, causal windows: 229 us / 290; full ones 477 / 408
};

constexpr TopkLine kLinesFloat32[] = {
    // share     rows  from       units  k     CTAs threads  measured / next best
    {kTwoEach,   kAny, 0,         k4K,   kAny, 1,  k512},
    {kQuarter,   kAny, 0,         k8K,   kAny, 4,  k256},
    {kTwoEach,   kAny, 0,         k8K,   kAny, 1,  k512},
    {kQuarter,   4,    k16K + 1,  k32K,  kAny, 16, k256},
    {kQuarter,   4,    k32K + 1,  k64K,  kAny, 8,  k512},  // 1 x 64K, k 2048: 7.7 us / sixteen of 256 9.1; k 512: 7.2 / 8.3
    {kQuarter,   4,    k64K + 1,  k128K, kAny, 16, k512},
    {kQuarter,   4,    k128K + 1, kAny,  kAny, 16, k256},
    {kSixteenth, kAny, 0,         k32K,  kAny, 8,  k256},
    {kSixteenth, kAny, 0,         kAny,  kAny, 8,  k512},
    {kEighth,    kAny, 0,         k16K,  kAny, 8,  k256},
    {kEighth,    kAny, 0,         k32K,  kAny, 4,  k512},
    {kEighth,    kAny, 0,         k128K, 512,  6,  k256},
    {kEighth,    kAny, 0,         kAny,  kAny, 6,  k512},
    {kTwoNinths, kAny, 0,         kAny,  kAny, 4,  k512},
    {kQuarter,   kAny, 0,         kAny,  kAny, 3,  k512},  // 32 rows, 160K, k 2048: 1.05 / six 1.15
    {kHalf,      kAny, 0,         kAny,  kAny, 2,  k512},
    {kAnyShare,  kAny, 0,         k8K,   kAny, 1,  k512},
    {kTwoEach,   kAny, 0,         kAny,  512,  1,  k512},
    // A guess costs 2 us and saves reading the listed units again, which are many if k is large.
    {kOneEach,   kAny, 0,         kAny,  kAny, 1,  kGuess},  // k 2048: 128 x 16K 11.1 us / 13.9, 128 x 160K 41 / 59; k 1024: 128 x 64K 17.3 / 19.1
    {kTwoEach,   kAny, 0,         k32K,  1024, 1,  k512},
    {kTwoEach,   kAny, 0,         kAny,  kAny, 1,  kGuess},  // k 2048: 256 x 16K 16.0 us / 20.3, 256 x 64K 38 / 56
    {kAnyShare,  kAny, 0,         k16K,  kAny, 1,  k256},    // 512 x 16K, k 512: 20.7 us / 26.1; 4,096 x 16K, k 2048: 248 / with a guess 257
    {kAnyShare,  kAny, 0,         k32K,  512,  1,  k256},
    {kAnyShare,  kAny, 0,         k32K,  1024, 1,  k512},
    {kAnyShare,  kAny, 0,         kAny,  512,  1,  k512},
    {kAnyShare,  kAny, 0,         kAny,  kAny, 1,  kGuess},  // k 2048: 512 x 128K 112 us / 171; 2,048 x 32K 201 / 210
};

// Candidates: rows of up to 16K columns, most of them full. The numbers are for the top-k alone.
constexpr TopkLine kCandidateLines16Bit[] = {
    // share     rows  from       units  k     CTAs threads  measured / next best
    {kTwoEach,   kAny, 0,         k8K,   kAny, 1,  k512},
    {kEighth,    kAny, 0,         kAny,  kAny, 4,  k256},  // 1 and 8 rows: 3.88 us / 3.96
    {kQuarter,   kAny, 0,         kAny,  kAny, 3,  k256},  // 32 rows: 4.25 us / four 4.39
    {kTwoEach,   kAny, 0,         kAny,  kAny, 1,  k512},
    {kAnyShare,  kAny, 0,         kAny,  512,  1,  k256},
    {kAnyShare,  kAny, 0,         kAny,  kAny, 1,  k512},
};
// clang-format on

template <size_t kCount>
inline TopkChoice first_line(const TopkLine (&lines)[kCount], int64_t rows, int64_t units,
                             int64_t k, int64_t sms) {
  for (const TopkLine& line : lines) {
    if (rows * line.share.den <= sms * line.share.num && rows <= line.rows && units >= line.from &&
        units <= line.units && k <= line.k) {
      return ctas(line.cluster, line.shape);
    }
  }
  return ctas(1, k512);  // an empty row
}

// `candidates`: the columns are those of candidates.
inline TopkChoice choose_topk(const TopkParams& p, ScoreType type, const DeviceLimits& device,
                              bool candidates = false) {
  const int64_t units = ceil_div(p.columns, kUnit);
  const int64_t most = most_units(p, type);  // one more if rows can begin anywhere
  const auto first = [&](const auto& lines) {
    return first_line(lines, p.rows, units, p.k, device.sms);
  };
  TopkChoice choice = type == ScoreType::kFloat32 ? first(kLinesFloat32)
                      : candidates                ? first(kCandidateLines16Bit)
                                                  : first(kLines16Bit);
  if (candidates && choice.shape == TopkShape::kGuess) choice = ctas(1, k512);  // has no kernel
  const auto holds = [&] { return ceil_div(most, choice.cluster) <= most_units(choice.shape); };
  if (choice.cluster > device.largest_cluster) choice.cluster = device.largest_cluster;
  if (!holds()) choice = ctas(choice.cluster, k512);
  while (!holds() && choice.cluster < device.largest_cluster) ++choice.cluster;
  return holds() ? ctas(choice.cluster, choice.shape) : ctas(1, TopkShape::kWide);
}

}  // namespace dsv4
