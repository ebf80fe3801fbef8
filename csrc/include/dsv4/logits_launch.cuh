// Host side of the index logits: which kernel serves a call, and its launch.
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_runtime.h>

#include "dsv4/host_launch.cuh"
#include "dsv4/logits_paged.cuh"
#include "dsv4/logits_ragged.cuh"

namespace dsv4 {

enum class LogitsType { kBfloat16, kFloat16, kFloat32 };

// Calls `f` with a null pointer of the output's type and the number of heads as a constant.
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

inline cudaError_t launch_paged_logits(const PagedLogitsParams& p, LogitsType type, int heads,
                                       int device, cudaStream_t stream) {
  int sms = 0;
  const cudaError_t error = multiprocessors(device, &sms);
  if (error != cudaSuccess) return error;
  // As many CTAs as fit at once, no more than there can be blocks.
  const int64_t columns = p.output.columns < int64_t{p.table_width} * kBlockKeys
                              ? p.output.columns
                              : int64_t{p.table_width} * kBlockKeys;
  const int64_t blocks = p.batch * ceil_div(columns, kBlockKeys);
  if (blocks == 0) return cudaSuccess;
  const int64_t resident = int64_t{kPagedCtas} * sms;
  const dim3 grid(static_cast<unsigned>(blocks < resident ? blocks : resident));
  return with_types(type, heads, [&](auto* out, auto head_count) {
    using Out = std::remove_pointer_t<decltype(out)>;
    constexpr int kHeads = decltype(head_count)::value;
    if (p.queries.next_n == 1) {
      constexpr auto kOneRow = paged_logits_kernel<Out, kHeads, true>;
      constexpr int kLess = PagedShared<kHeads>::bytes(1);
      const cudaError_t allowed = allow_shared_memory<kOneRow>(device, kLess);
      if (allowed != cudaSuccess) return allowed;
      return launch_overlapped(kOneRow, grid, kGroupThreads, 1, kLess, stream, p);
    }
    constexpr auto kKernel = paged_logits_kernel<Out, kHeads, false>;
    constexpr int kBytes = PagedShared<kHeads>::bytes(kPagedRows);
    const cudaError_t allowed = allow_shared_memory<kKernel>(device, kBytes);
    if (allowed != cudaSuccess) return allowed;
    return launch_overlapped(kKernel, grid, kGroupThreads, 1, kBytes, stream, p);
  });
}

// Blocks a CTA takes: runs long enough to pay for staging a tile's queries, short enough that the
// device's multiprocessors have several each.
inline int32_t ragged_run(int64_t blocks, int64_t tiles, int sms) {
  constexpr int64_t kShortest = 8, kLongest = 128, kRunsEach = 4;
  int64_t run = ceil_div(blocks * tiles, kRunsEach * sms);
  run = run < kShortest ? kShortest : run > kLongest ? kLongest : run;
  return static_cast<int32_t>(ceil_div(run, kTileGroups) * kTileGroups);
}

inline cudaError_t launch_ragged_logits(const RaggedLogitsParams& p, LogitsType type, int heads,
                                        int device, cudaStream_t stream) {
  int sms = 0;
  const cudaError_t known = multiprocessors(device, &sms);
  if (known != cudaSuccess) return known;
  const int64_t blocks = ceil_div(p.keys, kBlockKeys), tiles = ceil_div(p.rows, kTileRows);
  if (blocks == 0 || tiles == 0 || p.output.columns == 0) return cudaSuccess;
  const int32_t run = ragged_run(blocks, tiles, sms);
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(ceil_div(blocks, run)));
  return with_types(type, heads, [&](auto* out, auto head_count) {
    using Out = std::remove_pointer_t<decltype(out)>;
    constexpr int kHeads = decltype(head_count)::value;
    constexpr auto kKernel = ragged_logits_kernel<Out, kHeads>;
    constexpr int kBytes = TileShared<kHeads>::kBytes;
    const cudaError_t allowed = allow_shared_memory<kKernel>(device, kBytes);
    if (allowed != cudaSuccess) return allowed;
    return launch_overlapped(kKernel, grid, kTileThreads, 1, kBytes, stream, p, run);
  });
}

}  // namespace dsv4
