// Scores as ordered integer keys, eight or four to a 16-byte vector.
//
// key(a) > key(b) exactly when a orders before b in a top-k: numbers by value, -0.0 equal to +0.0,
// every NaN equal to every other NaN and below -inf. Key 0 is NaN alone (-inf is 0x007f, 0x03ff,
// 0x007fffff), so a vector padded with NaN never wins against a number.
//
// A policy says how a dtype in memory becomes a vector of keys:
//   Scalar   the element in memory          kElems   elements of one vector
//   kBits    width of a key (16 or 32)      load     one whole vector, 16-byte aligned
//   pad/set  build a partial vector         key      ordered key of element e
//   max_key  key of the largest element     kFine, fine_key   the same for kFine equal parts
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace dsv4 {

template <uint32_t kInfinity>
__device__ __forceinline__ uint32_t ordered_key16(uint32_t bits) {
  uint32_t key = (bits & 0x8000u) ? (~bits & 0xffffu) : (bits | 0x8000u);
  key = key == 0x7fffu ? 0x8000u : key;  // -0.0 ties with +0.0
  return (bits & 0x7fffu) > kInfinity ? 0u : key;
}

__device__ __forceinline__ uint32_t ordered_key32(uint32_t bits) {
  uint32_t key = (bits & 0x80000000u) ? ~bits : (bits | 0x80000000u);
  key = key == 0x7fffffffu ? 0x80000000u : key;
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0u : key;
}

__device__ __forceinline__ uint32_t word(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

__device__ __forceinline__ uint4 load_vector(const void* p) {
  return __ldg(static_cast<const uint4*>(p));
}

// Shared half of the 16-bit policies. The hardware maximum ignores NaN unless both operands are.
template <class Pair, uint32_t kInfinity>
struct Keys16 {
  static constexpr int kElems = 8;
  static constexpr int kBits = 16;
  static constexpr int kFine = 4;

  static __device__ __forceinline__ uint4 pad() {
    return make_uint4(0xffffffffu, 0xffffffffu, 0xffffffffu, 0xffffffffu);
  }
  static __device__ __forceinline__ uint32_t key(const uint4& v, int e) {
    return ordered_key16<kInfinity>((word(v, e / 2) >> (16 * (e & 1))) & 0xffffu);
  }
  static __device__ __forceinline__ uint32_t pair_max(uint32_t a, uint32_t b) {
    const Pair m = __hmax2(reinterpret_cast<const Pair&>(a), reinterpret_cast<const Pair&>(b));
    return reinterpret_cast<const uint32_t&>(m);
  }
  static __device__ __forceinline__ uint32_t fine_key(const uint4& v, int part) {
    const uint32_t w = word(v, part);
    return ordered_key16<kInfinity>(pair_max(w, w >> 16) & 0xffffu);
  }
  static __device__ __forceinline__ uint32_t max_key(const uint4& v) {
    const uint32_t m = pair_max(pair_max(v.x, v.y), pair_max(v.z, v.w));
    return ordered_key16<kInfinity>(pair_max(m, m >> 16) & 0xffffu);
  }
  static __device__ __forceinline__ void set16(uint4& v, int e, uint32_t bits) {
    const uint32_t keep = 0xffffu << (16 * ((e & 1) ^ 1));
    const uint32_t put = bits << (16 * (e & 1));
    if (e / 2 == 0) v.x = (v.x & keep) | put;
    if (e / 2 == 1) v.y = (v.y & keep) | put;
    if (e / 2 == 2) v.z = (v.z & keep) | put;
    if (e / 2 == 3) v.w = (v.w & keep) | put;
  }
};

struct Bfloat16Keys : Keys16<__nv_bfloat162, 0x7f80u> {
  using Scalar = uint16_t;
  static __device__ __forceinline__ uint4 load(const Scalar* p) { return load_vector(p); }
  static __device__ __forceinline__ void set(uint4& v, int e, Scalar s) { set16(v, e, s); }
};

struct Float16Keys : Keys16<__half2, 0x7c00u> {
  using Scalar = uint16_t;
  static __device__ __forceinline__ uint4 load(const Scalar* p) { return load_vector(p); }
  static __device__ __forceinline__ void set(uint4& v, int e, Scalar s) { set16(v, e, s); }
};

// float32 in memory, selected as if it had been rounded to bfloat16 (nearest even) beforehand.
struct NarrowedFloat32Keys : Keys16<__nv_bfloat162, 0x7f80u> {
  using Scalar = float;
  static __device__ __forceinline__ uint32_t pack(uint32_t low, uint32_t high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(__uint_as_float(low), __uint_as_float(high));
    return reinterpret_cast<const uint32_t&>(pair);
  }
  static __device__ __forceinline__ uint4 load(const Scalar* p) {
    const uint4 a = load_vector(p);
    const uint4 b = load_vector(p + 4);
    return make_uint4(pack(a.x, a.y), pack(a.z, a.w), pack(b.x, b.y), pack(b.z, b.w));
  }
  static __device__ __forceinline__ void set(uint4& v, int e, Scalar s) {
    set16(v, e, pack(__float_as_uint(s), 0u) & 0xffffu);
  }
};

struct Float32Keys {
  using Scalar = float;
  static constexpr int kElems = 4;
  static constexpr int kBits = 32;
  static constexpr int kFine = 4;

  static __device__ __forceinline__ uint4 load(const Scalar* p) { return load_vector(p); }
  static __device__ __forceinline__ uint4 pad() {
    return make_uint4(0xffffffffu, 0xffffffffu, 0xffffffffu, 0xffffffffu);
  }
  static __device__ __forceinline__ void set(uint4& v, int e, Scalar s) {
    const uint32_t bits = __float_as_uint(s);
    if (e == 0) v.x = bits;
    if (e == 1) v.y = bits;
    if (e == 2) v.z = bits;
    if (e == 3) v.w = bits;
  }
  static __device__ __forceinline__ uint32_t key(const uint4& v, int e) {
    return ordered_key32(word(v, e));
  }
  static __device__ __forceinline__ uint32_t fine_key(const uint4& v, int part) {
    return key(v, part);
  }
  static __device__ __forceinline__ uint32_t max_key(const uint4& v) {
    const float m = fmaxf(fmaxf(__uint_as_float(v.x), __uint_as_float(v.y)),
                          fmaxf(__uint_as_float(v.z), __uint_as_float(v.w)));
    return ordered_key32(__float_as_uint(m));
  }
};

}  // namespace dsv4
