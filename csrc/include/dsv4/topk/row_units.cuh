// A row's window in units of eight scores that start on 16-byte boundaries, whatever the alignment
// of the window's first score.
#pragma once

#include <cstdint>

#include "dsv4/topk/ordered_key.cuh"
#include "dsv4/topk/params.cuh"

namespace dsv4 {

// Unit g holds the row-local indices [8 g - head, 8 g + 8 - head). Only the first and the last unit
// can reach outside [0, length). These two are read score by score and padded with NaN, so no byte
// outside the window is read.
template <class Policy>
struct RowUnits {
  using Scalar = typename Policy::Scalar;
  using Unit = typename Policy::Unit;

  const Scalar* aligned;
  int32_t head;
  int32_t length;
  int32_t count;        // units; each has at least one valid score
  int32_t whole_begin;  // units [whole_begin, whole_end) lie entirely inside the window
  int32_t whole_end;

  // `row`: the row's column 0.
  __device__ __forceinline__ RowUnits(const Scalar* row, RowWindow window) {
    const Scalar* first = row + window.start;
    head = static_cast<int32_t>((reinterpret_cast<uintptr_t>(first) & 15u) / sizeof(Scalar));
    aligned = first - head;
    length = window.length;
    const uint32_t reach = static_cast<uint32_t>(head) + length;
    count = static_cast<int32_t>((reach + kUnit - 1) / kUnit);
    whole_begin = head == 0 ? 0 : 1;
    whole_end = static_cast<int32_t>(reach / kUnit);
  }

  __device__ __forceinline__ int32_t index(int32_t g, int e) const { return g * kUnit + e - head; }
  __device__ __forceinline__ bool valid(int32_t index) const {
    return static_cast<uint32_t>(index) < static_cast<uint32_t>(length);
  }
  __device__ __forceinline__ bool whole(int32_t g) const {
    return g >= whole_begin && g < whole_end;
  }
  __device__ __forceinline__ const Scalar* at(int32_t g) const {
    return aligned + static_cast<int64_t>(g) * kUnit;
  }
  __device__ __forceinline__ Unit load_whole(int32_t g) const { return Policy::load(at(g)); }
  __device__ __forceinline__ Unit load_partial(int32_t g) const {
    Unit u = Policy::pad();
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
      if (valid(index(g, e))) Policy::set(u, e, at(g)[e]);
    }
    return u;
  }
  __device__ __forceinline__ Unit load(int32_t g) const {
    return whole(g) ? load_whole(g) : load_partial(g);
  }

  // The same with the partial units in shared memory, where a warp has put those that it owns. This
  // is much less code than load_partial, which the compiler copies to each use.
  using Edges = Scalar[2][kUnit];  // aligned to 16 bytes

  template <class Owns>
  __device__ __forceinline__ void keep_edges(Edges& edges, Owns owns) const {
    const bool first = !whole(0) && owns(0);
    const bool last = count > 1 && !whole(count - 1) && owns(count - 1);
    if (!first && !last) return;
    const int side = lane_id() / kUnit, e = lane_id() % kUnit;
    if (side == 0 ? first : side == 1 && last) {
      const int32_t g = side == 0 ? 0 : count - 1;
      edges[side][e] = valid(index(g, e)) ? at(g)[e] : Policy::nan();
    }
    __syncwarp();
  }
  __device__ __forceinline__ Unit load(int32_t g, const Edges& edges) const {
    return Policy::template load<true>(whole(g) ? at(g) : edges[g == 0 ? 0 : 1]);
  }
  // Raw bits of one score, by its index in the row, in the dtype of the order.
  __device__ __forceinline__ uint32_t bits(int32_t index) const {
    return Policy::bits(aligned[index + head]);
  }
};

}  // namespace dsv4
