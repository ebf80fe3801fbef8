// Argument checks shared by the bindings. Each error names the argument, what came and what is
// allowed.
#pragma once

#include <cstdint>
#include <string>

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>

namespace dsv4 {

using tvm::ffi::TensorView;

inline std::string dtype_name(DLDataType t) {
  std::string name = t.code == kDLInt      ? "int"
                     : t.code == kDLUInt   ? "uint"
                     : t.code == kDLFloat  ? "float"
                     : t.code == kDLBfloat ? "bfloat"
                     : t.code == kDLBool   ? "bool"
                                           : "dtype code " + std::to_string(t.code) + " x ";
  name += std::to_string(t.bits);
  return t.lanes == 1 ? name : name + "x" + std::to_string(t.lanes);
}

inline std::string device_name(DLDevice d) {
  const std::string kind = d.device_type == kDLCUDA ? "cuda"
                           : d.device_type == kDLCPU
                               ? "cpu"
                               : "device type " + std::to_string(d.device_type);
  return kind + ":" + std::to_string(d.device_id);
}

inline std::string shape_name(const TensorView& t) {
  std::string name = "[";
  for (int i = 0; i < t.ndim(); ++i) name += (i ? ", " : "") + std::to_string(t.size(i));
  return name + "]";
}

inline const void* data(const TensorView& t) {
  return static_cast<char*>(t.data_ptr()) + t.byte_offset();
}

inline bool is_dtype(const TensorView& t, int code, int bits) {
  const DLDataType d = t.dtype();
  return d.code == code && d.bits == bits && d.lanes == 1;
}

inline bool is_index(const TensorView& t) {
  return is_dtype(t, kDLInt, 32) || is_dtype(t, kDLInt, 64);
}

inline void check_device(const char* name, const TensorView& t, DLDevice want) {
  const DLDevice d = t.device();
  if (d.device_type != want.device_type || d.device_id != want.device_id) {
    TVM_FFI_THROW(ValueError) << name << " is on " << device_name(d)
                              << "; every argument of this call must be on " << device_name(want);
  }
}

inline void check_aligned(const char* name, const void* data, int64_t stride_bytes) {
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || stride_bytes % 16 != 0) {
    TVM_FFI_THROW(ValueError) << name << " must start at, and have a row stride of, a multiple of "
                              << "16 bytes; the stride is " << stride_bytes;
  }
}

inline void check_int32_rows(const char* name, const TensorView& t, DLDevice device) {
  if (!is_dtype(t, kDLInt, 32)) {
    TVM_FFI_THROW(TypeError) << name << " is " << dtype_name(t.dtype()) << "; it must be int32";
  }
  check_device(name, t, device);
  if (t.ndim() != 2) {
    TVM_FFI_THROW(ValueError) << name << " has shape " << shape_name(t) << "; it must be 2-D";
  }
  if (t.size(1) > 1 && t.stride(1) != 1) {
    TVM_FFI_THROW(ValueError) << name << " has stride " << t.stride(1)
                              << " along its last dimension; it must be 1";
  }
  if (t.stride(0) < 0) {
    TVM_FFI_THROW(ValueError) << name << " has row stride " << t.stride(0)
                              << "; it must not be negative";
  }
}

// An output [size] of int32 with stride 1.
inline int32_t* int32_vector(const char* name, const TensorView& t, int64_t size, DLDevice device) {
  if (!is_dtype(t, kDLInt, 32)) {
    TVM_FFI_THROW(TypeError) << name << " is " << dtype_name(t.dtype()) << "; it must be int32";
  }
  check_device(name, t, device);
  if (t.ndim() != 1 || t.size(0) != size || (size > 1 && t.stride(0) != 1)) {
    TVM_FFI_THROW(ValueError) << name << " has shape " << shape_name(t) << "; it must be [" << size
                              << "], one number a row, with stride 1";
  }
  return static_cast<int32_t*>(const_cast<void*>(data(t)));
}

}  // namespace dsv4
