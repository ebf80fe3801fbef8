// Index logits of FP4 keys: the kernels of paged.cuh and candidates.cuh with the keys of
// fp4_keys.cuh and the scores of fp4_score.cuh. This file chooses the kernel of a call and launches
// it.
//
// Up to six rows of a request share one decoding of its keys. If there are more rows (a chunk of
// prefill), they are cut into groups of four. Each group is treated like a request with the same
// keys.
#pragma once

#include <cstdint>

#include "dsv4/logits/candidates.cuh"
#include "dsv4/logits/fp4_score.cuh"
#include "dsv4/logits/launch_resident.cuh"
#include "dsv4/logits/paged.cuh"

namespace dsv4 {

// The shared memory of a CTA, by its configuration.
template <class Config>
struct Fp4Shared : Fp4Rows<Config::kRows> {
  using Fp4Rows<Config::kRows>::Fp4Rows;
};

// ---- All keys of a request ----------------------------------------------------------------------

template <int kRows_, int kCtas_, bool kMaxima_>
struct Fp4PagedConfig {
  using Page = Fp4Page;
  using Shared = Fp4Shared<Fp4PagedConfig>;
  static constexpr int kRows = kRows_;
  static constexpr int kCtas = kCtas_;  // per multiprocessor
  static constexpr bool kMaxima = kMaxima_;
  static constexpr int kGroup = kRows;
};

// score_range() copies them while keys are on their way.
template <class Config>
__device__ __forceinline__ void copy_rows(const Queries&, const RequestRows&,
                                          const Fp4Shared<Config>&) {}

template <class Out, class Config>
__device__ __forceinline__ void score_range(const PagedLogitsParams& p, const BlockRange& range,
                                            PageNumbers<1>& pages, const RequestRows& rows,
                                            const Fp4Shared<Config>& shared) {
  constexpr int kRows = Config::kRows, kWarpKeys = 16;
  const int warp = threadIdx.x % kGroupThreads / kWarpSize;
  const uint8_t* values =
      p.keys.cache + warp * kWarpKeys * Fp4Page::kKeyBytes + Fp4Values::value_offset();
  const uint8_t* scales = p.keys.cache + Fp4Page::kScales + warp * kWarpKeys * Fp4Page::kKeyScales +
                          Fp4Values::scale_offset();
  const uint32_t stride = static_cast<uint32_t>(p.keys.page_stride);  // less than 2^32
  hold(values);
  hold(scales);
  const auto load = [&](int32_t turn, Fp4Keys& keys) {
    const int32_t page = pages.get(turn, 0);
    keys.mark = p.keys.exists(page);
    if (!keys.mark) return;
    const uint8_t* const codes = values + uint64_t{static_cast<uint32_t>(page)} * stride;
    const uint8_t* const factors = scales + uint64_t{static_cast<uint32_t>(page)} * stride;
    keys.low.load(codes, factors);
    keys.high.load(codes + 8 * Fp4Page::kKeyBytes, factors + 8 * Fp4Page::kKeyScales);
  };
  const auto copy = [&] {
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      if (kRows > 1 && j >= rows.count) continue;
      shared.copy(j, p.queries.row(rows.request, rows.first + j),
                  p.queries.weights_of(rows.row + j));
    }
  };
  RangeOutput<Out, Config> output(p, rows);
  output.hold_pointers();
  const int32_t turns = (range.last - range.first + range.step - 1) / range.step;
  score_fp4<kRows>(shared, turns, load, copy,
                   [&](int32_t turn, int32_t there, const float (&score)[kOwnRows<kRows>]) {
                     output.write((range.first + turn * range.step) * kBlockKeys, there, score);
                   });
}

template <int kRows, int kCtas>
inline cudaError_t launch_fp4_rows(const PagedLogitsParams& p, int sms, int device,
                                   cudaStream_t stream) {
  using Out = __nv_bfloat16;
  const int64_t groups = p.batch * ceil_div(p.queries.next_n, kRows);
  const int64_t blocks = groups * ceil_div(p.columns, kBlockKeys);
  if (p.maxima.out != nullptr) {
    using Config = Fp4PagedConfig<kRows, kCtas, true>;
    return launch_resident<paged_logits_kernel<Out, Config>, Config>(p, blocks, sms, device,
                                                                     stream);
  }
  using Config = Fp4PagedConfig<kRows, kCtas, false>;
  return launch_resident<paged_logits_kernel<Out, Config>, Config>(p, blocks, sms, device, stream);
}

// Scores, or the maxima of pieces, or both, in bfloat16: `p` has an output for each one wanted.
inline cudaError_t launch_fp4(const PagedLogitsParams& p, int device, cudaStream_t stream) {
  int sms = 0;
  const cudaError_t error = multiprocessors(device, &sms);
  if (error != cudaSuccess) return error;
  if (p.batch == 0 || p.columns == 0) return cudaSuccess;
  switch (p.queries.next_n) {
    case 1:
      return launch_fp4_rows<1, 5>(p, sms, device, stream);
    case 2:
      return launch_fp4_rows<2, 4>(p, sms, device, stream);
    case 5:
    case 6:
      return launch_fp4_rows<6, 2>(p, sms, device, stream);
    default:
      return launch_fp4_rows<4, 3>(p, sms, device, stream);
  }
}

// ---- The keys of candidates ---------------------------------------------------------------------

struct Fp4CandidateConfig {
  using Shared = Fp4Shared<Fp4CandidateConfig>;
  static constexpr int kRows = 1;
  static constexpr int kCtas = 5;  // per multiprocessor
};

struct Fp4Pieces : PagedPieces<Fp4Page::kKeys> {
  using PagedPieces::PagedPieces;

  // Loads this thread's part of a place's values and scales.
  __device__ __forceinline__ void load(int32_t place, Fp4Values& key) const {
    const uint8_t* const page = keys.page(place / kOfPage);
    const int32_t first = place % kOfPage * kPieceKeys;
    key.load(page + first * Fp4Page::kKeyBytes + Fp4Values::value_offset(),
             page + Fp4Page::kScales + first * Fp4Page::kKeyScales + Fp4Values::scale_offset());
  }
};

template <class Out>
__device__ __forceinline__ void score_pieces(const PagedCandidateParams& p, const Fp4Pieces& pieces,
                                             CandidateList<Fp4Pieces>& list, int32_t row,
                                             int32_t first, int32_t last,
                                             const Fp4Shared<Fp4CandidateConfig>& shared) {
  list.begin();
  const int warp = threadIdx.x % kGroupThreads / kWarpSize;
  const auto load = [&](int32_t turn, Fp4Keys& keys) {
    list.advance(turn);
    keys.mark = list.seen(turn, own_key() / kPieceKeys);
    const int32_t low = list.place(turn, 2 * warp), high = list.place(turn, 2 * warp + 1);
    if (low >= 0) pieces.load(low, keys.low);
    if (high >= 0) pieces.load(high, keys.high);
  };
  const auto copy = [&] { shared.copy(0, pieces.query, p.queries.weights_of(row)); };
  Out* const out = static_cast<Out*>(p.output.out) + row * p.output.stride;
  score_fp4<1>(shared, last - first, load, copy,
               [&](int32_t turn, int32_t seen, const float (&score)[1]) {
                 write_piece<Out>(p, out, first + turn, seen, score[0]);
               });
}

inline cudaError_t launch_fp4(const PagedCandidateParams& p, int device, cudaStream_t stream) {
  int sms = 0;
  const cudaError_t error = multiprocessors(device, &sms);
  if (error != cudaSuccess) return error;
  const int64_t blocks = p.rows * ceil_div(p.count, kPieces);
  if (blocks == 0) return cudaSuccess;
  using Config = Fp4CandidateConfig;
  return launch_resident<candidate_logits_kernel<__nv_bfloat16, Config, Fp4Pieces>, Config>(
      p, blocks, sms, device, stream);
}

}  // namespace dsv4
