// Asynchronous copies from global to shared memory; the calling thread starts them.
#pragma once

#include "dsv4/common/warp.cuh"

namespace dsv4 {

// Copies 16 bytes, past the L1.
__device__ __forceinline__ void copy_chunk(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(to)),
               "l"(from)
               : "memory");
}

// Copies 16 bytes of a piece of keys, without a prefetch of its neighbours to the L2.
__device__ __forceinline__ void copy_piece_chunk(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
               : "memory");
}

__device__ __forceinline__ void copy_word(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from)
               : "memory");
}

__device__ __forceinline__ void copies_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Returns when all but the last n groups of this thread's copies have arrived.
template <int kPending>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace dsv4
