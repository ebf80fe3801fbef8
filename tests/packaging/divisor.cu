// Divides by Divisor and by the compiler's own division, and prints "divisor dividend quotient" of
// the first difference; else "pairs" and how many there were. Needs no GPU.
#include <cstdint>
#include <cstdio>

#include "dsv4/common/divisor.cuh"

using dsv4::Divisor;

int main() {
  constexpr int64_t kMost = INT32_MAX;
  long long pairs = 0;
  const auto differs = [&](int64_t d, int64_t n) {
    if (d < 1 || d > kMost || n < 0 || n > kMost) return false;
    ++pairs;
    const int32_t q = Divisor::of(static_cast<int32_t>(d)).divide(static_cast<int32_t>(n));
    if (q == n / d) return false;
    std::printf("%lld %lld %d\n", static_cast<long long>(d), static_cast<long long>(n), q);
    return true;
  };
  const auto around_multiples = [&](int64_t d) {
    for (int64_t multiple = 0; multiple <= kMost; multiple = 2 * multiple + d) {
      for (int64_t n = multiple - 1; n <= multiple + 1; ++n) {
        if (differs(d, n)) return true;
      }
    }
    const int64_t last = kMost / d * d;
    return differs(d, last - 1) || differs(d, last) || differs(d, kMost);
  };
  for (int64_t d = 1; d <= 70'000; ++d) {
    if (around_multiples(d)) return 1;
  }
  for (int shift = 17; shift <= 31; ++shift) {
    for (int64_t d = (int64_t{1} << shift) - 70; d <= (int64_t{1} << shift) + 70; ++d) {
      if (d <= kMost && around_multiples(d)) return 1;
    }
  }
  std::printf("pairs %lld\n", pairs);
}
