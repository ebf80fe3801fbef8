// sort=True: the chosen indices, best first, ties by ascending index.
#pragma once

#include <cstdint>

#include "dsv4/common/cluster.cuh"
#include "dsv4/topk/row_units.cuh"

namespace dsv4 {

// `order`: 0 is best. The entry of a score is above 0, which stands for no entry.
__device__ __forceinline__ uint64_t sort_entry(uint32_t order, int32_t index) {
  return (static_cast<uint64_t>(~order) << 32) | (0xffffffffu - static_cast<uint32_t>(index));
}

__device__ __forceinline__ int32_t sort_entry_index(uint64_t entry) {
  return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(entry));
}

// Both are out of line, because they are rare and would push other code out of what a launch
// fetches. Their arguments come by value: a reference would keep the caller's in local memory.

// Bitonic, descending, in shared memory; entries[0, k) are set and visible to the block on entry.
// entries must have room for the next power of two.
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

// Rank 0 writes the answer; this CTA has staged the positions [first, last) of it.
template <class Policy>
static __device__ __noinline__ void sort_slice(RowUnits<Policy> units, const int32_t* staged,
                                               uint64_t* entries, uint32_t first, uint32_t last,
                                               int32_t k, ClusterShape cluster, RowOutput output) {
  for (uint32_t i = first + threadIdx.x; i < last; i += blockDim.x) {
    const uint64_t entry = sort_entry(Policy::sort_order(units.bits(staged[i])), staged[i]);
    if (cluster.size > 1) {
      store_remote(map_shared(entries + i, 0), entry);
    } else {
      entries[i] = entry;
    }
  }
  if (cluster.size > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }
  if (cluster.rank == 0) sort_and_write(entries, k, output);
}

}  // namespace dsv4
