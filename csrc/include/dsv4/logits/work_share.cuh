// The work of a paged call, laid end to end: blocks of 64 keys of request 0, then those of request
// 1, ... The CTAs of the kernel share them evenly, by the lengths on the device. Neither the host
// nor another kernel makes a schedule.
#pragma once

#include <cstdint>

#include "dsv4/common/warp.cuh"
#include "dsv4/logits/params.cuh"

namespace dsv4 {

// Blocks first, first + step, ... below last, for a group of rows.
struct BlockRange {
  int32_t group;
  int32_t first;
  int32_t last;
  int32_t step;
};

__device__ __forceinline__ int32_t clip_length(int64_t length, int32_t most) {
  return static_cast<int32_t>(length < 0 ? 0 : length > most ? most : length);
}

// The rows of a call in groups that share their blocks: the rows of a request, or, with kMost, at
// most kMost of them.
constexpr int kAllRows = 0;

template <int kMost>
struct RowGroups {
  static constexpr bool kCut = kMost > 1;

  const PagedLogitsParams& p;
  int32_t each;   // groups per request
  int32_t count;  // all groups

  __device__ __forceinline__ explicit RowGroups(const PagedLogitsParams& p) : p(p) {
    each = kCut ? (p.queries.next_n + kMost - 1) / kMost : 1;
    count = p.batch * each;
  }

  __device__ __forceinline__ int32_t request(int32_t group) const {
    return kCut && each > 1 ? group / each : group;
  }
  // Rows begin ... end - 1 of the group's request.
  __device__ __forceinline__ int32_t begin(int32_t group) const {
    return kCut && each > 1 ? group % each * kMost : 0;
  }
  __device__ __forceinline__ int32_t end(int32_t group) const {
    if (kMost == 1) return 1;
    return kCut ? min(begin(group) + kMost, p.queries.next_n) : p.queries.next_n;
  }

  // Blocks that the longest row needs.
  __device__ __forceinline__ uint32_t blocks(int32_t group) const {
    const int32_t next_n = kMost == 1 ? 1 : p.queries.next_n;
    const int32_t row = request(group) * next_n, last = end(group) - 1;
    int64_t length = p.lengths.of(row + last);
    if (kMost != 1 && !p.lengths.shared) {
      const int32_t first = begin(group);
#pragma unroll(kCut ? kMost - 1 : 1)  // with few rows all lengths are on their way at the same time
      for (int32_t j = first; j < (kCut ? first + kMost - 1 : last); ++j) {
        const int64_t other = p.lengths.of(row + (kCut ? min(j, last) : j));
        length = other > length ? other : length;
      }
    }
    return static_cast<uint32_t>(ceil_div(clip_length(length, p.columns), kBlockKeys));
  }
};

// Every warp keeps its own copy: lane i of a turn has group `base + i`.
template <int kMost>
class BlockList {
 public:
  __device__ __forceinline__ explicit BlockList(const RowGroups<kMost>& groups) : groups_(groups) {}

  // Blocks of all groups.
  __device__ __forceinline__ uint32_t total() {
    uint32_t sum = 0;
#pragma unroll(RowGroups<kMost>::kCut ? 4 : 1)
    for (int32_t base = 0; base < groups_.count; base += kWarpSize) {
      sum += blocks(base + lane_id());
    }
    if (groups_.count <= kWarpSize) {
      take_turn(0, sum);
      return __shfl_sync(kFullWarp, upto_, kWarpSize - 1);
    }
    sum = __reduce_add_sync(kFullWarp, sum);
    take_turn(0, blocks(lane_id()));
    return sum;
  }

  // The group of block `block` in the list, and its blocks up to `end` of the list. Callers ask for
  // blocks in ascending order. A block past the list (the lengths have changed since total()) gives
  // an empty range.
  __device__ __forceinline__ BlockRange find(uint32_t block, uint32_t end) {
#pragma unroll 1
    while (base_ < groups_.count) {
      const uint32_t holders = __ballot_sync(kFullWarp, before_ + upto_ > block);
      if (holders != 0) {
        const int lane = __ffs(holders) - 1;
        const uint32_t own = __shfl_sync(kFullWarp, own_, lane);
        const uint32_t begin = before_ + __shfl_sync(kFullWarp, upto_, lane) - own;
        const uint32_t last = end - begin < own ? end - begin : own;
        return {base_ + lane, static_cast<int32_t>(block - begin), static_cast<int32_t>(last), 1};
      }
      before_ += __shfl_sync(kFullWarp, upto_, kWarpSize - 1);
      base_ += kWarpSize;
      take_turn(base_, blocks(base_ + lane_id()));
    }
    return {0, 0, 0, 1};
  }

 private:
  __device__ __forceinline__ uint32_t blocks(int32_t group) const {
    return group < groups_.count ? groups_.blocks(group) : 0;
  }

  __device__ __forceinline__ void take_turn(int32_t base, uint32_t own) {
    base_ = base;
    own_ = own;
    upto_ = warp_inclusive_sum(own);
  }

  const RowGroups<kMost>& groups_;
  int32_t base_ = 0;
  uint32_t before_ = 0;  // blocks of the groups before base_
  uint32_t own_ = 0;     // blocks of this lane's group
  uint32_t upto_ = 0;    // blocks of the turn's groups up to this lane's
};

// The pages, kPages per block, of blocks first, first + step, ... in a table row, as far as they
// lie below its entry `end`: 32 pages at a time in the lanes of a warp, the next 32 on their way.
template <int kPages>
class PageNumbers {
 public:
  __device__ __forceinline__ PageNumbers(const int32_t* row, int32_t end, int32_t first,
                                         int32_t step)
      : row_(row),
        end_(end),
        next_entry_((first + lane_id() / kPages * step) * kPages + lane_id() % kPages),
        step_(step) {
    now_ = fetch();
    next_ = fetch();
  }

  // Page `part` of the block `turn` steps from the first. Callers ask for turns in ascending order
  // ...
  __device__ __forceinline__ int32_t get(int32_t turn, int part) {
    if (turn - base_ >= kHeld) {
      base_ += kHeld;
      before_ = now_;
      now_ = next_;
      next_ = fetch();
    }
    return __shfl_sync(kFullWarp, now_, (turn - base_) * kPages + part);
  }

  // ... and may ask again for each of the last 32 pages.
  __device__ __forceinline__ int32_t recall(int32_t turn, int part) const {
    const int32_t at = turn - base_;
    return __shfl_sync(kFullWarp, at < 0 ? before_ : now_, (at & (kHeld - 1)) * kPages + part);
  }

 private:
  static constexpr int kHeld = kWarpSize / kPages;  // blocks

  __device__ __forceinline__ int32_t fetch() {
    const int32_t page = next_entry_ < end_ ? row_[next_entry_] : -1;
    next_entry_ += kWarpSize * step_;
    return page;
  }

  const int32_t* row_;
  int32_t end_;
  int32_t next_entry_;
  int32_t step_;
  int32_t base_ = 0;
  int32_t before_ = -1;
  int32_t now_;
  int32_t next_;
};

}  // namespace dsv4
