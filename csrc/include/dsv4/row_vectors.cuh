// A row's window cut into 16-byte-aligned vectors, whatever the alignment of its first score.
#pragma once

#include <cstdint>

#include "dsv4/ordered_key.cuh"
#include "dsv4/topk_params.cuh"

namespace dsv4 {

// Vector g holds the row-local indices [g * kElems - head, (g + 1) * kElems - head). Only the first
// and the last can reach outside [0, length); those are read element by element and padded with
// NaN, so no byte outside the window is ever touched.
template <class Policy>
struct RowVectors {
  using Scalar = typename Policy::Scalar;
  static constexpr int kElems = Policy::kElems;

  const Scalar* aligned;
  int32_t head;
  int32_t length;
  int32_t count;        // vectors; at least one valid element in each
  int32_t whole_begin;  // vectors [whole_begin, whole_end) lie inside the window altogether
  int32_t whole_end;

  __device__ __forceinline__ RowVectors(const TopkParams& p, int32_t row, RowWindow window) {
    const Scalar* first =
        static_cast<const Scalar*>(p.logits) + row * p.logits_stride + window.start;
    head = static_cast<int32_t>((reinterpret_cast<uintptr_t>(first) & 15u) / sizeof(Scalar));
    aligned = first - head;
    length = window.length;
    const uint32_t reach = static_cast<uint32_t>(head) + length;
    count = static_cast<int32_t>((reach + kElems - 1) / kElems);
    whole_begin = head == 0 ? 0 : 1;
    whole_end = static_cast<int32_t>(reach / kElems);
  }

  __device__ __forceinline__ int32_t index(int32_t g, int e) const { return g * kElems + e - head; }
  __device__ __forceinline__ bool valid(int32_t index) const {
    return static_cast<uint32_t>(index) < static_cast<uint32_t>(length);
  }
  __device__ __forceinline__ bool whole(int32_t g) const {
    return g >= whole_begin && g < whole_end;
  }
  // One bit an element of vector g that lies inside the window.
  __device__ __forceinline__ uint32_t valid_mask(int32_t g) const {
    const int32_t low = max(0, head - g * kElems);
    const int32_t high = min(kElems, length - index(g, 0));
    return high <= low ? 0u : (1u << high) - (1u << low);
  }
  __device__ __forceinline__ const Scalar* at(int32_t g) const {
    return aligned + static_cast<int64_t>(g) * kElems;
  }
  __device__ __forceinline__ uint4 load_whole(int32_t g) const { return Policy::load(at(g)); }
  __device__ __forceinline__ uint4 load_partial(int32_t g) const {
    uint4 v = Policy::pad();
#pragma unroll
    for (int e = 0; e < kElems; ++e) {
      if (valid(index(g, e))) Policy::set(v, e, at(g)[e]);
    }
    return v;
  }
};

}  // namespace dsv4
