// Host side: the launch of the kernel that serves a call.
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

#include <cuda_runtime.h>

#include "dsv4/common/launch.cuh"
#include "dsv4/topk/candidates.cuh"
#include "dsv4/topk/kernel.cuh"
#include "dsv4/topk/tuning.cuh"
#include "dsv4/topk/wide.cuh"

namespace dsv4 {

// Up to this k every thread writes its indices to their final place. For a larger k they are staged
// in shared memory and written side by side. Staging takes 350 cycles more for k = 512 and 1024 (1
// x 8K), and 400 to 1,100 less for 2048 (1 and 128 x 8K).
constexpr int kScattered = 1024;

// Shared memory of one call, in bytes; fills in the plan's offsets.
template <class Config>
inline size_t shared_bytes(const typename Config::Form::Params& p, int cluster, int64_t units,
                           TopkPlan* plan) {
  using Policy = typename Config::Policy;
  const int64_t slice = ceil_div(units, cluster);
  int64_t longest = slice > plan->solo_units ? slice : plan->solo_units;
  if (plan->half_units > 0) {  // of an even cluster
    const int64_t of_half = ceil_div(plan->half_units, cluster / 2);
    if (longest < of_half) longest = of_half;
  }
  const int64_t most = units < longest ? units : longest;
  const int64_t steps = ceil_div(most, Config::kThreads);
  if (steps > Config::kHeld) {
    plan->list_steps = static_cast<int32_t>(ceil_div(steps, Config::kBatch)) * Config::kBatch;
    if (Config::kGuesses) {
      plan->mask_steps = static_cast<int32_t>(ceil_div(plan->list_steps, 8)) * 8;
    } else {
      plan->mask_steps = 8;  // a power of two of granules of eight
      while (plan->mask_steps < plan->list_steps) plan->mask_steps *= 2;
    }
  }
  const auto align = [](size_t bytes) { return (bytes + 15) / 16 * 16; };
  size_t bytes =
      sizeof(TopkSmem<Config>) + size_t{Config::kThreads} * plan->mask_steps * sizeof(uint16_t);
  plan->lists = static_cast<uint32_t>(bytes);
  size_t lists = align(size_t{Config::kThreads} * plan->list_steps * sizeof(uint16_t));
  if (Config::kGuesses && plan->list_steps > 0) {
    // A good guess lists 1.2 to 1.9 k scores.
    const size_t scores = align((2 * size_t{static_cast<uint32_t>(p.k)} + 1024) * sizeof(uint2));
    lists = lists > scores ? lists : scores;
    plan->list_scores = static_cast<uint32_t>(lists / sizeof(uint2));
  }
  bytes += lists;
  plan->received = static_cast<uint32_t>(bytes);
  bytes += received_bytes(ThresholdSmem<Policy::kBits>::kRounds, cluster);
  plan->staged = p.sort || p.paged() || p.out_raw != nullptr || p.k > kScattered;
  plan->staging = static_cast<uint32_t>(bytes);
  if (plan->staged && !Config::kGuesses) bytes += align(p.k * sizeof(int32_t));
  plan->entries = static_cast<uint32_t>(bytes);
  if (p.sort) {
    size_t entries = 1;
    while (entries < static_cast<size_t>(p.k)) entries *= 2;
    bytes += entries * sizeof(uint64_t);
  }
  const size_t wide = sizeof(TopkSmem<Config>) + TopkWideSmem<Config::kThreads>::bytes(p.sort);
  bytes = bytes > wide ? bytes : wide;
  plan->kept = static_cast<uint32_t>(align(bytes));
  return plan->kept + Config::Form::kept_bytes(p);
}

// Lets the kernel use all that the device has. Once per device.
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

// Clusters of so many CTAs, each with `bytes` of shared memory, that can run at once; 0 if none
// can.
template <class Config>
inline int resident_clusters(int cluster, size_t bytes) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(cluster));
  config.blockDim = dim3(Config::kThreads);
  config.dynamicSmemBytes = bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int resident = 0;
  if (cudaOccupancyMaxActiveClusters(&resident, topk_kernel<Config>, &config) == cudaSuccess) {
    return resident;
  }
  cudaGetLastError();  // clears the error; it is not the caller's
  return 0;
}

// The shared memory that spreads the CTAs of a launch over all multiprocessors, because it leaves
// room for no more than the even share on each; 0 if registers leave no more room anyway.
//
// Otherwise a multiprocessor that is free early takes several CTAs. The CTAs of the logits end one
// after the other, so after them some multiprocessors had two rows and others none (128 x 64K: 17.0
// us, with one each 13.0; 16 x 64K, eight CTAs each: 9.4, spread over six each 6.4).
template <class Config>
inline size_t spreading_bytes(int64_t rows, int cluster, int device, const DeviceLimits& limits) {
  constexpr int kMost = Config::kMinBlocks;  // CTAs per multiprocessor
  // the number of clusters that run, plus one
  static std::atomic<int> known[kMaxDevices][kMaxCluster + 1][kMost];
  for (int64_t share = ceil_div(rows * cluster, limits.sms); share < kMost; ++share) {
    const int64_t bytes = bytes_of_share(share, limits);
    if (cluster == 1) return bytes;
    // A cluster needs its multiprocessors side by side; with a larger share there is room for more.
    std::atomic<int>& clusters = known[device][cluster][share];
    if (clusters.load(std::memory_order_relaxed) == 0) {
      clusters.store(1 + resident_clusters<Config>(cluster, bytes), std::memory_order_relaxed);
    }
    if (clusters.load(std::memory_order_relaxed) > rows) return bytes;
  }
  return 0;
}

template <class Config>
inline cudaError_t launch_kernel(const typename Config::Form::Params& p, ScoreType type,
                                 const TopkChoice& choice, int device, const DeviceLimits& limits,
                                 cudaStream_t stream) {
  const cudaError_t error = prepare<Config>(device, limits);
  if (error != cudaSuccess) return error;
  TopkPlan plan{};
  plan.solo_units = choice.solo_units;
  plan.half_units = choice.half_units;
  const size_t needed = shared_bytes<Config>(p, choice.cluster, most_units(p, type), &plan);
  const size_t spread = spreading_bytes<Config>(p.rows, choice.cluster, device, limits);
  const size_t smem = needed > spread ? needed : spread;
  return launch_overlapped(topk_kernel<Config>,
                           dim3(static_cast<unsigned>(int64_t{p.rows} * choice.cluster)),
                           Config::kThreads, choice.cluster, smem, stream, p, plan);
}

template <class Form, class Policy, int kThreads>
inline cudaError_t launch_threads(const typename Form::Params& p, ScoreType type,
                                  const TopkChoice& choice, int device, const DeviceLimits& limits,
                                  cudaStream_t stream) {
  if (choice.cluster > 1) {
    return launch_kernel<TopkConfig<Policy, kThreads, true, Form>>(p, type, choice, device, limits,
                                                                   stream);
  }
  return launch_kernel<TopkConfig<Policy, kThreads, false, Form>>(p, type, choice, device, limits,
                                                                  stream);
}

template <class Form, class Policy>
inline cudaError_t launch_shape(const typename Form::Params& p, ScoreType type,
                                const TopkChoice& choice, int device, const DeviceLimits& limits,
                                cudaStream_t stream) {
  if (choice.shape == TopkShape::k512) {
    return launch_threads<Form, Policy, 512>(p, type, choice, device, limits, stream);
  }
  if (choice.shape == TopkShape::k256) {
    return launch_threads<Form, Policy, 256>(p, type, choice, device, limits, stream);
  }
  if constexpr (std::is_same_v<Form, RowForm> && std::is_same_v<Policy, Float32Keys>) {
    if (choice.shape == TopkShape::kGuess) {
      return launch_kernel<TopkConfig<Policy, 512, false, Form, true>>(p, type, choice, device,
                                                                       limits, stream);
    }
  }
  if constexpr (std::is_same_v<Form, RowForm>) {
    return launch_overlapped(topk_wide_kernel<Policy, 1024>, dim3(p.rows), 1024, 1, 0, stream, p);
  }
  return cudaErrorInvalidValue;
}

template <class Form>
inline cudaError_t launch_choice(const typename Form::Params& p, ScoreType type,
                                 const TopkChoice& choice, int device, const DeviceLimits& limits,
                                 cudaStream_t stream) {
  switch (type) {
    case ScoreType::kBfloat16:
      return launch_shape<Form, Bfloat16Keys>(p, type, choice, device, limits, stream);
    case ScoreType::kFloat16:
      return launch_shape<Form, Float16Keys>(p, type, choice, device, limits, stream);
    case ScoreType::kFloat32:
      return launch_shape<Form, Float32Keys>(p, type, choice, device, limits, stream);
  }
  return cudaErrorInvalidValue;
}

inline cudaError_t device_limits(int device, DeviceLimits* limits) {
  static std::atomic<int> known_cluster[kMaxDevices];
  static std::atomic<int> known_shared[kMaxDevices][3];
  cudaError_t error = multiprocessors(device, &limits->sms);
  if (error != cudaSuccess) return error;
  limits->largest_cluster = known_cluster[device].load();
  const struct {
    cudaDeviceAttr attribute;
    int* value;
  } shared[3] = {{cudaDevAttrMaxSharedMemoryPerBlockOptin, &limits->shared_bytes},
                 {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &limits->shared_bytes_sm},
                 {cudaDevAttrReservedSharedMemoryPerBlock, &limits->reserved_bytes}};
  for (int i = 0; i < 3; ++i) *shared[i].value = known_shared[device][i].load();
  if (limits->largest_cluster > 0) return cudaSuccess;
  for (int i = 0; i < 3; ++i) {
    error = cudaDeviceGetAttribute(shared[i].value, shared[i].attribute, device);
    if (error != cudaSuccess) return error;
    known_shared[device][i].store(*shared[i].value);
  }
  // Clusters of 16 are not portable, so the code tries one: the largest shape with the most memory.
  using Probe = TopkConfig<Bfloat16Keys, 512, true>;
  error = prepare<Probe>(device, *limits);
  if (error != cudaSuccess) return error;
  TopkParams largest{};
  largest.k = kTopkMax;
  largest.sort = true;
  TopkPlan plan{};
  const size_t most =
      shared_bytes<Probe>(largest, kMaxCluster, int64_t{kMaxCluster} * Probe::kMaxUnits, &plan);
  limits->largest_cluster = resident_clusters<Probe>(kMaxCluster, most) > 0 ? kMaxCluster : 8;
  known_cluster[device].store(limits->largest_cluster);
  return cudaSuccess;
}

template <class Form>
inline cudaError_t launch_topk(const typename Form::Params& p, ScoreType type, int device,
                               cudaStream_t stream) {
  DeviceLimits limits{};
  const cudaError_t error = device_limits(device, &limits);
  if (error != cudaSuccess) return error;
  constexpr bool kCandidates = !std::is_same_v<Form, RowForm>;
  const TopkChoice choice = choose_topk(p, type, limits, kCandidates);
  return launch_choice<Form>(p, type, choice, device, limits, stream);
}

}  // namespace dsv4
