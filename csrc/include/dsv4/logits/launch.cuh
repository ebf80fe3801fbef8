// Host side of the index logits: the choice of the kernel, and its launch.
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_runtime.h>

#include "dsv4/common/launch.cuh"
#include "dsv4/logits/candidates.cuh"
#include "dsv4/logits/launch_resident.cuh"
#include "dsv4/logits/paged.cuh"
#include "dsv4/logits/ragged.cuh"

namespace dsv4 {

enum class LogitsType { kBfloat16, kFloat16, kFloat32 };

// Calls `f` with a null pointer of the output's type, and with the number of heads as a constant.
template <class F>
inline cudaError_t with_types(LogitsType type, int heads, const F& f) {
  const auto with_heads = [&](auto* out) {
    if (heads == 64) return f(out, std::integral_constant<int, 64>());
    if (heads == 32) return f(out, std::integral_constant<int, 32>());
    return cudaErrorInvalidValue;
  };
  switch (type) {
    case LogitsType::kBfloat16:
      return with_heads(static_cast<__nv_bfloat16*>(nullptr));
    case LogitsType::kFloat16:
      return with_heads(static_cast<__half*>(nullptr));
    case LogitsType::kFloat32:
      return with_heads(static_cast<float*>(nullptr));
  }
  return cudaErrorInvalidValue;
}

// The same, also with the keys per page (32 or 64) as a constant.
template <class F>
inline cudaError_t with_page(int page_keys, const F& f) {
  if (page_keys == 64) return f(std::integral_constant<int, 64>());
  if (page_keys == 32) return f(std::integral_constant<int, 32>());
  return cudaErrorInvalidValue;
}

template <class Out, int kHeads, int kRows, int kPageKeys>
inline cudaError_t launch_paged_config(const PagedLogitsParams& p, int64_t blocks, int sms,
                                       int device, cudaStream_t stream) {
  if (p.maxima.out != nullptr) {
    using Config = PagedConfig<kHeads, kRows, kPageKeys, true>;
    return launch_resident<paged_logits_kernel<Out, Config>, Config>(p, blocks, sms, device,
                                                                     stream);
  }
  using Config = PagedConfig<kHeads, kRows, kPageKeys, false>;
  return launch_resident<paged_logits_kernel<Out, Config>, Config>(p, blocks, sms, device, stream);
}

// Scores, or the maxima of pieces, or both: `p` has an output for each one wanted.
inline cudaError_t launch_paged_logits(const PagedLogitsParams& p, LogitsType type, int heads,
                                       int page_keys, int device, cudaStream_t stream) {
  int sms = 0;
  const cudaError_t error = multiprocessors(device, &sms);
  if (error != cudaSuccess) return error;
  const int64_t blocks = p.batch * ceil_div(p.columns, kBlockKeys);
  if (blocks == 0) return cudaSuccess;
  return with_types(type, heads, [&](auto* out, auto head_count) {
    return with_page(page_keys, [&](auto page) {
      using Out = std::remove_pointer_t<decltype(out)>;
      constexpr int kHeads = decltype(head_count)::value, kPage = decltype(page)::value;
      if (p.queries.next_n == 1) {
        return launch_paged_config<Out, kHeads, 1, kPage>(p, blocks, sms, device, stream);
      }
      constexpr int kRows = kMmaColumns / kHeads;
      return launch_paged_config<Out, kHeads, kRows, kPage>(p, blocks, sms, device, stream);
    });
  });
}

template <class Out, int kHeads, class Pieces>
inline cudaError_t launch_candidate_config(const typename Pieces::Params& p, int device,
                                           cudaStream_t stream) {
  int sms = 0;
  const cudaError_t error = multiprocessors(device, &sms);
  if (error != cudaSuccess) return error;
  using Config = CandidateConfig<kHeads>;
  const int64_t blocks = p.rows * ceil_div(p.count, kPieces);
  if (blocks == 0) return cudaSuccess;
  return launch_resident<candidate_logits_kernel<Out, Config, Pieces>, Config>(p, blocks, sms,
                                                                               device, stream);
}

inline cudaError_t launch_candidate_logits(const PagedCandidateParams& p, LogitsType type,
                                           int heads, int page_keys, int device,
                                           cudaStream_t stream) {
  return with_types(type, heads, [&](auto* out, auto head_count) {
    return with_page(page_keys, [&](auto page) {
      using Out = std::remove_pointer_t<decltype(out)>;
      constexpr int kHeads = decltype(head_count)::value, kPage = decltype(page)::value;
      return launch_candidate_config<Out, kHeads, PagedPieces<kPage>>(p, device, stream);
    });
  });
}

inline cudaError_t launch_candidate_logits(const RaggedCandidateParams& p, LogitsType type,
                                           int heads, int device, cudaStream_t stream) {
  return with_types(type, heads, [&](auto* out, auto head_count) {
    using Out = std::remove_pointer_t<decltype(out)>;
    constexpr int kHeads = decltype(head_count)::value;
    return launch_candidate_config<Out, kHeads, RaggedPieces>(p, device, stream);
  });
}

template <class Out, class Config>
inline cudaError_t launch_ragged_config(const RaggedLogitsParams& p, int32_t chunk, int device,
                                        cudaStream_t stream) {
  constexpr auto kKernel = ragged_logits_kernel<Out, Config>;
  constexpr int kBytes = TileShared<Config>::kBytes;
  const cudaError_t allowed = allow_shared_memory<kKernel>(device, kBytes);
  if (allowed != cudaSuccess) return allowed;
  const int64_t ctas = ceil_div(p.keys.keys, Config::kKeys) * ceil_div(p.rows, chunk);
  if (ctas > INT32_MAX) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(ctas));
  return launch_overlapped(kKernel, grid, Config::kThreads, 1, kBytes, stream, p, chunk);
}

// Whether the CTAs of a ragged call have the larger tiles of keys, and how many rows each takes.
struct RaggedGrid {
  bool large;
  int32_t chunk;
};

// `one_request`: the rows are the last ones of a request that has all keys.
inline RaggedGrid choose_ragged_grid(int64_t rows, int64_t keys, bool one_request, int heads,
                                     int sms) {
  using Large = TileConfig<64, 4>;
  using Small = TileConfig<64, 2>;
  const auto ctas = [&](int64_t tile, int64_t chunk) {
    return ceil_div(keys, tile) * ceil_div(rows, chunk);
  };
  if (!one_request || rows * 2 >= keys) {
    // Windows differ or are short, so that many CTAs may have little or nothing to do. Chunks are
    // long, to make use of a tile's keys, if each multiprocessor then still has several.
    constexpr int64_t kEach = 4;
    int32_t chunk = 32;
    if (ctas(Large::kKeys, chunk) >= kEach * Large::kCtas * sms) return {true, chunk};
    const int64_t enough = kEach * Small::kCtas * sms;
    while (chunk > kLeastChunkRows && ctas(Small::kKeys, chunk) < enough) chunk /= 2;
    return {false, chunk};
  }
  // All CTAs take about as long: what counts is how many a multiprocessor has, one after the other.
  // Times are in rows x heads of the larger tile, of which an H200 does one in 0.026 us. Beside its
  // rows, a CTA loads the tile's keys. Of the smaller tiles it has two at a time.
  const int64_t small = ctas(Small::kKeys, kLeastChunkRows);
  RaggedGrid best{false, kLeastChunkRows};
  int64_t least = small <= sms ? 6 * heads + 128 : ceil_div(small, 2 * sms) * (10 * heads + 128);
  for (int32_t chunk = kLeastChunkRows; chunk <= kMostChunkRows; chunk *= 2) {
    const int64_t time = ceil_div(ctas(Large::kKeys, chunk), sms) * (chunk * heads + 192);
    if (time < least) {
      least = time;
      best = {true, chunk};
    }
  }
  return best;
}

inline cudaError_t launch_ragged_logits(const RaggedLogitsParams& p, LogitsType type, int heads,
                                        bool one_request, int device, cudaStream_t stream) {
  int sms = 0;
  const cudaError_t known = multiprocessors(device, &sms);
  if (known != cudaSuccess) return known;
  if (p.keys.keys == 0 || p.rows == 0 || p.output.columns == 0) return cudaSuccess;
  const RaggedGrid grid = choose_ragged_grid(p.rows, p.keys.keys, one_request, heads, sms);
  return with_types(type, heads, [&](auto* out, auto head_count) {
    using Out = std::remove_pointer_t<decltype(out)>;
    constexpr int kHeads = decltype(head_count)::value;
    if (grid.large) {
      return launch_ragged_config<Out, TileConfig<kHeads, 4>>(p, grid.chunk, device, stream);
    }
    return launch_ragged_config<Out, TileConfig<kHeads, 2>>(p, grid.chunk, device, stream);
  });
}

}  // namespace dsv4
