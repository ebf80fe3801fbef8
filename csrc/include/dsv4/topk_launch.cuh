// Host side: which kernel serves a call, and its launch.
#pragma once

#include <atomic>
#include <cstdint>

#include <cuda_runtime.h>

#include "dsv4/topk_cluster.cuh"
#include "dsv4/topk_wide.cuh"

namespace dsv4 {

enum class ScoreType { kBfloat16, kFloat16, kFloat32, kNarrowedFloat32 };

// The compiled shapes of topk_cluster_kernel: threads and vectors a thread.
enum class TopkShape : int { k512x2, k512x4, k512x8, k1024x8, kWide, k256x4, k256x8 };

inline int64_t shape_capacity(TopkShape shape) {
  switch (shape) {
    case TopkShape::k512x2:
      return 512 * 2;
    case TopkShape::k512x4:
      return 512 * 4;
    case TopkShape::k512x8:
      return 512 * 8;
    case TopkShape::k1024x8:
      return 1024 * 8;
    case TopkShape::k256x4:
      return 256 * 4;
    case TopkShape::k256x8:
      return 256 * 8;
    default:
      return 0;
  }
}

struct TopkPlan {
  TopkShape shape;
  int cluster;          // CTAs a row; a power of two
  int64_t solo_length;  // longest row one CTA of a cluster serves alone
  bool persistent;      // clusters for what is resident at once, instead of one a row
};

struct ScoreLayout {
  int elems;        // scores of a 16-byte vector of keys
  int64_t slack;    // scores by which a row may begin past a 16-byte boundary, at most
  int64_t vectors;  // that the longest row can take
};

inline ScoreLayout score_layout(const TopkParams& p, ScoreType type) {
  const int bytes = type == ScoreType::kBfloat16 || type == ScoreType::kFloat16 ? 2 : 4;
  ScoreLayout layout{};
  layout.elems = type == ScoreType::kFloat32 ? 4 : 8;
  const bool aligned = reinterpret_cast<uintptr_t>(p.logits) % 16 == 0 &&
                       (p.rows == 1 || p.logits_stride * bytes % 16 == 0) &&
                       p.row_starts.data == nullptr;
  layout.slack = aligned ? 0 : 16 / bytes - 1;
  layout.vectors = ceil_div(p.columns + layout.slack, layout.elems);
  return layout;
}

struct DeviceLimits {
  int sms;
  int largest_cluster;
};

// ---- The table of choices
// ------------------------------------------------------------------------
inline TopkPlan choose_topk(const TopkParams& p, ScoreType type, const DeviceLimits& device) {
  const ScoreLayout layout = score_layout(p, type);
  const auto slice = [&](int cluster) { return ceil_div(layout.vectors, cluster); };
  int cluster = 1;
  while (cluster < device.largest_cluster && slice(cluster) > 1024 &&
         int64_t{2} * cluster * p.rows <= device.sms) {
    cluster *= 2;
  }
  while (cluster < device.largest_cluster && slice(cluster) > 4096) cluster *= 2;
  TopkPlan plan{};
  plan.cluster = cluster;
  plan.shape = slice(cluster) <= 1024   ? TopkShape::k512x2
               : slice(cluster) <= 2048 ? TopkShape::k512x4
               : slice(cluster) <= 4096 ? TopkShape::k512x8
               : slice(cluster) <= 8192 ? TopkShape::k1024x8
                                        : TopkShape::kWide;
  const int64_t solo = p.rows * 2 > device.sms ? shape_capacity(plan.shape) : 1024;
  plan.solo_length = solo * layout.elems - layout.slack;
  plan.persistent = true;
  return plan;
}

// ---- Launch
// -------------------------------------------------------------------------------------- A launch
// that may start while the previous kernel of the stream drains (griddepcontrol.wait).
template <class... Params>
inline cudaError_t launch_overlapped(void (*kernel)(Params...), int64_t grid, int threads,
                                     int cluster, size_t smem, cudaStream_t stream,
                                     const Params&... params) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = smem;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, params...);
}

constexpr int kMaxDevices = 64;
constexpr int kMaxClusterLog2 = 4;

// How many clusters of this kernel the device holds at once. Asked once per device, cluster size
// and class of call (k up to 512, 1024, 2048; with sort or page table), for the class's largest
// member.
template <class Config>
inline cudaError_t resident_clusters(const TopkParams& p, int device, int cluster, int* count) {
  static std::atomic<int> known[kMaxDevices][kMaxClusterLog2 + 1][3][2];
  int log2 = 0;
  while ((1 << log2) < cluster) ++log2;
  const int k_class = p.k <= 512 ? 0 : p.k <= 1024 ? 1 : 2;
  const bool extra = p.sort || p.page_table != nullptr;
  std::atomic<int>& cell = known[device][log2][k_class][extra];
  *count = cell.load(std::memory_order_relaxed);
  if (*count > 0) return cudaSuccess;

  TopkParams largest{};
  largest.k = 512 << k_class;
  largest.sort = extra;
  const size_t smem = TopkClusterLayout<Config>(largest, cluster).bytes;
  const auto kernel = topk_cluster_kernel<Config>;
  int limit = 0;
  cudaError_t error =
      cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(cluster);
  config.blockDim = dim3(Config::kThreads);
  config.dynamicSmemBytes = smem;
  config.attrs = &attribute;
  config.numAttrs = 1;
  error = cudaOccupancyMaxActiveClusters(count, kernel, &config);
  if (error != cudaSuccess) return error;
  if (*count < 1) return cudaErrorInvalidConfiguration;
  cell.store(*count, std::memory_order_relaxed);
  return cudaSuccess;
}

template <class Config>
inline cudaError_t launch_cluster(const TopkParams& p, const TopkPlan& plan, int device,
                                  cudaStream_t stream) {
  const size_t smem = TopkClusterLayout<Config>(p, plan.cluster).bytes;
  int resident = 0;
  const cudaError_t error = resident_clusters<Config>(p, device, plan.cluster, &resident);
  if (error != cudaSuccess) return error;
  TopkClusterPlan inner{};
  inner.clusters = plan.persistent && resident < p.rows ? resident : p.rows;
  inner.solo_length = static_cast<int32_t>(plan.solo_length);
  return launch_overlapped(topk_cluster_kernel<Config>, int64_t{inner.clusters} * plan.cluster,
                           Config::kThreads, plan.cluster, smem, stream, p, inner);
}

template <class Policy>
inline cudaError_t launch_shape(const TopkParams& p, const TopkPlan& plan, int device,
                                cudaStream_t stream) {
  switch (plan.shape) {
    case TopkShape::k512x2:
      return launch_cluster<TopkClusterConfig<Policy, 512, 2>>(p, plan, device, stream);
    case TopkShape::k512x4:
      return launch_cluster<TopkClusterConfig<Policy, 512, 4>>(p, plan, device, stream);
    case TopkShape::k512x8:
      return launch_cluster<TopkClusterConfig<Policy, 512, 8>>(p, plan, device, stream);
    case TopkShape::k1024x8:
      return launch_cluster<TopkClusterConfig<Policy, 1024, 8>>(p, plan, device, stream);
    case TopkShape::k256x4:
      return launch_cluster<TopkClusterConfig<Policy, 256, 4>>(p, plan, device, stream);
    case TopkShape::k256x8:
      return launch_cluster<TopkClusterConfig<Policy, 256, 8>>(p, plan, device, stream);
    case TopkShape::kWide:
      return launch_overlapped(topk_wide_kernel<Policy>, p.rows, TopkWideSmem::kThreads, 1, 0,
                               stream, p);
  }
  return cudaErrorInvalidValue;
}

inline cudaError_t launch_plan(const TopkParams& p, ScoreType type, const TopkPlan& plan,
                               int device, cudaStream_t stream) {
  switch (type) {
    case ScoreType::kBfloat16:
      return launch_shape<Bfloat16Keys>(p, plan, device, stream);
    case ScoreType::kFloat16:
      return launch_shape<Float16Keys>(p, plan, device, stream);
    case ScoreType::kFloat32:
      return launch_shape<Float32Keys>(p, plan, device, stream);
    case ScoreType::kNarrowedFloat32:
      return launch_shape<NarrowedFloat32Keys>(p, plan, device, stream);
  }
  return cudaErrorInvalidValue;
}

// Multiprocessors, and the largest cluster the device can hold: 16 is not portable, so it is tried.
inline cudaError_t device_limits(int device, DeviceLimits* limits) {
  static std::atomic<int> known_sms[kMaxDevices];
  static std::atomic<int> known_cluster[kMaxDevices];
  if (device < 0 || device >= kMaxDevices) return cudaErrorInvalidDevice;
  limits->sms = known_sms[device].load(std::memory_order_relaxed);
  limits->largest_cluster = known_cluster[device].load(std::memory_order_relaxed);
  if (limits->sms > 0 && limits->largest_cluster > 0) return cudaSuccess;
  const cudaError_t error =
      cudaDeviceGetAttribute(&limits->sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  using Probe = TopkClusterConfig<Bfloat16Keys, 1024, 8>;
  const TopkParams largest = [] {
    TopkParams p{};
    p.k = kTopkMax;
    p.sort = true;
    return p;
  }();
  limits->largest_cluster = 16;
  int resident = 0;
  if (resident_clusters<Probe>(largest, device, 16, &resident) != cudaSuccess) {
    cudaGetLastError();  // not an error of the caller's
    limits->largest_cluster = 8;
  }
  known_cluster[device].store(limits->largest_cluster, std::memory_order_relaxed);
  known_sms[device].store(limits->sms, std::memory_order_relaxed);
  return cudaSuccess;
}

inline cudaError_t launch_topk(const TopkParams& p, ScoreType type, int device,
                               cudaStream_t stream) {
  DeviceLimits limits{};
  const cudaError_t error = device_limits(device, &limits);
  if (error != cudaSuccess) return error;
  return launch_plan(p, type, choose_topk(p, type, limits), device, stream);
}

}  // namespace dsv4
