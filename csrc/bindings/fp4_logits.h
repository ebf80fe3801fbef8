// The logits of FP4 keys, compiled in a file of their own: bindings/logits.cu calls these.
#pragma once

#include <cuda_runtime.h>

#include "dsv4/logits/params.cuh"

namespace dsv4 {

// Scores, or the maxima of pieces, or both, in bfloat16: `p` has an output for each one wanted.
cudaError_t launch_fp4_logits(const PagedLogitsParams& p, int device, cudaStream_t stream);

// Scores of candidates, in bfloat16.
cudaError_t launch_fp4_logits(const PagedCandidateParams& p, int device, cudaStream_t stream);

}  // namespace dsv4
