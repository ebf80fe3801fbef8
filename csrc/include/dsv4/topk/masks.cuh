// Which scores of a slice lie above the threshold, and which equal it: two bytes per unit, in
// shared memory. The thread that examines a unit sets its mask; the thread that has it in row order
// reads it.
#pragma once

#include <cstdint>

#include "dsv4/common/warp.cuh"

namespace dsv4 {

// A thread owns `granules` 16-byte granules of eight units each. They are stored so that eight
// lanes that read their granule g together have no bank conflict; with kDense in order, which takes
// less memory. A block is half a granule: 32 scores.
template <bool kDense>
struct TopkMasks {
  static constexpr int kGranule = 8;
  static constexpr int kBlock = kGranule / 2;

  uint16_t* masks;   // zero when the row begins
  int32_t granules;  // a power of two if not kDense, so that a thread's granules can trade places
  int32_t shift;

  // depth: units per thread.
  __device__ __forceinline__ TopkMasks(uint16_t* memory, int32_t depth) : masks(memory) {
    const int32_t least = (depth + kGranule - 1) / kGranule;
    shift = least <= 1 ? 0 : 32 - __clz(least - 1);
    granules = kDense ? least : 1 << shift;
  }

  // `unit`: its number in the slice; `above` and `equal` have eight bits each.
  __device__ __forceinline__ void set(int32_t unit, uint32_t above, uint32_t equal) const {
    const int32_t g = unit / kGranule;
    if (kDense) {
      masks[unit] = static_cast<uint16_t>(above | (equal << 8));
      return;
    }
    masks[place(g >> shift, g & (granules - 1)) * kGranule + unit % kGranule] =
        static_cast<uint16_t>(above | (equal << 8));
  }

  // This thread's first unit, and its masks.
  __device__ __forceinline__ int32_t first_unit() const {
    return threadIdx.x * granules * kGranule;
  }
  __device__ __forceinline__ uint4 granule(int32_t g) const {
    return reinterpret_cast<const uint4*>(masks)[place(threadIdx.x, g)];
  }
  __device__ __forceinline__ uint2 block(int32_t b) const {
    return reinterpret_cast<const uint2*>(masks)[2 * place(threadIdx.x, b / 2) + b % 2];
  }

  static __device__ __forceinline__ uint32_t above_of(uint32_t low, uint32_t high) {
    return __byte_perm(low, high, 0x6420);
  }
  static __device__ __forceinline__ uint32_t equal_of(uint32_t low, uint32_t high) {
    return __byte_perm(low, high, 0x7531);
  }
  static __device__ __forceinline__ uint32_t count_above(const uint4& m) {
    return __popc(above_of(m.x, m.y)) + __popc(above_of(m.z, m.w));
  }
  static __device__ __forceinline__ uint32_t count_equal(const uint4& m) {
    return __popc(equal_of(m.x, m.y)) + __popc(equal_of(m.z, m.w));
  }
  // Which of a granule's two blocks have a bit set.
  static __device__ __forceinline__ uint32_t blocks_of(const uint4& m) {
    return ((m.x | m.y) != 0 ? 1u : 0u) | ((m.z | m.w) != 0 ? 2u : 0u);
  }

 private:
  // Where a thread's granule is stored, counted in granules.
  __device__ __forceinline__ int32_t place(int32_t thread, int32_t g) const {
    if (kDense) return thread * granules + g;
    const int32_t turn = shift >= 3 ? thread : thread >> (3 - shift);
    return (thread << shift) + (g ^ (turn & (granules - 1)));
  }
};

}  // namespace dsv4
