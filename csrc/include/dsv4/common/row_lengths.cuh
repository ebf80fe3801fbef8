// How many columns a row has: one length per row, or one per request whose next_n rows end one
// column apart.
#pragma once

#include <cstdint>

#include "dsv4/common/divisor.cuh"

namespace dsv4 {

// Integers of 32 or 64 bits behind one pointer; strides in elements.
struct IntTensor {
  const void* data;
  bool is_int64;

  __device__ __forceinline__ int64_t operator[](int64_t i) const {
    return is_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }

  // From the L2: a line in an L1 may be older than what the kernels that have ended wrote.
  __device__ __forceinline__ int64_t from_l2(int64_t i) const {
    return is_int64 ? __ldcg(static_cast<const long long*>(data) + i)
                    : __ldcg(static_cast<const int32_t*>(data) + i);
  }
};

// length(row) = lengths[row / group, row % group]. If the engine keeps one length for its `group`
// rows, it is lengths[row / group] - group + 1 + row % group. It is not clipped.
struct RowLengths {
  IntTensor lengths;
  int64_t stride0;
  int64_t stride1;
  Divisor group;
  bool shared;

  // The address of a row's length: computed before griddepcontrol.wait, read after it.
  struct Place {
    int64_t at;
    int32_t adjust;
  };

  __device__ __forceinline__ Place place(int32_t row) const {
    const int32_t request = group.divide(row);
    const int32_t member = row - request * group.value;
    return {request * stride0 + member * stride1, shared ? member + 1 - group.value : 0};
  }

  __device__ __forceinline__ int64_t read(const Place& place) const {
    return lengths[place.at] + place.adjust;
  }

  __device__ __forceinline__ int64_t read_from_l2(const Place& place) const {
    return lengths.from_l2(place.at) + place.adjust;
  }

  __device__ __forceinline__ int64_t of(int32_t row) const { return read(place(row)); }
};

}  // namespace dsv4
