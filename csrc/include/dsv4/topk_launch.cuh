// Host side: the launch of the kernel that serves a call.
#pragma once

#include <atomic>
#include <cstdint>

#include <cuda_runtime.h>

#include "dsv4/host_launch.cuh"
#include "dsv4/topk_choice.cuh"
#include "dsv4/topk_select.cuh"
#include "dsv4/topk_wide.cuh"

namespace dsv4 {

// Up to this k every thread writes its indices where they belong; more are staged in shared memory
// and written side by side. Staging takes 350 cycles more for k = 512 and 1024 (1 x 8K), and 400 to
// 1,100 less for 2048 (1 and 128 x 8K).
constexpr int kScattered = 1024;

// Shared memory of one call, in bytes; fills in the plan's offsets.
template <class Config>
inline size_t shared_bytes(const TopkParams& p, int cluster, int64_t units, TopkPlan* plan) {
  using Policy = typename Config::Policy;
  const int64_t slice = ceil_div(units, cluster);
  int64_t longest = slice > plan->solo_units ? slice : plan->solo_units;
  const int64_t of_half = ceil_div(plan->half_units, cluster > 1 ? cluster / 2 : 1);
  if (cluster > 1 && longest < of_half) longest = of_half;
  const int64_t most = units < longest ? units : longest;
  const int64_t steps = ceil_div(most, Config::kThreads);
  if (steps > Config::kHeld) {
    plan->list_steps = static_cast<int32_t>(ceil_div(steps, Config::kBatch)) * Config::kBatch;
    plan->mask_steps = 8;  // a power of two of granules of eight
    while (plan->mask_steps < plan->list_steps) plan->mask_steps *= 2;
  }
  const auto align = [](size_t bytes) { return (bytes + 15) / 16 * 16; };
  size_t bytes =
      sizeof(TopkSmem<Config>) + size_t{Config::kThreads} * plan->mask_steps * sizeof(uint16_t);
  plan->lists = static_cast<uint32_t>(bytes);
  bytes += align(size_t{Config::kThreads} * plan->list_steps * sizeof(uint16_t));
  plan->received = static_cast<uint32_t>(bytes);
  bytes += received_bytes(ThresholdSmem<Policy::kBits>::kRounds, cluster);
  plan->staged = p.sort || p.paged() || p.out_raw != nullptr || p.k > kScattered;
  plan->staging = static_cast<uint32_t>(bytes);
  if (plan->staged) bytes += align(p.k * sizeof(int32_t));
  plan->entries = static_cast<uint32_t>(bytes);
  if (p.sort) {
    size_t entries = 1;
    while (entries < static_cast<size_t>(p.k)) entries *= 2;
    bytes += entries * sizeof(uint64_t);
  }
  const size_t wide = sizeof(TopkSmem<Config>) + TopkWideSmem<Config::kThreads>::bytes(p.sort);
  return bytes > wide ? bytes : wide;
}

// Lets the kernel use what the device has. Once a device.
template <class Config>
inline cudaError_t prepare(int device, const DeviceLimits& limits) {
  static std::atomic<bool> done[kMaxDevices];
  if (done[device].load(std::memory_order_relaxed)) return cudaSuccess;
  cudaError_t error = allow_shared_memory<topk_kernel<Config>>(device, limits.shared_bytes);
  if (error != cudaSuccess) return error;
  if (Config::kCluster) {
    error = cudaFuncSetAttribute(topk_kernel<Config>,
                                 cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
  }
  done[device].store(true, std::memory_order_relaxed);
  return cudaSuccess;
}

template <class Config>
inline cudaError_t launch_kernel(const TopkParams& p, ScoreType type, const TopkChoice& choice,
                                 int device, const DeviceLimits& limits, cudaStream_t stream) {
  const cudaError_t error = prepare<Config>(device, limits);
  if (error != cudaSuccess) return error;
  TopkPlan plan{};
  plan.solo_units = choice.solo_units;
  plan.half_units = choice.half_units;
  const size_t smem = shared_bytes<Config>(p, choice.cluster, most_units(p, type), &plan);
  return launch_overlapped(topk_kernel<Config>,
                           dim3(static_cast<unsigned>(int64_t{p.rows} * choice.cluster)),
                           Config::kThreads, choice.cluster, smem, stream, p, plan);
}

template <class Policy, int kThreads>
inline cudaError_t launch_threads(const TopkParams& p, ScoreType type, const TopkChoice& choice,
                                  int device, const DeviceLimits& limits, cudaStream_t stream) {
  if (choice.cluster > 1) {
    return launch_kernel<TopkConfig<Policy, kThreads, true>>(p, type, choice, device, limits,
                                                             stream);
  }
  return launch_kernel<TopkConfig<Policy, kThreads, false>>(p, type, choice, device, limits,
                                                            stream);
}

template <class Policy>
inline cudaError_t launch_shape(const TopkParams& p, ScoreType type, const TopkChoice& choice,
                                int device, const DeviceLimits& limits, cudaStream_t stream) {
  switch (choice.shape) {
    case TopkShape::k512:
      return launch_threads<Policy, 512>(p, type, choice, device, limits, stream);
    case TopkShape::k256:
      return launch_threads<Policy, 256>(p, type, choice, device, limits, stream);
    case TopkShape::kWide:
      return launch_overlapped(topk_wide_kernel<Policy, 1024>, dim3(p.rows), 1024, 1, 0, stream, p);
  }
  return cudaErrorInvalidValue;
}

inline cudaError_t launch_choice(const TopkParams& p, ScoreType type, const TopkChoice& choice,
                                 int device, const DeviceLimits& limits, cudaStream_t stream) {
  switch (type) {
    case ScoreType::kBfloat16:
      return launch_shape<Bfloat16Keys>(p, type, choice, device, limits, stream);
    case ScoreType::kFloat16:
      return launch_shape<Float16Keys>(p, type, choice, device, limits, stream);
    case ScoreType::kFloat32:
      return launch_shape<Float32Keys>(p, type, choice, device, limits, stream);
    case ScoreType::kNarrowedFloat32:
      return launch_shape<NarrowedFloat32Keys>(p, type, choice, device, limits, stream);
  }
  return cudaErrorInvalidValue;
}

inline cudaError_t device_limits(int device, DeviceLimits* limits) {
  static std::atomic<int> known_cluster[kMaxDevices];
  static std::atomic<int> known_shared[kMaxDevices];
  cudaError_t error = multiprocessors(device, &limits->sms);
  if (error != cudaSuccess) return error;
  limits->largest_cluster = known_cluster[device].load(std::memory_order_relaxed);
  limits->shared_bytes = known_shared[device].load(std::memory_order_relaxed);
  if (limits->largest_cluster > 0 && limits->shared_bytes > 0) return cudaSuccess;
  error = cudaDeviceGetAttribute(&limits->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                 device);
  if (error != cudaSuccess) return error;
  // Clusters of 16 are not portable, so one is tried: the largest shape with the most memory.
  using Probe = TopkConfig<Bfloat16Keys, 512, true>;
  error = prepare<Probe>(device, *limits);
  if (error != cudaSuccess) return error;
  TopkParams largest{};
  largest.k = kTopkMax;
  largest.sort = true;
  TopkPlan plan{};
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {kMaxCluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kMaxCluster);
  config.blockDim = dim3(Probe::kThreads);
  config.dynamicSmemBytes =
      shared_bytes<Probe>(largest, kMaxCluster, int64_t{kMaxCluster} * Probe::kMaxUnits, &plan);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int resident = 0;
  limits->largest_cluster = kMaxCluster;
  if (cudaOccupancyMaxActiveClusters(&resident, topk_kernel<Probe>, &config) != cudaSuccess ||
      resident < 1) {
    cudaGetLastError();  // not an error of the caller's
    limits->largest_cluster = 8;
  }
  known_cluster[device].store(limits->largest_cluster, std::memory_order_relaxed);
  known_shared[device].store(limits->shared_bytes, std::memory_order_relaxed);
  return cudaSuccess;
}

inline cudaError_t launch_topk(const TopkParams& p, ScoreType type, int device,
                               cudaStream_t stream) {
  DeviceLimits limits{};
  const cudaError_t error = device_limits(device, &limits);
  if (error != cudaSuccess) return error;
  return launch_choice(p, type, choose_topk(p, type, limits), device, limits, stream);
}

}  // namespace dsv4
