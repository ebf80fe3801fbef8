#include "fp4_logits.h"

#include "dsv4/logits/fp4.cuh"

namespace dsv4 {

cudaError_t launch_fp4_logits(const PagedLogitsParams& p, int device, cudaStream_t stream) {
  return launch_fp4(p, device, stream);
}

cudaError_t launch_fp4_logits(const PagedCandidateParams& p, int device, cudaStream_t stream) {
  return launch_fp4(p, device, stream);
}

}  // namespace dsv4
