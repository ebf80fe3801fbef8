// Index logits of FP4 keys: the kernels of paged.cuh and candidates.cuh with the keys of
// fp4_keys.cuh and the scores of fp4_pipeline.cuh. What serves a call, and its launch.
//
// Rows of a request share one decoding of its keys: up to six of them. More rows, a chunk of
// prefill, are cut into groups of four, which are worked on like requests with the same keys.
#pragma once

#include "dsv4/logits/candidates.cuh"
#include "dsv4/logits/fp4_pipeline.cuh"
#include "dsv4/logits/launch_resident.cuh"
#include "dsv4/logits/paged.cuh"

namespace dsv4 {

template <int kRows_, int kCtas_>
struct Fp4Config {
  static constexpr int kHeads = kFp4Heads, kRows = kRows_;
  static constexpr int kStages = 4;     // blocks of keys in the ring; CandidateList takes up to 5
  static constexpr int kCtas = kCtas_;  // a multiprocessor
  using Rows = Fp4Rows<kRows>;
  using Ring = Fp4Ring<kStages>;
};

template <int kRows, int kCtas, bool kMaxima_>
struct Fp4PagedConfig : Fp4Config<kRows, kCtas> {
  using Page = Fp4Page;
  static constexpr bool kMaxima = kMaxima_;
  static constexpr int kGroup = kRows;
  template <class Copy>
  using Pipeline = Fp4Pipeline<Fp4PagedConfig, Copy>;
};

struct Fp4CandidateConfig : Fp4Config<1, 5> {
  template <class Copy>
  using Pipeline = Fp4Pipeline<Fp4CandidateConfig, Copy>;
};

struct Fp4Pieces : PagedPieces<Fp4Page::kKeys> {
  static constexpr int kValues = kPieceKeys * Fp4Page::kKeyBytes;
  static constexpr int kPieceScales = kPieceKeys * Fp4Page::kKeyScales;
  using PagedPieces::PagedPieces;

  __device__ __forceinline__ const uint8_t* values(int32_t place) const {
    return keys.page(place / kOfPage) + place % kOfPage * kValues;
  }
  __device__ __forceinline__ const uint8_t* scales(int32_t place) const {
    return keys.page(place / kOfPage) + Fp4Page::kScales + place % kOfPage * kPieceScales;
  }
};

// Begins the copy of the warp's two pieces of a block. What is not there leaves its part of the
// slot as it is.
template <int kSlots>
__device__ __forceinline__ void copy_pieces(const Fp4Ring<kSlots>& ring, const Fp4Pieces& pieces,
                                            CandidateList<Fp4Pieces>& list, int32_t turn,
                                            int slot) {
  uint8_t* to = ring.slot(slot);
  const int first = ring.warp() * 2;
  list.advance(turn);
#pragma unroll
  for (int piece = 0; piece < 2; ++piece) {
    const int32_t place = list.place(turn, first + piece);
    const int at = lane_id() * 16;
    if (place >= 0) {
      copy_piece_chunk(to + ring.values() + piece * Fp4Pieces::kValues + at,
                       pieces.values(place) + at);
    }
  }
  constexpr int kChunks = Fp4Pieces::kPieceScales / 16;  // of a piece's scales
  const int32_t place = list.place(turn, first + lane_id() / kChunks % 2);
  if (lane_id() < 2 * kChunks && place >= 0) {
    copy_piece_chunk(to + ring.scales() + lane_id() * 16,
                     pieces.scales(place) + lane_id() % kChunks * 16);
  }
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

// Scores, or the maxima of pieces, or both, in bfloat16: what has an output in `p`.
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
