// Scores as ordered integer keys, eight or four to a 16-byte vector.
//
// key(a) > key(b) exactly when a orders before b in a top-k: numbers by value, -0.0 equal to +0.0,
// every NaN equal to every other NaN and below -inf. Key 0 is NaN alone, so a vector padded with
// NaN never wins against a number.
//
// A policy says how a dtype in memory becomes vectors of keys:
//   Scalar          the element in memory        Item         an element and its position, packed
//   kElems, kBits   elements of a vector, bits of a key
//   kLowest         key of -inf, the lowest number
//   load, set, pad  a whole vector (16-byte aligned); one element of a partial one; all NaN
//   Best, best, better, best_key       largest element of a vector, without NaN; its key
//   kFine, fine_key                    the same for kFine equal parts of a vector
//   key, bits       key of a raw element, raw bits of a number's key
//   at_least, above element masks: one bit an element that is >= or > a threshold (never for NaN)
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace dsv4 {

__device__ __forceinline__ uint32_t word(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Not ld.global.nc: launched early, this kernel may be alive while the scores are still being
// written.
__device__ __forceinline__ uint4 load_vector(const void* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

__device__ __forceinline__ uint4 all_nan() {
  return make_uint4(0xffffffffu, 0xffffffffu, 0xffffffffu, 0xffffffffu);
}

// Shared half of the 16-bit policies. The hardware maximum ignores NaN unless both operands are.
template <class Pair, uint32_t kInfinity>
struct Keys16 {
  using Item = uint32_t;  // raw score above, position below
  using Best = uint32_t;  // two candidates
  static constexpr int kElems = 8;
  static constexpr int kBits = 16;
  static constexpr int kFine = 4;
  static constexpr uint32_t kLowest = 0x7fffu - kInfinity;

  static __device__ __forceinline__ uint4 pad() { return all_nan(); }
  static __device__ __forceinline__ const Pair& pair(const uint32_t& bits) {
    return reinterpret_cast<const Pair&>(bits);
  }
  static __device__ __forceinline__ uint32_t key(uint32_t bits) {
    uint32_t key = (bits & 0x8000u) ? (~bits & 0xffffu) : (bits | 0x8000u);
    key = key == 0x7fffu ? 0x8000u : key;  // -0.0 ties with +0.0
    return (bits & 0x7fffu) > kInfinity ? 0u : key;
  }
  static __device__ __forceinline__ uint32_t bits(uint32_t key) {
    return ((key & 0x8000u) ? key ^ 0x8000u : ~key & 0xffffu) * 0x10001u;
  }
  static __device__ __forceinline__ uint32_t element(const uint4& v, int e) {
    return (word(v, e / 2) >> (16 * (e & 1))) & 0xffffu;
  }
  static __device__ __forceinline__ Item item(const uint4& v, int e, uint32_t position) {
    return __byte_perm(position, word(v, e / 2), e & 1 ? 0x7610 : 0x5410);
  }
  static __device__ __forceinline__ uint32_t item_key(Item item) { return key(item >> 16); }
  static __device__ __forceinline__ uint32_t item_position(Item item) { return item & 0xffffu; }
  static __device__ __forceinline__ Best better(Best a, Best b) {
    const Pair m = __hmax2(pair(a), pair(b));
    return reinterpret_cast<const uint32_t&>(m);
  }
  static __device__ __forceinline__ Best best(const uint4& v) {
    return better(better(v.x, v.y), better(v.z, v.w));
  }
  static __device__ __forceinline__ uint32_t best_key(Best b) {
    return key(better(b, __byte_perm(b, b, 0x1032)) & 0xffffu);
  }
  static __device__ __forceinline__ uint32_t fine_key(const uint4& v, int part) {
    return best_key(word(v, part));
  }
  // Two masks of 16 bits in one word to eight bits, element 0 lowest.
  static __device__ __forceinline__ uint32_t gather_bits(uint32_t a, uint32_t b, uint32_t c,
                                                         uint32_t d) {
    const uint32_t spread =
        (a & 0x00020001u) | (b & 0x00080004u) | (c & 0x00200010u) | (d & 0x00800040u);
    return (spread | (spread >> 16)) & 0xffu;
  }
  static __device__ __forceinline__ uint32_t at_least(const uint4& v, uint32_t limit) {
    return gather_bits(__hge2_mask(pair(v.x), pair(limit)), __hge2_mask(pair(v.y), pair(limit)),
                       __hge2_mask(pair(v.z), pair(limit)), __hge2_mask(pair(v.w), pair(limit)));
  }
  static __device__ __forceinline__ uint32_t above(const uint4& v, uint32_t limit) {
    return gather_bits(__hgt2_mask(pair(v.x), pair(limit)), __hgt2_mask(pair(v.y), pair(limit)),
                       __hgt2_mask(pair(v.z), pair(limit)), __hgt2_mask(pair(v.w), pair(limit)));
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
  using Item = uint2;  // raw score, position
  using Best = float;
  static constexpr int kElems = 4;
  static constexpr int kBits = 32;
  static constexpr int kFine = 4;
  static constexpr uint32_t kLowest = 0x007fffffu;

  static __device__ __forceinline__ uint4 load(const Scalar* p) { return load_vector(p); }
  static __device__ __forceinline__ uint4 pad() { return all_nan(); }
  static __device__ __forceinline__ void set(uint4& v, int e, Scalar s) {
    const uint32_t bits = __float_as_uint(s);
    if (e == 0) v.x = bits;
    if (e == 1) v.y = bits;
    if (e == 2) v.z = bits;
    if (e == 3) v.w = bits;
  }
  static __device__ __forceinline__ uint32_t key(uint32_t bits) {
    uint32_t key = (bits & 0x80000000u) ? ~bits : (bits | 0x80000000u);
    key = key == 0x7fffffffu ? 0x80000000u : key;
    return (bits & 0x7fffffffu) > 0x7f800000u ? 0u : key;
  }
  static __device__ __forceinline__ uint32_t bits(uint32_t key) {
    return (key & 0x80000000u) ? key ^ 0x80000000u : ~key;
  }
  static __device__ __forceinline__ uint32_t element(const uint4& v, int e) { return word(v, e); }
  static __device__ __forceinline__ Item item(const uint4& v, int e, uint32_t position) {
    return make_uint2(word(v, e), position);
  }
  static __device__ __forceinline__ uint32_t item_key(Item item) { return key(item.x); }
  static __device__ __forceinline__ uint32_t item_position(Item item) { return item.y; }
  static __device__ __forceinline__ Best better(Best a, Best b) { return fmaxf(a, b); }
  static __device__ __forceinline__ Best best(const uint4& v) {
    return fmaxf(fmaxf(__uint_as_float(v.x), __uint_as_float(v.y)),
                 fmaxf(__uint_as_float(v.z), __uint_as_float(v.w)));
  }
  static __device__ __forceinline__ uint32_t best_key(Best b) { return key(__float_as_uint(b)); }
  static __device__ __forceinline__ uint32_t fine_key(const uint4& v, int part) {
    return key(word(v, part));
  }
  static __device__ __forceinline__ uint32_t at_least(const uint4& v, uint32_t limit) {
    const float f = __uint_as_float(limit);
    return (__uint_as_float(v.x) >= f ? 1u : 0u) | (__uint_as_float(v.y) >= f ? 2u : 0u) |
           (__uint_as_float(v.z) >= f ? 4u : 0u) | (__uint_as_float(v.w) >= f ? 8u : 0u);
  }
  static __device__ __forceinline__ uint32_t above(const uint4& v, uint32_t limit) {
    const float f = __uint_as_float(limit);
    return (__uint_as_float(v.x) > f ? 1u : 0u) | (__uint_as_float(v.y) > f ? 2u : 0u) |
           (__uint_as_float(v.z) > f ? 4u : 0u) | (__uint_as_float(v.w) > f ? 8u : 0u);
  }
};

}  // namespace dsv4
