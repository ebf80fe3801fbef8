// Division of row numbers and indices by a number that the host knows. It takes three instructions.
// A real division takes some forty, and the compiler copies them to every use.
#pragma once

#include <cstdint>

namespace dsv4 {

// With 2^(shift - 1) < d <= 2^shift and m = floor(2^(31 + shift) / d) + 1, n m / 2^(31 + shift)
// exceeds n / d by less than 1 / d for every n < 2^31. So its floor is the floor of n / d. m fits
// in 32 bits.
struct Divisor {
  int32_t value;  // d, at least 1
  uint32_t multiplier;
  int32_t shift;

  static Divisor of(int32_t d) {
    int32_t shift = 0;
    while ((int64_t{1} << shift) < d) ++shift;
    return {d, static_cast<uint32_t>((uint64_t{1} << (31 + shift)) / d + 1), shift};
  }

  // floor(n / d), 0 <= n < 2^31.
  __host__ __device__ __forceinline__ int32_t divide(int32_t n) const {
    const uint64_t product = uint64_t{2u * static_cast<uint32_t>(n)} * multiplier;
    return static_cast<int32_t>(static_cast<uint32_t>(product >> 32) >> shift);
  }
};

}  // namespace dsv4
