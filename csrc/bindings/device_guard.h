// The device, the stream and the error check of one call.
#pragma once

#include <cuda_runtime.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>

namespace dsv4 {

// Makes the tensors' device the current one for its lifetime.
class Launch {
 public:
  Launch(const char* name, DLDevice device) : name_(name), device_(device) {
    check(cudaGetDevice(&previous_));
    if (previous_ != device.device_id) check(cudaSetDevice(device.device_id));
  }
  ~Launch() {
    if (previous_ != device_.device_id) cudaSetDevice(previous_);
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;

  // The stream that torch has current on the device.
  cudaStream_t stream() const {
    return static_cast<cudaStream_t>(TVMFFIEnvGetStream(device_.device_type, device_.device_id));
  }

  void check(cudaError_t error) const {
    if (error != cudaSuccess) {
      TVM_FFI_THROW(RuntimeError) << name_ << ": " << cudaGetErrorName(error) << ": "
                                  << cudaGetErrorString(error);
    }
  }

 private:
  const char* name_;
  DLDevice device_;
  int previous_ = 0;
};

}  // namespace dsv4
