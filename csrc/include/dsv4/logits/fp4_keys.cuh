// FP4 keys on their way to the matrix unit: pages as they are in shared memory, a thread's part of
// 64 keys decoded to bfloat16 in its registers, and queries in the order that belongs to that.
//
// A thread has the 32 values of two keys that share a scale: values 32 t ... 32 t + 31 with t =
// lane % 4, sixteen bytes in a row. A product's terms may be added in any order, so an instruction
// takes of every thread the four values that its decoding has beside each other. With w = a word of
// eight codes: step s takes codes 2 (s % 2) + u and that + 4 of word s / 2, u = 0 and 1.
#pragma once

#include <cstdint>

#include "dsv4/common/async_copy.cuh"
#include "dsv4/logits/params.cuh"
#include "dsv4/logits/score.cuh"
#include "dsv4/logits/wgmma_bf16.cuh"

namespace dsv4 {

constexpr int kFp4Heads = 32;
constexpr int kFp4Steps = 128 / kBf16Depth;

// Pages, or pieces of pages, as they are: the values of 64 keys, then their scales. Each warp
// copies and reads its own sixteen keys.
template <int kSlots>
struct Fp4Ring {
  static constexpr int kBytes = kSlots * Fp4Page::kBytes;
  static constexpr int kWarpKeys = 16;

  uint8_t* pages;

  __device__ __forceinline__ explicit Fp4Ring(uint8_t* memory) : pages(memory) {}

  __device__ __forceinline__ static int warp() { return threadIdx.x % kGroupThreads / kWarpSize; }
  // Where the warp's values and scales are in a page, and in a slot.
  __device__ __forceinline__ static int values() { return warp() * kWarpKeys * Fp4Page::kKeyBytes; }
  __device__ __forceinline__ static int scales() {
    return Fp4Page::kScales + warp() * kWarpKeys * Fp4Page::kKeyScales;
  }
  __device__ __forceinline__ uint8_t* slot(int slot) const {
    return pages + slot * Fp4Page::kBytes;
  }

  template <class Page>
  __device__ __forceinline__ void copy_page(int32_t slot, const uint8_t* from, int) const {
    uint8_t* to = this->slot(slot);
#pragma unroll
    for (int turn = 0; turn < kWarpKeys * Fp4Page::kKeyBytes / 16 / kWarpSize; ++turn) {
      const int at = values() + (turn * kWarpSize + lane_id()) * 16;
      copy_chunk(to + at, from + at);
    }
    const int at = scales() + lane_id() * 16;
    if (lane_id() < kWarpKeys * Fp4Page::kKeyScales / 16) copy_chunk(to + at, from + at);
  }
};

__device__ __forceinline__ uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

// A key's 32 values that this thread has, as bfloat16, exactly.
struct Fp4Values {
  uint4 codes;
  uint32_t scale;  // ue8m0: 2^(scale - 127), 255 is NaN

  __device__ __forceinline__ Fp4Values(const uint8_t* slot, int key)
      : codes(*reinterpret_cast<const uint4*>(slot + key * Fp4Page::kKeyBytes +
                                              (lane_id() & 3) * 16)),
        scale(slot[Fp4Page::kScales + key * Fp4Page::kKeyScales + (lane_id() & 3)]) {}

  // Writes registers `first` and `first` + 2 of every step.
  //
  // The bits of a code, s eem, become a bfloat16 with the sign s, the exponent ee and the mantissa
  // m on top: 2^-126 of the code's value, zeros and subnormal numbers included. One multiplication
  // by 2^(scale - 1) makes the value of that, as far as bfloat16 has such a factor; `large` says
  // that some key of the warp needs more than that.
  __device__ __forceinline__ void decode(Bf16Values (&a)[kFp4Steps], int first, bool large) const {
    constexpr uint32_t kMost = 128;
    const uint32_t factor = ((min(scale, kMost) + 126) << 7) * 0x10001;
    const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t low = words[j], high = words[j] >> 8;
      a[2 * j][first] = multiply_bf16x2(even(low), factor);
      a[2 * j][first + 2] = multiply_bf16x2(odd(low), factor);
      a[2 * j + 1][first] = multiply_bf16x2(even(high), factor);
      a[2 * j + 1][first + 2] = multiply_bf16x2(odd(high), factor);
    }
    if (large) {
      const uint32_t rest = max(scale, kMost) - kMost;
      const uint32_t more = (scale == 255 ? 0x7fc0 : (rest + 127) << 7) * 0x10001;
#pragma unroll
      for (int step = 0; step < kFp4Steps; ++step) {
        a[step][first] = multiply_bf16x2(a[step][first], more);
        a[step][first + 2] = multiply_bf16x2(a[step][first + 2], more);
      }
    }
  }

  __device__ __forceinline__ bool large() const { return scale > 128; }

 private:
  static constexpr uint32_t kBits = 0x81c081c0;

  // The codes in bits 0 ... 3, and in bits 4 ... 7, of each half.
  __device__ __forceinline__ static uint32_t even(uint32_t w) {
    return (w & 0x000f000f) * ((1u << 12) + (1u << 6)) & kBits;
  }
  __device__ __forceinline__ static uint32_t odd(uint32_t w) {
    return (w & 0x00f000f0) * ((1u << 8) + (1u << 2)) & kBits;
  }
};

// Queries and weights of kRows rows that are scored together.
template <int kRows>
struct Fp4Rows {
  static constexpr int kHalfBytes = kFp4Heads * 128;  // the values of four steps, swizzled
  static constexpr int kQueryBytes = 2 * kHalfBytes;
  static constexpr int kBytes = kRows * (kQueryBytes + kFp4Heads * 2);

  uint8_t* queries;   // [kRows][2][heads][128], a multiple of kSwizzleBytes
  uint16_t* weights;  // [kRows][heads]

  // Copies one row. Eight values of a query go to four places, in pairs four values apart.
  __device__ __forceinline__ void copy(int row, const uint8_t* query,
                                       const uint8_t* from_weights) const {
    const int thread = threadIdx.x % kGroupThreads;
    uint8_t* to = queries + row * kQueryBytes;
#pragma unroll
    for (int turn = 0; turn < kFp4Heads * 16 / kGroupThreads; ++turn) {
      const int i = turn * kGroupThreads + thread;
      const int t = i % 4, j = i / 4 % 4, head = i / 16;  // of 32 values, and of 8 of those
      const uint4 eight = *reinterpret_cast<const uint4*>(query + head * 256 + t * 64 + j * 16);
      const uint32_t pairs[4] = {
          __byte_perm(eight.x, eight.z, 0x5410), __byte_perm(eight.x, eight.z, 0x7632),
          __byte_perm(eight.y, eight.w, 0x5410), __byte_perm(eight.y, eight.w, 0x7632)};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int step = 2 * j + c / 2, chunk = step % 4 * 2 + c % 2;
        uint8_t* at = to + step / 4 * kHalfBytes + head * 128 + ((chunk ^ (head & 7)) * 16) + t * 4;
        *reinterpret_cast<uint32_t*>(at) = pairs[c];
      }
    }
    if (thread < kFp4Heads) {
      weights[row * kFp4Heads + thread] = reinterpret_cast<const uint16_t*>(from_weights)[thread];
    }
  }
};

}  // namespace dsv4
