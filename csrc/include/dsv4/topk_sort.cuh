// sort=True: the chosen indices best first, ties by ascending index.
#pragma once

#include <cstdint>

#include "dsv4/topk_params.cuh"

namespace dsv4 {

// `order`: 0 best. An entry of a score is above 0, which stands for none.
__device__ __forceinline__ uint64_t sort_entry(uint32_t order, int32_t index) {
  return (static_cast<uint64_t>(~order) << 32) | (0xffffffffu - static_cast<uint32_t>(index));
}

__device__ __forceinline__ int32_t sort_entry_index(uint64_t entry) {
  return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(entry));
}

// Bitonic, descending, in shared memory; entries[0, k) are set and visible to the block on entry.
// entries must have room for the next power of two. Out of line: it is rare, and would push other
// code out of what a launch fetches. By value: a reference would keep `output` in local memory.
static __device__ __noinline__ void sort_and_write(uint64_t* entries, int32_t k, RowOutput output) {
  int32_t size = 1;
  while (size < k) size *= 2;
  for (int32_t i = k + threadIdx.x; i < size; i += blockDim.x) entries[i] = 0;
  for (int32_t run = 2; run <= size; run *= 2) {
    for (int32_t gap = run / 2; gap > 0; gap /= 2) {
      __syncthreads();
      for (int32_t t = threadIdx.x; t < size / 2; t += blockDim.x) {
        const int32_t i = 2 * t - (t & (gap - 1));
        const uint64_t a = entries[i];
        const uint64_t b = entries[i + gap];
        if ((a < b) == ((i & run) == 0)) {
          entries[i] = b;
          entries[i + gap] = a;
        }
      }
    }
  }
  __syncthreads();
  for (int32_t i = threadIdx.x; i < k; i += blockDim.x)
    output.write(i, sort_entry_index(entries[i]));
  __syncthreads();  // the caller may fill entries for its next row
}

}  // namespace dsv4
