// Checks the lengths of a call's rows and returns them in the kernels' form.
#pragma once

#include <cstdint>

#include "dsv4/common/row_lengths.cuh"
#include "tensor_checks.h"

namespace dsv4 {

inline void check_index_tensor(const char* name, const TensorView& t, DLDevice device) {
  if (!is_index(t)) {
    TVM_FFI_THROW(TypeError) << name << " is " << dtype_name(t.dtype())
                             << "; it must be int32 or int64";
  }
  check_device(name, t, device);
  if (t.ndim() != 1 && t.ndim() != 2) {
    TVM_FFI_THROW(ValueError) << name << " has shape " << shape_name(t)
                              << "; it must be 1-D or 2-D";
  }
}

inline RowLengths row_lengths(const TensorView& lengths, int32_t rows, int64_t next_n,
                              DLDevice device) {
  check_index_tensor("lengths", lengths, device);
  if (next_n < 1 || next_n > INT32_MAX) {
    TVM_FFI_THROW(ValueError) << "next_n is " << next_n << "; it must be at least 1";
  }
  const int64_t count = lengths.numel();
  RowLengths r{};
  int32_t group = 1;
  r.lengths = {data(lengths), is_dtype(lengths, kDLInt, 64)};
  r.stride0 = lengths.stride(0);
  r.stride1 = lengths.ndim() == 2 ? lengths.stride(1) : 0;
  if (count == rows) {
    // One length per row; a 2-D tensor is read row by row.
    group = lengths.ndim() == 2 ? static_cast<int32_t>(lengths.size(1)) : 1;
  } else if (count * next_n == rows && (lengths.ndim() == 1 || lengths.size(1) == 1)) {
    group = static_cast<int32_t>(next_n);
    r.stride1 = 0;
    r.shared = true;
  } else {
    TVM_FFI_THROW(ValueError)
        << "lengths has shape " << shape_name(lengths) << " with " << rows << " rows and next_n "
        << next_n
        << "; it must hold one length a row ([rows] or [batch, next_n]) or one "
           "for each next_n rows ([batch] or [batch, 1])";
  }
  r.group = Divisor::of(group < 1 ? 1 : group);  // 1 without rows: then nothing is launched
  return r;
}

}  // namespace dsv4
