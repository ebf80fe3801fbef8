// The CTAs that share a row: a cluster, half of one, or one CTA.
#pragma once

#include <cstdint>

#include "dsv4/common/warp.cuh"

namespace dsv4 {

constexpr int kMaxCluster = 16;

struct ClusterShape {
  uint32_t size;
  uint32_t rank;
  uint32_t reciprocal;  // 2^32 / size, rounded up

  static __device__ __forceinline__ ClusterShape alone() { return {1u, 0u, 0u}; }
  static __device__ __forceinline__ ClusterShape of_launch() {
    const uint32_t size = cluster_size();
    return {size, cluster_rank(), 0xffffffffu / size + 1u};
  }
  // x / size, for size above 1 and x * size below 2^32. A real division of 64 bits is a function
  // call, and it would lie between the row's length and its first score.
  __device__ __forceinline__ uint32_t divide(uint32_t x) const { return __umulhi(x, reciprocal); }
  __device__ __forceinline__ uint32_t divide_up(uint32_t x) const { return divide(x + size - 1u); }
  // The first half of the CTAs, for an even size.
  __device__ __forceinline__ ClusterShape half() const {
    return {size / 2u, rank, reciprocal * 2u};
  }
};

}  // namespace dsv4
