// The launch of the kernels whose CTA is one warpgroup.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "dsv4/common/launch.cuh"
#include "dsv4/logits/score.cuh"

namespace dsv4 {

// As many CTAs as fit at once, but no more than there are blocks.
template <auto kKernel, class Config, class Params>
inline cudaError_t launch_resident(const Params& p, int64_t blocks, int sms, int device,
                                   cudaStream_t stream) {
  constexpr int kBytes = Config::Shared::kBytes;
  const cudaError_t allowed = allow_shared_memory<kKernel>(device, kBytes);
  if (allowed != cudaSuccess) return allowed;
  const int64_t resident = int64_t{Config::kCtas} * sms;
  const dim3 grid(static_cast<unsigned>(blocks < resident ? blocks : resident));
  return launch_overlapped(kKernel, grid, kGroupThreads, 1, kBytes, stream, p);
}

}  // namespace dsv4
