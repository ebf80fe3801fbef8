// Binding of the indexer-cache reads: validate, fill CacheParams, choose, launch.
#include "dsv4/cache/read_gather.cuh"

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include "device_guard.h"
#include "tensor_checks.h"

namespace dsv4 {
namespace {

using tvm::ffi::Optional;

uint8_t* bytes_of(const TensorView& t) {
  return static_cast<uint8_t*>(t.data_ptr()) + t.byte_offset();
}

void set_cache(CacheParams& p, const TensorView& pages, int64_t block_size) {
  if (!is_dtype(pages, kDLUInt, 8)) {
    TVM_FFI_THROW(TypeError) << "pages is " << dtype_name(pages.dtype()) << "; it must be uint8";
  }
  if (pages.device().device_type != kDLCUDA) {
    TVM_FFI_THROW(ValueError) << "pages is on " << device_name(pages.device())
                              << "; it must be on a CUDA device";
  }
  const int64_t need = block_size * (kHeadDim + 4);
  if (block_size < 1 || block_size > (1 << 20) || pages.ndim() != 2 || pages.size(1) < need ||
      pages.stride(1) != 1) {
    TVM_FFI_THROW(ValueError) << "pages is " << shape_name(pages)
                              << "; it must be [pages, >= " << need
                              << "] with unit inner stride for block_size " << block_size;
  }
  p.cache = bytes_of(pages);
  p.pages = pages.size(0);
  p.page_stride = pages.stride(0);
  if (p.pages > 0) check_aligned("pages", p.cache, p.page_stride);
  p.block_size = static_cast<int32_t>(block_size);
  p.block_shift = -1;
  for (int shift = 0; shift <= 20; ++shift) {
    if (block_size == int64_t{1} << shift) p.block_shift = shift;
  }
}

enum class Form { kFloat32, kBfloat16, kQuantised };

Form set_out(CacheParams& p, const TensorView& out, DLDevice device, bool quantised) {
  Form form = Form::kFloat32;
  int64_t width = 4;
  if (quantised && is_dtype(out, kDLUInt, 8)) {
    form = Form::kQuantised;
    width = 1;
  } else if (!quantised && is_dtype(out, kDLBfloat, 16)) {
    form = Form::kBfloat16;
    width = 2;
  } else if (quantised || !is_dtype(out, kDLFloat, 32)) {
    TVM_FFI_THROW(TypeError) << "out is " << dtype_name(out.dtype()) << "; it must be "
                             << (quantised ? "uint8" : "float32 or bfloat16");
  }
  check_device("out", out, device);
  if (out.ndim() != 2 || out.size(1) != kHeadDim || out.stride(1) != 1) {
    TVM_FFI_THROW(ValueError) << "out is " << shape_name(out) << "; it must be [tokens, "
                              << kHeadDim << "] with unit inner stride";
  }
  p.out = bytes_of(out);
  p.out_stride = out.stride(0);
  p.tokens = out.size(0);
  if (p.tokens > 0) check_aligned("out", p.out, p.out_stride * width);
  return form;
}

template <class Keys>
cudaError_t launch(const CacheParams& p, Form form, cudaStream_t stream) {
  switch (form) {
    case Form::kFloat32:
      return launch_index_cache<Keys, ToFloat32, 8>(p, stream);
    case Form::kBfloat16:
      return launch_index_cache<Keys, ToBfloat16, 4>(p, stream);
    case Form::kQuantised:
      return launch_index_cache<Keys, ToQuantised, 2>(p, stream);
  }
  return cudaErrorInvalidValue;
}

void read(TensorView pages, TensorView slots, TensorView out, int64_t block_size) {
  CacheParams p{};
  set_cache(p, pages, block_size);
  const DLDevice device = pages.device();
  const Form form = set_out(p, out, device, false);
  if (!is_index(slots)) {
    TVM_FFI_THROW(TypeError) << "slots is " << dtype_name(slots.dtype())
                             << "; it must be int32 or int64";
  }
  check_device("slots", slots, device);
  if (slots.ndim() != 1 || slots.size(0) != p.tokens || (p.tokens > 1 && slots.stride(0) != 1)) {
    TVM_FFI_THROW(ValueError) << "slots is " << shape_name(slots) << "; it must be contiguous ["
                              << p.tokens << "]";
  }
  p.slots = bytes_of(slots);
  if (p.tokens == 0) return;
  const Launch on("dsv4_read", device);
  on.check(slots.dtype().bits == 64 ? launch<SlotKeys<int64_t>>(p, form, on.stream())
                                    : launch<SlotKeys<int32_t>>(p, form, on.stream()));
}

void gather(TensorView pages, TensorView block_table, TensorView cu_seq_lens, TensorView out,
            Optional<TensorView> scales, int64_t block_size) {
  CacheParams p{};
  set_cache(p, pages, block_size);
  const DLDevice device = pages.device();
  const Form form = set_out(p, out, device, scales.has_value());
  check_int32_rows("block_table", block_table, device);
  if (!is_index(cu_seq_lens)) {
    TVM_FFI_THROW(TypeError) << "cu_seq_lens is " << dtype_name(cu_seq_lens.dtype())
                             << "; it must be int32 or int64";
  }
  check_device("cu_seq_lens", cu_seq_lens, device);
  if (cu_seq_lens.ndim() != 1 || cu_seq_lens.size(0) != block_table.size(0) + 1 ||
      (cu_seq_lens.size(0) > 1 && cu_seq_lens.stride(0) != 1)) {
    TVM_FFI_THROW(ValueError) << "cu_seq_lens is " << shape_name(cu_seq_lens)
                              << "; it must be contiguous [" << block_table.size(0) + 1 << "]";
  }
  p.block_table = reinterpret_cast<const int32_t*>(bytes_of(block_table));
  p.table_stride = block_table.stride(0);
  p.table_width = block_table.size(1);
  p.batch = static_cast<int32_t>(block_table.size(0));
  p.cu_seq_lens = bytes_of(cu_seq_lens);
  if (scales.has_value()) {
    const TensorView s = scales.value();
    check_device("scales", s, device);
    if (!is_dtype(s, kDLFloat, 32) || s.ndim() != 1 || s.size(0) != p.tokens ||
        (p.tokens > 1 && s.stride(0) != 1)) {
      TVM_FFI_THROW(ValueError) << "scales is " << dtype_name(s.dtype()) << " " << shape_name(s)
                                << "; it must be contiguous float32 [" << p.tokens << "]";
    }
    p.scales = reinterpret_cast<float*>(bytes_of(s));
  }
  if (p.tokens == 0 || p.batch == 0) return;
  const Launch on("dsv4_gather", device);
  on.check(cu_seq_lens.dtype().bits == 64 ? launch<SequenceKeys<int64_t>>(p, form, on.stream())
                                          : launch<SequenceKeys<int32_t>>(p, form, on.stream()));
}

}  // namespace
}  // namespace dsv4

TVM_FFI_DLL_EXPORT_TYPED_FUNC(dsv4_read, dsv4::read);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(dsv4_gather, dsv4::gather);
