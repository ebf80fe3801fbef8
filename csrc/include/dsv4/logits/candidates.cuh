// Index logits of candidates: each row has a list of pieces of 8 keys, and column c of its output
// is key candidates[c / 8] * 8 + c % 8. The keys are in pages (decode) or gathered (prefill).
//
// A CTA is one warpgroup; four fit on a multiprocessor. The work is the rows' blocks of 64 columns
// (eight pieces), laid end to end and shared out evenly. A row's length does not change it. Every
// warp keeps three sets of four blocks in its lanes: candidates with the places of their keys,
// candidates whose pages are on their way, and candidates that are on their way themselves. So it
// waits only once for two dependent loads.
//
// Scores are those of paged.cuh and ragged.cuh bit for bit: the rows of a product do not depend on
// each other, and the heads are added in the same order.
#pragma once

#include <cstdint>

#include "dsv4/logits/params.cuh"
#include "dsv4/logits/pipeline.cuh"
#include "dsv4/logits/work_share.cuh"

namespace dsv4 {

template <int kHeads_>
struct CandidateConfig {
  static constexpr int kHeads = kHeads_, kRows = 1;
  static constexpr int kStages = 4;  // blocks of keys in the ring
  static constexpr int kCtas = 4;    // per multiprocessor
  using Shared = PipelineShared<CandidateConfig>;
};

// ---- Where the keys of a row's pieces are -------------------------------------------------------
//
// length       keys that the row sees
// lookup       begins to find a piece that the row sees
// place        where the piece is, from what lookup returned; below zero: nowhere
// values,      addresses, from a place
// scales
// kWhole       all keys of a piece may be read, even those that the row does not see
// kScaleAlign  the alignment of a piece's scales, in bytes

template <int kPageKeys>
struct PagedPieces {
  using Params = PagedCandidateParams;
  using Page = dsv4::Page<kPageKeys>;
  static constexpr bool kWhole = true;
  static constexpr int kScaleAlign = 16;
  static constexpr int kOfPage = Page::kKeys / kPieceKeys;

  const PagedKeys& keys;
  const int32_t* table;
  int32_t length;
  const uint8_t* query;

  __device__ __forceinline__ PagedPieces(const Params& p, int32_t row) : keys(p.keys) {
    const int32_t request = p.next_n.divide(row);
    table = p.keys.block_table + request * p.keys.table_stride;
    query = p.queries.row(request, row - request * p.next_n.value);
    length = clip_length(p.lengths.of(row), p.columns);
  }

  __device__ __forceinline__ int32_t lookup(int32_t piece) const { return table[piece / kOfPage]; }
  __device__ __forceinline__ int32_t place(int32_t piece, int32_t page) const {
    return keys.exists(page) ? page * kOfPage + piece % kOfPage : -1;
  }
  __device__ __forceinline__ const uint8_t* values(int32_t place) const {
    return keys.page(place / kOfPage) + place % kOfPage * (kPieceKeys * kKeyBytes);
  }
  __device__ __forceinline__ const float* scales(int32_t place) const {
    return reinterpret_cast<const float*>(keys.page(place / kOfPage) + Page::kScales) +
           place % kOfPage * kPieceKeys;
  }
};

struct RaggedPieces {
  using Params = RaggedCandidateParams;
  static constexpr bool kWhole = false;
  static constexpr int kScaleAlign = 4;

  const RaggedKeys& keys;
  int32_t start;
  int32_t length;
  const uint8_t* query;

  __device__ __forceinline__ RaggedPieces(const Params& p, int32_t row) : keys(p.keys) {
    const KeyWindow window(p.keys, row, p.keys.keys);
    start = window.start;
    length = start < 0 ? 0 : window.end - start;  // there are no candidate keys before key 0
    query = p.queries.row(row, 0);
  }

  __device__ __forceinline__ int32_t lookup(int32_t piece) const {
    return start + piece * kPieceKeys;
  }
  __device__ __forceinline__ int32_t place(int32_t, int32_t key) const { return key; }
  __device__ __forceinline__ const uint8_t* values(int32_t key) const {
    return keys.k + int64_t{key} * kKeyBytes;
  }
  __device__ __forceinline__ const float* scales(int32_t key) const { return keys.k_scale + key; }
};

// ---- A row's list -------------------------------------------------------------------------------
//
// The pieces of blocks `first` ... `last` - 1, as far as there are candidates: 32 at a time (four
// blocks) in the lanes of a warp.
template <class Pieces>
class CandidateList {
 public:
  __device__ __forceinline__ CandidateList(const CandidateParams& p, const Pieces& pieces,
                                           int32_t row, int32_t first, int32_t last)
      : p_(p),
        pieces_(pieces),
        candidates_(p.candidates + row * p.candidate_stride),
        at_(first * kPieces + lane_id()),
        end_(last * kPieces),
        row_(row) {
    now_ = load(0);
    next_ = load(1);
    after_ = load(2);
  }

  // Finds the first pieces. A separate step, so that the copies of the rows can begin in between.
  __device__ __forceinline__ void begin() {
    const int32_t found = lookup(now_, at_);
    next_found_ = lookup(next_, at_ + kWarpSize);
    settle(found);
  }

  // Callers ask for turns in ascending order ...
  __device__ __forceinline__ void advance(int32_t turn) {
    if (turn - base_ < kHeld) return;
    base_ += kHeld;
    at_ += kWarpSize;
    before_seen_ = seen_;
    now_ = next_;
    next_ = after_;
    after_ = load(2);
    const int32_t found = next_found_;
    next_found_ = lookup(next_, at_ + kWarpSize);
    settle(found);
  }

  // ... and then for the place of a piece of that block, which is below zero if there is none, and
  // for how many of its keys exist and are seen by the row.
  __device__ __forceinline__ int32_t place(int32_t turn, int piece) const {
    return __shfl_sync(kFullWarp, place_, (turn - base_) * kPieces + piece);
  }
  __device__ __forceinline__ int32_t seen(int32_t turn, int piece) const {
    return __shfl_sync(kFullWarp, seen_, (turn - base_) * kPieces + piece);
  }
  // The number of seen keys, also for a block of the previous four turns.
  __device__ __forceinline__ int32_t recall_seen(int32_t turn, int piece) const {
    const int32_t at = turn - base_;
    return __shfl_sync(kFullWarp, at < 0 ? before_seen_ : seen_,
                       (at & (kHeld - 1)) * kPieces + piece);
  }

 private:
  static constexpr int kHeld = kWarpSize / kPieces;  // blocks

  __device__ __forceinline__ int32_t load(int ahead) const {
    const int32_t at = at_ + ahead * kWarpSize;
    return at < p_.count ? candidates_[at] : -1;
  }

  // The keys of a piece that the row sees. `piece` may be any number.
  __device__ __forceinline__ int32_t visible(int32_t piece) const {
    if (piece < 0 || piece > pieces_.length / kPieceKeys) return 0;
    const int32_t left = pieces_.length - piece * kPieceKeys;
    return left < kPieceKeys ? left : kPieceKeys;
  }

  __device__ __forceinline__ int32_t lookup(int32_t piece, int32_t at) const {
    return at < end_ && visible(piece) > 0 ? pieces_.lookup(piece) : -1;
  }

  // Turns now_, with what lookup found for it, into places.
  __device__ __forceinline__ void settle(int32_t found) {
    const int32_t sees = visible(now_);
    const bool looked_up = at_ < end_ && sees > 0;
    place_ = looked_up ? pieces_.place(now_, found) : -1;
    seen_ = place_ < 0 ? 0 : sees;
    if (p_.out_lengths != nullptr && threadIdx.x < kWarpSize) write_length(sees);
  }

  // Writes the row's columns. The one CTA with the row's last candidate, or with the first column,
  // does it.
  __device__ __forceinline__ void write_length(int32_t sees) const {
    const int32_t beside = __shfl_down_sync(kFullWarp, now_, 1);
    const int32_t beyond = __shfl_sync(kFullWarp, next_, 0);
    const int32_t following = lane_id() == kWarpSize - 1 ? beyond : beside;
    if (at_ >= end_ || at_ >= p_.count) return;
    if (now_ >= 0 ? following < 0 || at_ + 1 == p_.count : at_ == 0) {
      p_.out_lengths[row_] = now_ >= 0 ? at_ * kPieceKeys + sees : 0;
    }
  }

  const CandidateParams& p_;
  const Pieces& pieces_;
  const int32_t* candidates_;
  int32_t at_;   // the index of this lane's candidate in now_
  int32_t end_;  // of the range
  int32_t row_;
  int32_t base_ = 0;
  int32_t now_, next_, after_;  // candidates; -1 past the last
  int32_t next_found_;          // what lookup returned for next_
  int32_t place_, seen_ = 0;    // of now_
  int32_t before_seen_ = 0;
};

// Begins the copy of a block's pieces to a slot of the ring. A turn copies 16 keys, so that all
// lanes of a warp have the same piece in a turn. A missing piece leaves its part of the slot
// unchanged.
template <class Config, class Pieces>
__device__ __forceinline__ void copy_pieces(const PipelineShared<Config>& shared,
                                            const Pieces& pieces, CandidateList<Pieces>& list,
                                            int32_t turn, int slot) {
  const int thread = threadIdx.x % kGroupThreads;
  constexpr int kEach = kGroupThreads * 16 / kKeyBytes;  // keys per turn
  uint8_t* keys = shared.ring.keys + slot * kBlockValues;
  list.advance(turn);
#pragma unroll
  for (int pass = 0; pass < kBlockKeys / kEach; ++pass) {
    const int key = pass * kEach + thread / 8, chunk = thread % 8;
    const int32_t place = list.place(turn, key / kPieceKeys);
    bool wanted = place >= 0;
    if constexpr (!Pieces::kWhole) {
      wanted = key % kPieceKeys < list.seen(turn, key / kPieceKeys);
    }
    if (wanted) {
      copy_piece_chunk(keys + swizzled(key, chunk),
                       pieces.values(place) + key % kPieceKeys * kKeyBytes + chunk * 16);
    }
  }
  float* scales = shared.ring.scales + slot * kBlockKeys;
  constexpr int kScales = Pieces::kScaleAlign / 4;  // per thread
  const int first = thread * kScales;
  const int piece = first / kPieceKeys % kPieces;
  const int32_t place = list.place(turn, piece), seen = list.seen(turn, piece);
  if (first >= kBlockKeys || place < 0) return;
  if constexpr (Pieces::kWhole) {
    copy_piece_chunk(scales + first, pieces.scales(place) + first % kPieceKeys);
  } else if (first % kPieceKeys < seen) {
    copy_word(scales + first, pieces.scales(place) + first % kPieceKeys);
  }
}

// Writes the score of own_key() in a block of a row. `seen`: keys of its piece that the row sees.
template <class Out>
__device__ __forceinline__ void write_piece(const CandidateParams& p, Out* row, int32_t block,
                                            int32_t seen, float score) {
  const int32_t column = block * kBlockKeys + own_key();
  if (writes_score<1>() && column < p.output.columns) {
    round_to(own_key() % kPieceKeys < seen ? score : -INFINITY, row + column);
  }
}

// Blocks first ... last - 1 of a row.
template <class Out, class Config, class Pieces>
__device__ __forceinline__ void score_pieces(const typename Pieces::Params& p, const Pieces& pieces,
                                             CandidateList<Pieces>& list, int32_t row,
                                             int32_t first, int32_t last,
                                             const PipelineShared<Config>& shared) {
  shared.rows.copy(0, pieces.query, p.queries.weights_of(row));
  list.begin();
  const auto copy = [&](int32_t turn, int slot) { copy_pieces(shared, pieces, list, turn, slot); };
  BlockPipeline<Config, decltype(copy)> pipeline(shared, last - first, copy);
  Out* const out = static_cast<Out*>(p.output.out) + row * p.output.stride;
  pipeline.run([&](int32_t turn, const float (&score)[1]) {
    const int32_t seen = list.recall_seen(turn, own_key() / kPieceKeys);
    write_piece<Out>(p, out, first + turn, seen, score[0]);
  });
}

template <class Out, class Config, class Pieces>
__global__ void __launch_bounds__(kGroupThreads, Config::kCtas)
    candidate_logits_kernel(const __grid_constant__ typename Pieces::Params p) {
  extern __shared__ __align__(kSwizzleBytes) uint8_t memory[];
  const typename Config::Shared shared(memory);
  pdl_wait();
  pdl_launch_dependents();

  const uint32_t blocks = (p.count + kPieces - 1) / kPieces;  // per row
  const uint32_t total = p.rows * blocks;
  const uint32_t each = total / gridDim.x, more = total - each * gridDim.x;
  uint32_t block = blockIdx.x * each + (blockIdx.x < more ? blockIdx.x : more);
  const uint32_t end = block + each + (blockIdx.x < more ? 1 : 0);
  bool again = false;
  while (block < end) {
    const int32_t row = static_cast<int32_t>(block / blocks);
    const int32_t first = static_cast<int32_t>(block - row * blocks);
    const int32_t left = static_cast<int32_t>(end - block);
    const int32_t last = min(first + left, static_cast<int32_t>(blocks));
    const Pieces pieces(p, row);
    CandidateList<Pieces> list(p, pieces, row, first, last);
    if (again) __syncthreads();  // no thread still reads the row before
    again = true;
    score_pieces<Out>(p, pieces, list, row, first, last, shared);
    block += last - first;
  }
  copies_wait<0>();
}

}  // namespace dsv4
