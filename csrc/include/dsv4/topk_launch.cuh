// Host side: which kernel serves a call, and its launch.
#pragma once

#include <cuda_runtime.h>

#include "dsv4/topk_wide.cuh"

namespace dsv4 {

enum class ScoreType { kBfloat16, kFloat16, kFloat32, kNarrowedFloat32 };

// A launch that may start while the previous kernel of the stream drains (griddepcontrol.wait).
template <class Kernel>
inline cudaError_t launch_overlapped(Kernel kernel, int grid, int threads, int cluster, size_t smem,
                                     cudaStream_t stream, const TopkParams& p) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = smem;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, p);
}

template <class Policy>
inline cudaError_t launch_wide(const TopkParams& p, cudaStream_t stream) {
  return launch_overlapped(topk_wide_kernel<Policy>, p.rows, TopkWideSmem::kThreads, 1, 0, stream,
                           p);
}

inline cudaError_t launch_topk(const TopkParams& p, ScoreType type, int /*device*/,
                               cudaStream_t stream) {
  switch (type) {
    case ScoreType::kBfloat16:
      return launch_wide<Bfloat16Keys>(p, stream);
    case ScoreType::kFloat16:
      return launch_wide<Float16Keys>(p, stream);
    case ScoreType::kFloat32:
      return launch_wide<Float32Keys>(p, stream);
    case ScoreType::kNarrowedFloat32:
      return launch_wide<NarrowedFloat32Keys>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace dsv4
