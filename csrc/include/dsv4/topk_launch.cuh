// Host side: which kernel serves a call, and its launch.
#pragma once

#include <atomic>
#include <cstdint>

#include <cuda_runtime.h>

#include "dsv4/host_launch.cuh"
#include "dsv4/topk_select.cuh"
#include "dsv4/topk_wide.cuh"

namespace dsv4 {

enum class ScoreType { kBfloat16, kFloat16, kFloat32, kNarrowedFloat32 };

// Threads of a CTA of topk_kernel, and the kernel for rows that no cluster holds.
enum class TopkShape : int { k512, k256, kWide };

struct TopkChoice {
  TopkShape shape;
  int cluster;         // CTAs a row
  int32_t solo_units;  // longest row, in units of eight scores, that one CTA of a cluster serves
};

// Units of a row that one CTA can take.
inline int64_t most_units(TopkShape shape) {
  return shape == TopkShape::k512   ? int64_t{512} * kTopkUnitSteps
         : shape == TopkShape::k256 ? int64_t{256} * kTopkUnitSteps
                                    : 0;
}

// Units that the longest row of the call can take. A row may begin anywhere past a 16-byte
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
  int shared_bytes;  // a CTA may ask for
};

constexpr int32_t kSoloUnits = 1024;

// ---- The table of choices -----------------------------------------------------------------------
// From sweeps of every shape and cluster on an H100 (132 multiprocessors), k = 512, 1024, 2048 x
// 1, 8, 16, 32, 64, 128 rows x 8K ... 250K (`python -m dsv4_plugin.testing.topk.sweep`); us at
// k = 512 where nothing else is said, best choice first.
//   - A row of up to 8K is one CTA's: an exchange costs more than it saves (1 x 8K: 3.52, eight
//   CTAs
//     3.99. float32: 5.61; 6.10).
//   - Few rows, up to a sixteenth of the multiprocessors: four CTAs each at 16K (1 x 16K: 4.11; one
//     4.4), 8 above. Sixteen pay for up to four rows only: a device holds seven clusters of that
//     size at once. From 128K on (1 x 250K: 6.12; eight 7.71), float32 from 64K on. 256 threads up
//     to 64K (8 x 32K: 4.30; 512 threads 4.55), of sixteen to 128K (1 x 128K: 5.05; 5.25).
//   - Up to an eighth, eight CTAs of 512 threads do not fit side by side everywhere: six at 64K (16
//   x
//     64K: 5.29; eight 5.45), and 256 threads below and from 256K on (16 x 250K: 9.22; 10.64).
//     float32: four up to 32K, six above (16 x 128K, k 1024: 10.8; eight 13.3).
//   - Up to a quarter: one for 16K (32 x 16K: 4.44; four 4.52), four of 256 for 32K (5.32; two of
//     512 5.55), six of 512 for 64K (6.68; 7.80). Above, four of 256 (32 x 250K: 11.47; three of
//     512 12.57), or six of 512 if k is large (k 2048: 14.49; six of 256 15.49). float32: two for
//     16K (7.0; four 7.2), four for 32K (9.4; two 9.7), above six (32 x 250K: 17.8; two 18.1), or
//     two if k is small, up to 128K (32 x 64K: 11.1; 11.9).
//   - Up to three quarters: two (64 x 64K: 8.59; one 9.41), from 32K on and float32 from 16K (7.15;
//     four of 256 8.71).
//   - Up to one row a multiprocessor: one, unless k is large: two for 32K ... 128K (128 x 32K,
//     k 2048: 8.82; one 11.31), float32 for 16K (k 1024: 9.71; 11.87) and with k above 1024 from
//     64K on (128 x 128K: 50.5; 52.2).
//   - More rows fill the multiprocessors by themselves: one.
//   - float32 has 512 threads everywhere, though 256 would gain 4 to 15 % on full rows of most of
//     these shapes: a row of 8K in a wide buffer is still one CTA's, and the registers of 256
//     threads hold 4K scores of float32 (1 x 8K in 256,000 columns, k 2048: 15.2; at its own
//     width 6.3).
constexpr int64_t k8K = 8192 / kUnit, k16K = 2 * k8K, k32K = 4 * k8K, k64K = 8 * k8K,
                  k128K = 16 * k8K;  // units

struct RowShape {
  int cluster;
  TopkShape shape;
};

// Rows of more than 8K, up to a quarter as many as there are multiprocessors.
inline RowShape few_rows_16bit(int64_t rows, int64_t units, int k, int sms) {
  constexpr TopkShape k512 = TopkShape::k512, k256 = TopkShape::k256;
  if (rows <= 4 && units > k64K) return {16, units <= k128K ? k256 : k512};
  if (rows * 16 <= sms) return {units <= k16K ? 4 : 8, units <= k64K ? k256 : k512};
  if (rows * 8 <= sms) {
    if (units <= k32K) return {units <= k16K ? 4 : 6, k256};
    if (units <= k64K) return {6, k512};
    return {8, units <= k128K ? k512 : k256};
  }
  if (units <= k16K) return {1, k512};
  if (units <= k32K) return {4, k256};
  if (units <= k64K || k > 1024) return {6, k512};
  return {4, k256};
}

inline RowShape few_rows_float32(int64_t rows, int64_t units, int k, int sms) {
  constexpr TopkShape k512 = TopkShape::k512;
  if (rows <= 4 && units > k32K) return {16, k512};
  if (rows * 16 <= sms) return {units <= k16K ? 4 : 8, k512};
  if (rows * 8 <= sms) return {units <= k32K ? 4 : 6, k512};
  if (units <= k16K) return {2, k512};
  if (units <= k32K) return {4, k512};
  return {units <= k128K && k <= 512 ? 2 : 6, k512};
}

inline TopkChoice choose_topk(const TopkParams& p, ScoreType type, const DeviceLimits& device) {
  const int64_t units = most_units(p, type);
  const auto holds = [&](TopkShape shape, int cluster) {
    return ceil_div(units, cluster) <= most_units(shape);
  };
  TopkShape shape = TopkShape::k512;
  int cluster = 1;
  const int64_t rows = p.rows;
  const bool wide_scores = type == ScoreType::kFloat32;
  if (units <= k8K) {
    cluster = 1;
  } else if (rows * 4 <= device.sms) {
    const auto few_rows = wide_scores ? few_rows_float32 : few_rows_16bit;
    const RowShape found = few_rows(rows, units, p.k, device.sms);
    cluster = found.cluster;
    shape = found.shape;
  } else if (rows * 8 <= device.sms * 3) {
    cluster = units > k32K ? 4 : units > k16K || wide_scores ? 2 : 1;
  } else if (rows * 4 <= device.sms * 3) {
    cluster = units > k16K || wide_scores ? 2 : 1;
  } else if (rows <= device.sms && units <= k128K) {
    const bool two =
        wide_scores ? units <= k16K || (units > k32K && p.k > 1024) : units > k16K && p.k > 512;
    cluster = two ? 2 : 1;
  }
  if (cluster > device.largest_cluster) cluster = device.largest_cluster;
  if (!holds(shape, cluster)) shape = TopkShape::k512;
  while (!holds(shape, cluster) && cluster < device.largest_cluster) ++cluster;
  if (!holds(shape, cluster)) shape = TopkShape::kWide;
  return {shape, shape == TopkShape::kWide ? 1 : cluster, kSoloUnits};
}

// Up to this k every thread writes its indices where they belong; more are staged in shared memory
// and written side by side. Staging takes 350 cycles more for k = 512 and 1024 (1 x 8K), and 400 to
// 1,100 less for 2048 (1 and 128 x 8K).
constexpr int kScattered = 1024;

// ---- Launch -------------------------------------------------------------------------------------
// Shared memory of one call, in bytes; fills in the plan's offsets.
template <class Config>
inline size_t shared_bytes(const TopkParams& p, int cluster, int64_t units, TopkPlan* plan) {
  using Policy = typename Config::Policy;
  const int64_t slice = ceil_div(units, cluster);
  const int64_t longest = slice > plan->solo_units ? slice : plan->solo_units;
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
