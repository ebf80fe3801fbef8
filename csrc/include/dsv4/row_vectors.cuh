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
  int32_t count;  // vectors; at least one valid element in each

  __device__ __forceinline__ RowVectors(const TopkParams& p, int32_t row, RowWindow window) {
    const Scalar* first =
        static_cast<const Scalar*>(p.logits) + row * p.logits_stride + window.start;
    head = static_cast<int32_t>((reinterpret_cast<uintptr_t>(first) & 15u) / sizeof(Scalar));
    aligned = first - head;
    length = window.length;
    count = static_cast<int32_t>((static_cast<uint32_t>(head) + length + kElems - 1) / kElems);
  }

  __device__ __forceinline__ int32_t index(int32_t g, int e) const { return g * kElems + e - head; }
  __device__ __forceinline__ bool valid(int32_t index) const {
    return static_cast<uint32_t>(index) < static_cast<uint32_t>(length);
  }
  __device__ __forceinline__ bool whole(int32_t g) const {
    return index(g, 0) >= 0 && length - index(g, 0) >= kElems;
  }
  __device__ __forceinline__ uint4 load_whole(int32_t g) const {
    return Policy::load(aligned + static_cast<int64_t>(g) * kElems);
  }
  __device__ __forceinline__ uint4 load_partial(int32_t g) const {
    uint4 v = Policy::pad();
#pragma unroll
    for (int e = 0; e < kElems; ++e) {
      if (valid(index(g, e))) Policy::set(v, e, aligned[static_cast<int64_t>(g) * kElems + e]);
    }
    return v;
  }
};

}  // namespace dsv4
