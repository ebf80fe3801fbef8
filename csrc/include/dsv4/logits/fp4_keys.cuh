// FP4 keys on their way to the matrix unit. A thread loads its part of 64 keys into registers and
// decodes it there to bfloat16. The queries are stored in the matching order.
//
// A thread has the 32 values of two keys that share a scale: values 32 t ... 32 t + 31 with t =
// lane % 4, sixteen consecutive bytes. The terms of a product may be added in any order. So an
// instruction takes, from every thread, the four values that decoding puts side by side: step s
// takes codes 2 (s % 2) + u and the code four further, u = 0 and 1, of word s / 2 of eight codes.
#pragma once

#include <cstdint>

#include "dsv4/common/warp.cuh"
#include "dsv4/logits/params.cuh"
#include "dsv4/logits/score.cuh"
#include "dsv4/logits/wgmma_bf16.cuh"

namespace dsv4 {

constexpr int kFp4Heads = 32;
constexpr int kFp4Steps = 128 / kBf16Depth;

__device__ __forceinline__ uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

// The 32 values of a key that this thread has.
struct Fp4Values {
  uint4 codes;
  uint32_t scale;  // ue8m0: 2^(scale - 127), 255 is NaN

  // Among eight keys of a warp: the offset of this thread's values and scale from the first key.
  __device__ __forceinline__ static int value_offset() { return lane_id() * 16; }
  __device__ __forceinline__ static int scale_offset() { return lane_id(); }

  // Not through the L1, which may hold old lines.
  __device__ __forceinline__ void load(const uint8_t* values, const uint8_t* scales) {
    codes = __ldcg(reinterpret_cast<const uint4*>(values));
    scale = __ldcg(scales);
  }

  // Writes registers `first` and `first` + 2 of every step.
  //
  // The bits of a code, s eem, become a bfloat16 with sign s, exponent ee and m as the top bit of
  // the mantissa. That is 2^-126 times the code's value, zeros and subnormal numbers included. One
  // multiplication by 2^(scale - 1) makes it the value, if bfloat16 has such a factor; otherwise
  // multiply_more() is needed.
  __device__ __forceinline__ void decode(Bf16Values (&a)[kFp4Steps], int first) const {
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
  }

  __device__ __forceinline__ void multiply_more(Bf16Values (&a)[kFp4Steps], int first) const {
    const uint32_t rest = max(scale, kMost) - kMost;
    const uint32_t factor = (scale == 255 ? 0x7fc0 : (rest + 127) << 7) * 0x10001;
#pragma unroll
    for (int step = 0; step < kFp4Steps; ++step) {
      a[step][first] = multiply_bf16x2(a[step][first], factor);
      a[step][first + 2] = multiply_bf16x2(a[step][first + 2], factor);
    }
  }

  static constexpr uint32_t kMost = 128;  // the largest scale that decode() multiplies by

 private:
  static constexpr uint32_t kBits = 0x81c081c0;

  // The codes in bits 0 ... 3 (even), and in bits 4 ... 7, of each half.
  __device__ __forceinline__ static uint32_t even(uint32_t w) {
    return (w & 0x000f000f) * ((1u << 12) + (1u << 6)) & kBits;
  }
  __device__ __forceinline__ static uint32_t odd(uint32_t w) {
    return (w & 0x00f000f0) * ((1u << 8) + (1u << 2)) & kBits;
  }
};

// A thread's part of 64 keys: that of its low_key() and that of the key eight further.
struct Fp4Keys {
  Fp4Values low, high;
  int32_t mark;  // set by the loading code; what it must tell about own_key()

  __device__ __forceinline__ void decode(Bf16Values (&a)[kFp4Steps]) const {
    low.decode(a, 0);
    high.decode(a, 1);
    if (__any_sync(kFullWarp, max(low.scale, high.scale) > Fp4Values::kMost)) {
      low.multiply_more(a, 0);
      high.multiply_more(a, 1);
    }
  }
};

// The shared memory of a CTA: queries and weights of kRows rows that are scored together.
template <int kRows>
struct Fp4Rows {
  static constexpr int kTogether = kRows == 1 ? 1 : 2;            // rows per instruction
  static constexpr int kHalfBytes = kTogether * kFp4Heads * 128;  // of the values of four steps
  static constexpr int kQueryBytes = kFp4Heads * 256;
  static constexpr int kBytes = kRows * (kQueryBytes + kFp4Heads * 2);
  static_assert(kRows % kTogether == 0, "rows are taken in pairs");

  uint8_t* queries;   // [kRows / kTogether][2][kTogether][heads][128], swizzled
  uint16_t* weights;  // [kRows][heads]

  __device__ __forceinline__ explicit Fp4Rows(uint8_t* memory)
      : queries(memory), weights(reinterpret_cast<uint16_t*>(memory + kRows * kQueryBytes)) {}

  // Copies one row. Eight values of a query go to four places, in pairs that lie four values apart.
  __device__ __forceinline__ void copy(int row, const uint8_t* query,
                                       const uint8_t* from_weights) const {
    const int thread = threadIdx.x % kGroupThreads;
    uint8_t* to = queries + row / kTogether * 2 * kHalfBytes + row % kTogether * kFp4Heads * 128;
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
