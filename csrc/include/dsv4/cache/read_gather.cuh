// Reads of the FP8 indexer cache: dequantise the keys at a list of slots, or gather the keys of
// every sequence. A page is planar: block_size x 128 e4m3 bytes, then block_size float32 scales.
//
// Latency and bytes bound both. A warp takes a fixed number of keys. Its lanes find the keys (slot,
// page, scale: one coalesced load each) and exchange them by shuffles. Then all loads of values are
// in flight before the first store.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include "dsv4/common/warp.cuh"

namespace dsv4 {

constexpr int kHeadDim = 128;
constexpr int kCacheThreads = 256;

struct CacheParams {
  const uint8_t* cache;
  int64_t pages;
  int64_t page_stride;  // bytes, a multiple of 16
  int32_t block_size;
  int32_t block_shift;  // log2(block_size), or -1 if it is no power of two
  int64_t tokens;
  void* out;  // float, bfloat16 or e4m3 [tokens, 128]
  int64_t out_stride;

  const void* slots;  // read: int32 or int64 [tokens]

  const int32_t* block_table;  // gather: [batch, table_width]
  int64_t table_stride;
  int64_t table_width;
  const void* cu_seq_lens;  // int32 or int64 [batch + 1]
  int32_t batch;
  float* scales;  // quantised gather: [tokens]
};

enum class KeyKind : int {
  kKey,
  kZeros,  // padding
  kNan,    // past the end
  kNone,   // nothing is written for this token
};

// Where a key is, and its scale. The scale is still on its way from memory while the lanes exchange
// the places: no instruction uses it before the values have been requested.
struct KeyPlace {
  KeyKind kind;
  const uint8_t* values;
  float scale;
};

constexpr float kQuietNan = __builtin_nanf("");

__device__ __forceinline__ void split_position(const CacheParams& p, int64_t position,
                                               int64_t& page, int64_t& offset) {
  if (p.block_shift >= 0) {
    page = position >> p.block_shift;
    offset = position & (p.block_size - 1);
  } else {
    page = position / p.block_size;
    offset = position - page * p.block_size;
  }
}

__device__ __forceinline__ KeyPlace place_key(const CacheParams& p, int64_t page, int64_t offset) {
  const uint8_t* base = p.cache + page * p.page_stride;
  const auto* scales = reinterpret_cast<const float*>(base + int64_t{p.block_size} * kHeadDim);
  return {KeyKind::kKey, base + offset * kHeadDim, scales[offset]};
}

template <class Slot>
struct SlotKeys {
  // Slot < 0: padding, zeros. Slot past the end: NaN.
  static __device__ __forceinline__ KeyPlace find(const CacheParams& p, int64_t token) {
    if (token >= p.tokens) return {KeyKind::kNone, nullptr, 0.0f};
    const auto slot = static_cast<int64_t>(static_cast<const Slot*>(p.slots)[token]);
    if (slot < 0) return {KeyKind::kZeros, nullptr, 0.0f};
    int64_t page;
    int64_t offset;
    split_position(p, slot, page, offset);
    if (page >= p.pages) return {KeyKind::kNan, nullptr, kQuietNan};
    return place_key(p, page, offset);
  }
};

template <class Length>
struct SequenceKeys {
  // All lanes of a warp call this. The sequence of a token is the number of sequences that end at
  // or before it. The lanes hold 32 ends at a time and compare them with every lane's token.
  static __device__ __forceinline__ KeyPlace find(const CacheParams& p, int64_t token) {
    const auto* ends = static_cast<const Length*>(p.cu_seq_lens) + 1;
    int32_t sequence = 0;
    int64_t start = 0;
    for (int32_t first = 0; first < p.batch; first += kWarpSize) {
      const int32_t mine = first + lane_id();
      const int64_t end = mine < p.batch ? static_cast<int64_t>(ends[mine]) : INT64_MAX;
      const int held = min(kWarpSize, p.batch - first);
      for (int i = 0; i < held; ++i) {
        const int64_t other = __shfl_sync(kFullWarp, end, i);
        if (other <= token) {
          ++sequence;
          start = other;
        }
      }
      // The ends do not decrease. Once the last of 32 lies past every token, no later end counts.
      if (__all_sync(kFullWarp, __shfl_sync(kFullWarp, end, held - 1) > token)) break;
    }
    if (token >= p.tokens || sequence >= p.batch) return {KeyKind::kNone, nullptr, 0.0f};
    int64_t column;
    int64_t offset;
    split_position(p, token - start, column, offset);
    if (column >= p.table_width) return {KeyKind::kNan, nullptr, kQuietNan};
    const int64_t page = p.block_table[sequence * p.table_stride + column];
    if (page < 0) return {KeyKind::kZeros, nullptr, 0.0f};
    if (page >= p.pages) return {KeyKind::kNan, nullptr, kQuietNan};
    return place_key(p, page, offset);
  }
};

__device__ __forceinline__ float2 widen_e4m3x2(uint32_t two) {
  const __half2_raw halves =
      __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(two), __NV_E4M3);
  return __half22float2(__half2(halves));
}

// Four e4m3 bytes times a scale, in float32.
__device__ __forceinline__ float4 widen_e4m3x4(uint32_t four, float scale) {
  const float2 low = widen_e4m3x2(four & 0xffffu);
  const float2 high = widen_e4m3x2(four >> 16);
  return make_float4(low.x * scale, low.y * scale, high.x * scale, high.y * scale);
}

// What a lane loads of a key, and what it stores: 16 bytes of output each.
struct ToFloat32 {
  using Out = float;
  using Word = uint32_t;
  static __device__ __forceinline__ void store(float* row, int part, Word word, float scale) {
    reinterpret_cast<float4*>(row)[part] = widen_e4m3x4(word, scale);
  }
};

struct ToBfloat16 {
  using Out = __nv_bfloat16;
  using Word = uint2;
  static __device__ __forceinline__ void store(Out* row, int part, Word word, float scale) {
    const float4 a = widen_e4m3x4(word.x, scale);
    const float4 b = widen_e4m3x4(word.y, scale);
    union {
      uint4 all;
      __nv_bfloat162 pairs[4];
    } packed;
    packed.pairs[0] = __floats2bfloat162_rn(a.x, a.y);
    packed.pairs[1] = __floats2bfloat162_rn(a.z, a.w);
    packed.pairs[2] = __floats2bfloat162_rn(b.x, b.y);
    packed.pairs[3] = __floats2bfloat162_rn(b.z, b.w);
    reinterpret_cast<uint4*>(row)[part] = packed.all;
  }
};

struct ToQuantised {
  using Out = uint8_t;
  using Word = uint4;
  // A missing key whose scale is NaN is written as the e4m3 NaN.
  static __device__ __forceinline__ void store(Out* row, int part, Word word, float /*scale*/) {
    reinterpret_cast<uint4*>(row)[part] = word;
  }
};

template <class Word>
__device__ __forceinline__ Word filled_word(uint32_t value);
template <>
__device__ __forceinline__ uint32_t filled_word(uint32_t value) {
  return value;
}
template <>
__device__ __forceinline__ uint2 filled_word(uint32_t value) {
  return make_uint2(value, value);
}
template <>
__device__ __forceinline__ uint4 filled_word(uint32_t value) {
  return make_uint4(value, value, value, value);
}

// Keys: SlotKeys or SequenceKeys. Form: what is stored. kRounds: loads in flight per lane.
template <class Keys, class Form, int kRounds>
__global__ void __launch_bounds__(kCacheThreads) index_cache_kernel(const CacheParams p) {
  using Word = typename Form::Word;
  constexpr int kLanesPerKey = kHeadDim / sizeof(Word);
  constexpr int kKeysPerRound = kWarpSize / kLanesPerKey;
  constexpr int kKeys = kRounds * kKeysPerRound;  // per warp
  static_assert(kKeys <= kWarpSize, "each key of a warp is found by one lane");

  pdl_wait();
  pdl_launch_dependents();
  const int lane = lane_id();
  const int64_t warp = int64_t{blockIdx.x} * (kCacheThreads / kWarpSize) + warp_id();
  const int64_t first = warp * kKeys;
  if (first >= p.tokens) return;
  KeyPlace mine = Keys::find(p, lane < kKeys ? first + lane : first);
  if (lane >= kKeys) mine.kind = KeyKind::kNone;

  const int part = lane % kLanesPerKey;
  Word words[kRounds];
  bool live[kRounds];
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int from = round * kKeysPerRound + lane / kLanesPerKey;
    const auto kind =
        static_cast<KeyKind>(__shfl_sync(kFullWarp, static_cast<int>(mine.kind), from));
    const auto values = reinterpret_cast<const Word*>(
        __shfl_sync(kFullWarp, reinterpret_cast<uint64_t>(mine.values), from));
    words[round] = filled_word<Word>(kind == KeyKind::kNan ? 0x7f7f7f7fu : 0u);
    if (kind == KeyKind::kKey) words[round] = values[part];
    live[round] = kind != KeyKind::kNone;
  }
  if (p.scales != nullptr && mine.kind != KeyKind::kNone) p.scales[first + lane] = mine.scale;
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int from = round * kKeysPerRound + lane / kLanesPerKey;
    const float scale = __shfl_sync(kFullWarp, mine.scale, from);
    auto* row = static_cast<typename Form::Out*>(p.out) + (first + from) * p.out_stride;
    if (live[round]) Form::store(row, part, words[round], scale);
  }
}

template <class Keys, class Form, int kRounds>
inline cudaError_t launch_index_cache(const CacheParams& p, cudaStream_t stream) {
  constexpr int kKeys = kRounds * kWarpSize / (kHeadDim / sizeof(typename Form::Word));
  constexpr int kKeysPerCta = kKeys * (kCacheThreads / kWarpSize);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(ceil_div(p.tokens, kKeysPerCta)));
  config.blockDim = dim3(kCacheThreads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, index_cache_kernel<Keys, Form, kRounds>, p);
}

}  // namespace dsv4
