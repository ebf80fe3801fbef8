// Host side of every launch: the limits of the device, and a launch that may begin while the
// previous kernel in the stream still runs (programmatic dependent launch; the kernel itself waits,
// see pdl_wait).
#pragma once

#include <atomic>
#include <cstdint>

#include <cuda_runtime.h>

namespace dsv4 {

constexpr int kMaxDevices = 64;

inline cudaError_t multiprocessors(int device, int* count) {
  static std::atomic<int> known[kMaxDevices];
  if (device < 0 || device >= kMaxDevices) return cudaErrorInvalidDevice;
  *count = known[device].load(std::memory_order_relaxed);
  if (*count > 0) return cudaSuccess;
  const cudaError_t error = cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) known[device].store(*count, std::memory_order_relaxed);
  return error;
}

// Lets a kernel use `bytes` of dynamic shared memory, the same for every launch of the kernel. It
// is set once per device.
//
// A multiprocessor changes the split of its memory into L1 and shared memory only when it is idle.
// The selection follows the logits, so both ask for the same split: the most shared memory.
// (docs/notes/logits.md reports that their chain did not become faster by it.)
template <auto kKernel>
inline cudaError_t allow_shared_memory(int device, int bytes) {
  static std::atomic<bool> done[kMaxDevices];
  if (done[device].load(std::memory_order_relaxed)) return cudaSuccess;
  cudaError_t error =
      cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared);
  if (error == cudaSuccess) done[device].store(true, std::memory_order_relaxed);
  return error;
}

template <class... Params>
inline cudaError_t launch_overlapped(void (*kernel)(Params...), dim3 grid, int threads, int cluster,
                                     size_t smem, cudaStream_t stream, const Params&... params) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = smem;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, params...);
}

}  // namespace dsv4
