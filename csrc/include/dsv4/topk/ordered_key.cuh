// Scores as ordered keys, eight per unit.
//
// order(x) is an unsigned integer, 0 is best: order(a) < order(b) exactly when a comes before b in
// a top-k of numbers. -0.0 and +0.0 are one number, though their orders are neighbours; code that
// counts orders first turns -0.0 into +0.0. NaN is no number: it never reaches a bound and never
// passes a comparison.
//
// A policy says how a dtype in memory becomes units of eight scores:
//   Scalar            the score in memory          Unit    eight scores in registers
//   kBits             bits of an order
//   load, pad, set    a whole unit (16-byte aligned); a unit of NaN; one score of a partial unit
//   nan               a score that is not a number
//   kOctave           the number of heads from one power of two to the next
//   set_piece, heads, scalar, reaching    for a list of scores (float32 only): 16 bytes of a unit;
//                     the heads of two of its scores, a packed pair; a score of raw bits; one bit
//                     per score: whether it reaches a threshold
//   pair              maxima of the two halves (or parities) of a unit: a packed pair of heads
//   quarters          maxima of two of its four quarters, likewise
//   add_digit         counts a Digit of the scores' orders
//   add_above         counts how far the scores lie above a bound
//   each_order        visits the eight orders, NaN as -inf and -0.0 as +0.0
//   may_hold          whether one of these orders can be in a range (float32 only)
//   classify          one bit per score: above the threshold; equal to it
//   order_of, raw_of  order of one score, and back
//   bits, element     raw bits of a score in memory, and in a unit
//   sort_order        an order that is the same for equal numbers, NaN last
//
// Histograms have kBins bins, and one more for scores that must not count: an unconditional
// atomicAdd costs a quarter of one behind a branch.
//
// A *head* is the upper 16 bits of a score. Heads order like the scores, but coarsely. They compare
// as bfloat16 or float16 numbers. The hardware maximum ignores NaN unless both operands are NaN;
// then it gives 0x7fff, the best order of all, which only NaN can have.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace dsv4 {

constexpr int kUnit = 8;  // scores per unit
constexpr int kBins = 256;
constexpr int kSink = kBins;           // the bin of scores that must not count
constexpr int kHistogram = kBins + 4;  // words per histogram

// Eight bits of the distance of an order above `base`: those from bit `shift` on. A score counts if
// the bits above them equal `prefix`. Orders of 16 bits have base 0.
struct Digit {
  uint32_t base;
  uint32_t prefix;
  uint32_t shift;
};

__device__ __forceinline__ uint32_t word(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Not ld.global.nc: with an early launch this kernel may run while the scores are still being
// written.
//
// kAnywhere: p may point to shared memory.
template <bool kAnywhere>
__device__ __forceinline__ uint4 load_vector(const void* p) {
  uint4 v;
  if (kAnywhere) {
    asm volatile("ld.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
  } else {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
  }
  return v;
}

__device__ __forceinline__ uint4 all_nan() {
  return make_uint4(0xffffffffu, 0xffffffffu, 0xffffffffu, 0xffffffffu);
}

// 0xffff in every half whose sign bit is set: one PRMT.
__device__ __forceinline__ uint32_t negative_halves(uint32_t pair) {
  uint32_t mask;
  asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(mask) : "r"(pair));
  return mask;
}

// Orders of a packed pair of heads.
__device__ __forceinline__ uint32_t order_pair(uint32_t raw) {
  return raw ^ (~negative_halves(raw) & 0x7fff7fffu);
}

// The head with this 16-bit order, in both halves. The map is its own inverse.
__device__ __forceinline__ uint32_t head_pair(uint32_t order) {
  return (order < 0x8000u ? order ^ 0x7fffu : order) * 0x10001u;
}

// Comparisons and maxima of packed heads.
template <class Pair>
struct Heads {
  static __device__ __forceinline__ const Pair& as(const uint32_t& bits) {
    return reinterpret_cast<const Pair&>(bits);
  }
  static __device__ __forceinline__ uint32_t better(uint32_t a, uint32_t b) {
    const Pair m = __hmax2(as(a), as(b));
    return reinterpret_cast<const uint32_t&>(m);
  }
  // The maxima of two units, given a pair for each, as one packed pair.
  static __device__ __forceinline__ uint32_t unit_maxima(uint32_t pair0, uint32_t pair1) {
    return better(__byte_perm(pair0, pair1, 0x5410), __byte_perm(pair0, pair1, 0x7632));
  }
  // 0xffff in a half where a >= b (a > b). Never for NaN.
  static __device__ __forceinline__ uint32_t reaches(uint32_t a, uint32_t b) {
    return __hge2_mask(as(a), as(b));
  }
  static __device__ __forceinline__ uint32_t above(uint32_t a, uint32_t b) {
    return __hgt2_mask(as(a), as(b));
  }
};

// Four words, each with two masks of 16 bits, as eight bits, element 0 lowest.
__device__ __forceinline__ uint32_t gather_bits(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const uint32_t spread =
      (a & 0x00020001u) | (b & 0x00080004u) | (c & 0x00200010u) | (d & 0x00800040u);
  return (spread | (spread >> 16)) & 0xffu;
}

template <class Pair_, uint32_t kInfinity>
struct Keys16 {
  using Pair = Pair_;
  using H = Heads<Pair>;
  struct Unit {
    uint4 v;
  };
  static constexpr int kBits = 16;
  static constexpr uint32_t kLastOrder = 0x8000u | kInfinity;  // of -inf
  static constexpr uint32_t kLastHead = kLastOrder;
  static constexpr uint32_t kOctave = kInfinity & (~kInfinity + 1u);

  static __device__ __forceinline__ Unit pad() { return {all_nan()}; }
  static __device__ __forceinline__ uint32_t singles(const Unit& u, int i) { return word(u.v, i); }
  static __device__ __forceinline__ uint32_t quarters(const Unit& u, int half) {
    return half == 0 ? H::better(u.v.x, u.v.y) : H::better(u.v.z, u.v.w);
  }
  static __device__ __forceinline__ uint32_t pair(const Unit& u) {
    return H::better(H::better(u.v.x, u.v.y), H::better(u.v.z, u.v.w));
  }
  static __device__ __forceinline__ uint32_t order_of(uint32_t raw) {
    return raw ^ ((raw & 0x8000u) ? 0u : 0x7fffu);
  }
  static __device__ __forceinline__ uint32_t raw_of(uint32_t order) { return order_of(order); }
  static __device__ __forceinline__ bool is_nan(uint32_t raw) {
    return (raw & 0x7fffu) > kInfinity;
  }
  // An order that is the same for equal numbers, NaN last.
  static __device__ __forceinline__ uint32_t sort_order(uint32_t raw) {
    const uint32_t order = order_of(raw);
    return is_nan(raw) ? 0xffffu : order == 0x8000u ? 0x7fffu : order;
  }
  static __device__ __forceinline__ uint32_t element(const Unit& u, int e) {
    return (word(u.v, e / 2) >> (16 * (e & 1))) & 0xffffu;
  }
  static __device__ __forceinline__ void set16(Unit& u, int e, uint32_t bits) {
    uint32_t* w = e < 2 ? &u.v.x : e < 4 ? &u.v.y : e < 6 ? &u.v.z : &u.v.w;
    *w = e & 1 ? (*w & 0xffffu) | (bits << 16) : (*w & 0xffff0000u) | bits;
  }

  // Orders of a word's two scores.
  static __device__ __forceinline__ uint32_t orders(uint32_t w) {
    const uint32_t number = H::better(w, kLastOrder * 0x10001u);
    const Pair canonical = __hadd2(H::as(number), H::as(0u));  // -0.0 becomes +0.0
    return order_pair(reinterpret_cast<const uint32_t&>(canonical));
  }
  template <class F>
  static __device__ __forceinline__ void each_order(const Unit& u, F f) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t o = orders(word(u.v, i));
      f(o & 0xffffu);
      f(o >> 16);
    }
  }
  static __device__ __forceinline__ void add_digit(uint32_t* hist, const Unit& u, const Digit& d) {
    const uint32_t kept = (0xffffu >> d.shift) * 0x10001u;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t rest = (orders(word(u.v, i)) >> d.shift) & kept;
      const uint32_t bins = __vminu2(rest ^ (d.prefix * 0x01000100u), kSink * 0x10001u);
      atomicAdd(hist + (bins & 0xffffu), 1u);
      atomicAdd(hist + (bins >> 16), 1u);
    }
  }
  // Bin 255 - d for a score d steps above the bound, where d is at most 255. Bin 255: not above the
  // bound. Above a positive bound a step is one step of raw bits. Rows with a negative threshold
  // are too common for separate code, because a launch would have to fetch that code too.
  static __device__ __forceinline__ void add_above(uint32_t* hist, const Unit& u, uint32_t bound) {
    const uint32_t raw = raw_of(bound) * 0x10001u;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t number = H::better(word(u.v, i), raw);
      const Pair canonical = __hadd2(H::as(number), H::as(0u));  // -0.0 becomes +0.0
      const uint32_t order = order_pair(reinterpret_cast<const uint32_t&>(canonical));
      const uint32_t distance = bound * 0x10001u - order;
      const uint32_t bins = 0x00ff00ffu - __vminu2(distance, 0x00ff00ffu);
      atomicAdd(hist + (bins & 0xffffu), 1u);
      atomicAdd(hist + (bins >> 16), 1u);
    }
  }
  static __device__ __forceinline__ void classify(const Unit& u, uint32_t threshold,
                                                  uint32_t& above, uint32_t& equal) {
    const uint32_t raw = threshold * 0x10001u;
    above = gather_bits(H::above(u.v.x, raw), H::above(u.v.y, raw), H::above(u.v.z, raw),
                        H::above(u.v.w, raw));
    equal = above ^ gather_bits(H::reaches(u.v.x, raw), H::reaches(u.v.y, raw),
                                H::reaches(u.v.z, raw), H::reaches(u.v.w, raw));
  }
};

struct Bfloat16Keys : Keys16<__nv_bfloat162, 0x7f80u> {
  using Scalar = uint16_t;
  static __device__ __forceinline__ Scalar nan() { return 0xffffu; }
  template <bool kAnywhere = false>
  static __device__ __forceinline__ Unit load(const Scalar* p) {
    return {load_vector<kAnywhere>(p)};
  }
  static __device__ __forceinline__ uint32_t bits(Scalar s) { return s; }
  static __device__ __forceinline__ void set(Unit& u, int e, Scalar s) { set16(u, e, s); }
};

struct Float16Keys : Keys16<__half2, 0x7c00u> {
  using Scalar = uint16_t;
  static __device__ __forceinline__ Scalar nan() { return 0xffffu; }
  template <bool kAnywhere = false>
  static __device__ __forceinline__ Unit load(const Scalar* p) {
    return {load_vector<kAnywhere>(p)};
  }
  static __device__ __forceinline__ uint32_t bits(Scalar s) { return s; }
  static __device__ __forceinline__ void set(Unit& u, int e, Scalar s) { set16(u, e, s); }
};

struct Float32Keys {
  using Pair = __nv_bfloat162;
  using H = Heads<Pair>;
  using Scalar = float;
  struct Unit {
    uint4 low;
    uint4 high;
  };
  static constexpr int kBits = 32;
  static constexpr uint32_t kLastOrder = 0xff800000u;
  static constexpr uint32_t kLastHead = 0xff80u;
  static constexpr uint32_t kOctave = 128;

  static __device__ __forceinline__ float number(uint32_t bits) { return __uint_as_float(bits); }
  static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
    return __float_as_uint(fmaxf(number(a), number(b)));
  }
  static __device__ __forceinline__ Scalar nan() { return __uint_as_float(0xffffffffu); }
  template <bool kAnywhere = false>
  static __device__ __forceinline__ Unit load(const Scalar* p) {
    return {load_vector<kAnywhere>(p), load_vector<kAnywhere>(p + 4)};
  }
  static __device__ __forceinline__ Unit pad() { return {all_nan(), all_nan()}; }
  static __device__ __forceinline__ uint32_t element(const Unit& u, int e) {
    return e < 4 ? word(u.low, e) : word(u.high, e - 4);
  }
  static __device__ __forceinline__ uint32_t bits(Scalar s) { return __float_as_uint(s); }
  static __device__ __forceinline__ void set(Unit& u, int e, Scalar s) {
    uint4& v = e < 4 ? u.low : u.high;
    const int i = e & 3;
    (i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w) = bits(s);
  }
  static __device__ __forceinline__ uint32_t heads(uint32_t a, uint32_t b) {
    return __byte_perm(a, b, 0x7632);
  }
  static __device__ __forceinline__ uint32_t best_of_four(const uint4& v) {
    return larger(larger(v.x, v.y), larger(v.z, v.w));
  }
  // A NaN becomes -inf: the head of some is that of +inf.
  static __device__ __forceinline__ uint32_t singles(const Unit& u, int i) {
    return heads(larger(element(u, 2 * i), kLastOrder), larger(element(u, 2 * i + 1), kLastOrder));
  }
  static __device__ __forceinline__ uint32_t quarters(const Unit& u, int half) {
    const uint4& v = half == 0 ? u.low : u.high;
    return heads(larger(v.x, v.y), larger(v.z, v.w));
  }
  static __device__ __forceinline__ uint32_t pair(const Unit& u) {
    return heads(best_of_four(u.low), best_of_four(u.high));
  }
  static __device__ __forceinline__ uint32_t order_of(uint32_t raw) {
    return raw ^ ((raw & 0x80000000u) ? 0u : 0x7fffffffu);
  }
  static __device__ __forceinline__ uint32_t raw_of(uint32_t order) { return order_of(order); }
  static __device__ __forceinline__ bool is_nan(uint32_t raw) {
    return (raw & 0x7fffffffu) > 0x7f800000u;
  }
  static __device__ __forceinline__ uint32_t sort_order(uint32_t raw) {
    const uint32_t order = order_of(raw);
    return is_nan(raw) ? 0xffffffffu : order == 0x80000000u ? 0x7fffffffu : order;
  }
  static __device__ __forceinline__ void set_piece(Unit& u, int i, uint4 v) {
    (i == 0 ? u.low : u.high) = v;
  }
  static __device__ __forceinline__ uint32_t heads(const Unit& u, int i) {
    return __byte_perm(element(u, 2 * i), element(u, 2 * i + 1), 0x7632);
  }
  static __device__ __forceinline__ Scalar scalar(uint32_t raw) { return __uint_as_float(raw); }
  static __device__ __forceinline__ uint32_t reaching(const Unit& u, uint32_t least) {
    uint32_t found = 0;
#pragma unroll
    for (int e = 0; e < kUnit; ++e) found |= number(element(u, e)) >= number(least) ? 1u << e : 0u;
    return found;
  }
  static __device__ __forceinline__ uint32_t order_above(uint32_t bits, uint32_t bound) {
    return order_of(__float_as_uint(__fadd_rn(number(larger(bits, bound)), 0.0f)));
  }
  template <class F>
  static __device__ __forceinline__ void each_order(const Unit& u, F f) {
#pragma unroll
    for (int e = 0; e < kUnit; ++e) f(order_above(element(u, e), kLastOrder));
  }
  // Whether an order of the unit may lie in [low, high]. If one does, the answer is always true. It
  // costs half of each_order.
  static __device__ __forceinline__ bool may_hold(const Unit& u, uint32_t low, uint32_t high) {
    bool may = high >= kLastOrder - 1;      // NaN counts as -inf
    const uint32_t width = high - low + 1;  // one more: -0.0 counts as +0.0
#pragma unroll
    for (int e = 0; e < kUnit; ++e) may |= order_of(element(u, e)) - low <= width;
    return may;
  }
  static __device__ __forceinline__ void add_digit(uint32_t* hist, const Unit& u, const Digit& d) {
    each_order(u, [&](uint32_t order) {
      const uint32_t rest = (order - d.base) >> d.shift;
      atomicAdd(hist + min(rest ^ (d.prefix << 8), static_cast<uint32_t>(kSink)), 1u);
    });
  }
  // Bin 255 - d for a score in the d-th stretch of 65,536 orders above the bound; d is at most 255.
  static __device__ __forceinline__ void add_above(uint32_t* hist, const Unit& u, uint32_t bound) {
    const uint32_t raw = raw_of(bound);
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
      const uint32_t distance = bound - order_above(element(u, e), raw);
      atomicAdd(hist + 255u - min((distance + 0xffffu) >> 16, 255u), 1u);
    }
  }
  static __device__ __forceinline__ void classify(const Unit& u, uint32_t threshold,
                                                  uint32_t& above, uint32_t& equal) {
    const float t = number(threshold);
    above = equal = 0;
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
      const float x = number(element(u, e));
      above |= x > t ? 1u << e : 0u;
      equal |= x == t ? 1u << e : 0u;
    }
  }
};

}  // namespace dsv4
