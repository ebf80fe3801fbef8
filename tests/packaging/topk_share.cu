// Prints bytes_of_share: "multiprocessor reserved most share bytes". Needs no GPU.
#include <cstdio>

#include "dsv4/topk/tuning.cuh"

using namespace dsv4;

int main() {
  for (int kib : {100, 164, 228}) {
    for (int share = 1; share < 8; ++share) {
      const DeviceLimits device{132, 16, (kib - 1) << 10, kib << 10, 1 << 10};
      std::printf("%d %d %d %d %lld\n", device.shared_bytes_sm, device.reserved_bytes,
                  device.shared_bytes, share,
                  static_cast<long long>(bytes_of_share(share, device)));
    }
  }
}
