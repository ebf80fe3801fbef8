// How much of a kernel's code a launch loads, and what the rest costs
// (docs/notes/topk.md).
//
//   nvcc -std=c++17 -O3 -arch=sm_90a -I csrc/include benchmarks/probes/code_window.cu \
//       -o build/code_window && build/code_window
//
// A kernel jumps over N KB of code that it does not execute. Then it executes eight pieces of 1 KB,
// 1 KB apart. The figure is its time in a CUDA graph, less the time of an empty kernel in its
// place. It is measured in three ways: alone and repeated (warm); after other kernels whose code
// fills the instruction caches; after those kernels and a copy over more memory than the L2 holds,
// so that the code comes from memory. The program prints one line of JSON for each.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include <cuda_runtime.h>

#include "dsv4/common/launch.cuh"
#include "dsv4/common/warp.cuh"

namespace {

constexpr size_t kBytes = size_t{96} << 20;  // more than any L2 of Hopper
constexpr int kRun = 7;                      // the argument with which the fillers are jumped over

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

// kKb KB of code: 64 instructions of 16 bytes a KB, which the compiler has to leave as they are.
template <int kKb>
__device__ __forceinline__ void code(float& v, float a) {
  if constexpr (kKb > 0) {
#pragma unroll
    for (int i = 0; i < 64; ++i) asm volatile("fma.rn.f32 %0, %0, %1, %1;" : "+f"(v) : "f"(a));
    code<kKb - 1>(v, a);
  }
}

template <int kPieces>
__device__ __forceinline__ void pieces(float& v, float a, int run) {
  if constexpr (kPieces > 0) {
    code<1>(v, a);
    if (run != kRun) code<1>(v, a);
    pieces<kPieces - 1>(v, a, run);
  }
}

template <int kSkipKb>
__global__ void jump(float* out, float a, int run) {
  dsv4::pdl_wait();
  float v = static_cast<float>(threadIdx.x);
  if (run != kRun) code<kSkipKb>(v, a);
  pieces<8>(v, a, run);
  if (v == 12345.0f) *out = v;
}

template <int kNumber>
__global__ void other(float* out, float a) {
  dsv4::pdl_wait();
  float v = static_cast<float>(threadIdx.x + kNumber);
  code<32>(v, a);
  if (v == 12345.0f) *out = v;
}

__global__ void empty() { dsv4::pdl_wait(); }

__global__ void copy_over(uint4* memory, size_t count) {
  dsv4::pdl_wait();
  const size_t step = size_t{gridDim.x} * blockDim.x;
  for (size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    uint4 v = memory[i];
    v.x += 1;
    memory[i] = v;
  }
}

struct Probe {
  cudaStream_t stream;
  float* out;
  uint4* memory;

  template <class... Params, class... Args>
  void launch(void (*kernel)(Params...), int blocks, int threads, Args... args) const {
    check(dsv4::launch_overlapped(kernel, dim3(blocks), threads, 1, 0, stream,
                                  static_cast<Params>(args)...));
  }

  template <int kNumber>
  void others() const {
    if constexpr (kNumber > 0) {
      launch(other<kNumber>, 528, 128, out, 1.0f);
      others<kNumber - 1>();
    }
  }

  // Microseconds a repetition of `work`.
  float time(const std::function<void()>& work, int times) const {
    cudaGraph_t graph;
    cudaGraphExec_t instance;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    for (int i = 0; i < times; ++i) work();
    check(cudaStreamEndCapture(stream, &graph));
    check(cudaGraphInstantiate(&instance, graph, 0));
    cudaEvent_t begin, end;
    check(cudaEventCreate(&begin));
    check(cudaEventCreate(&end));
    std::vector<float> us;
    for (int i = 0; i < 12; ++i) {
      check(cudaEventRecord(begin, stream));
      check(cudaGraphLaunch(instance, stream));
      check(cudaEventRecord(end, stream));
      check(cudaEventSynchronize(end));
      float ms = 0;
      check(cudaEventElapsedTime(&ms, begin, end));
      if (i > 0) us.push_back(ms * 1000 / times);
    }
    check(cudaEventDestroy(begin));
    check(cudaEventDestroy(end));
    check(cudaGraphExecDestroy(instance));
    check(cudaGraphDestroy(graph));
    std::sort(us.begin(), us.end());
    return us[us.size() / 2];
  }

  template <int kSkipKb>
  void measure() const {
    const auto call = [&] { launch(jump<kSkipKb>, 64, 256, out, 1.0f, kRun); };
    const auto nothing = [&] { launch(empty, 1, 32); };
    const auto after = [&](auto before) {
      return time([&] { before(), call(); }, 8) - time([&] { before(), nothing(); }, 8);
    };
    const float warm = time(call, 40);
    const float code_in_l2 = after([&] { others<12>(); });
    const float code_in_memory = after([&] {
      launch(copy_over, 1056, 512, memory, kBytes / sizeof(uint4));
      others<12>();
    });
    std::printf("{\"skip_kb\": %d, \"warm_us\": %.2f, \"l2_us\": %.2f, \"memory_us\": %.2f}\n",
                kSkipKb, warm, code_in_l2, code_in_memory);
    std::fflush(stdout);
  }
};

}  // namespace

int main() {
  Probe probe{};
  check(cudaStreamCreate(&probe.stream));
  check(cudaMalloc(&probe.out, sizeof(float)));
  check(cudaMalloc(&probe.memory, kBytes));
  check(cudaMemset(probe.memory, 0, kBytes));
  probe.measure<0>();
  probe.measure<16>();
  probe.measure<32>();
  probe.measure<48>();
  probe.measure<64>();
  probe.measure<96>();
  probe.measure<128>();
  return 0;
}
