// A strict stand-in accelerator for tests: the device `accel`, in torch's place for devices of others (PrivateUse1).
//
// Its tensors lie in host memory and the processor's kernels compute on them, so that nothing but the rules differ:
// as on CUDA, tensors of two devices do not meet, memory has a limit, and copies and reads make the host wait. What
// happens is told to a listener: launches, waits of the host, copies. Built and registered by __init__.py.
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>

#include "autocast.h"
#include "device.h"
#include "operations.h"

namespace accel {
using Sizes = at::IntArrayRef;
template <typename T>
using Maybe = std::optional<T>;

Tensor empty(Sizes size, Maybe<at::ScalarType> dtype, Maybe<at::Layout>, Maybe<Device> device, Maybe<bool>,
             Maybe<at::MemoryFormat> format) {
  c10::DeviceGuard guard(device.value_or(Device(OURS, current)));
  return at::detail::empty_generic(size, &allocator, KEYS, c10::dtype_or_default(dtype), format);
}
Tensor empty_strided(Sizes size, Sizes stride, Maybe<at::ScalarType> dtype, Maybe<at::Layout>, Maybe<Device> device,
                     Maybe<bool>) {
  c10::DeviceGuard guard(device.value_or(Device(OURS, current)));
  return at::detail::empty_strided_generic(size, stride, &allocator, KEYS, c10::dtype_or_default(dtype));
}
Tensor as_strided(const Tensor& self, Sizes size, Sizes stride, Maybe<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}
const Tensor& resize_(const Tensor& self, Sizes size, Maybe<at::MemoryFormat> format) {
  c10::DeviceGuard guard(self.device());
  at::native::resize_impl_cpu_(self.unsafeGetTensorImpl(), size, std::nullopt);
  if (format) self.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  return self;
}
Tensor copy_from(const Tensor& self, const Tensor& to, bool non_blocking) {
  const Kind kind = !ours(self) ? TO_DEVICE : ours(to) ? LAUNCH : TO_HOST;
  if (self.numel()) tell(kind, non_blocking ? "copy, non-blocking" : "copy", self.nbytes());
  Views views;
  const Tensor source = ours(self) ? views.of(self) : self;
  at::NoGradGuard no_grad;
  if (self.numel()) (ours(to) ? views.of(to) : to).copy_(source);
  return to;
}
Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  at::native::resize_output(to, self.sizes());
  return copy_from(self, to, false);
}
at::Scalar item(const Tensor& self) {
  tell(WAIT, "item", self.nbytes());
  return at::_local_scalar_dense(Views().of(self));
}
Tensor& set_storage(Tensor& self, at::Storage source) {
  const int64_t count = source.nbytes() / self.dtype().itemsize();
  return at::native::set_storage_cpu_(self, source, 0, {count}, {});
}
Tensor& set_empty(Tensor& self) {
  c10::DeviceGuard guard(self.device());
  return set_storage(self, at::Storage(c10::Storage::use_byte_size_t(), 0, allocator.allocate(0), &allocator, true));
}
Tensor& set_tensor(Tensor& self, const Tensor& source) { return at::native::set_tensor_(self, source); }

Tensor convolution(const Tensor& input, const Tensor& weight, const Maybe<Tensor>& bias, Sizes stride, Sizes padding,
                   Sizes dilation, bool transposed, Sizes output_padding, int64_t groups) {
  for (const Tensor& t : {weight, bias.value_or(weight)})
    TORCH_CHECK(!t.defined() || t.device() == input.device(), "Input (", input.device(), ") and weight (", t.device(),
                ") should lie on the same device");
  tell(LAUNCH, "convolution", input.nbytes());
  Views views;
  const auto shift = bias && bias->defined() ? Maybe<Tensor>(views.of(*bias)) : std::nullopt;
  return moved(at::convolution(views.of(input), views.of(weight), shift, stride, padding, dilation, transposed,
                               output_padding, groups), input.device());
}
using Three = std::tuple<Tensor, Tensor, Tensor>;
Three convolution_backward(const Tensor& grad, const Tensor& input, const Tensor& weight, Sizes stride, Sizes padding,
                           Sizes dilation, bool transposed, Sizes output_padding, int64_t groups,
                           std::array<bool, 3> mask) {
  tell(LAUNCH, "convolution_backward", input.nbytes());
  Views views;
  const std::vector<int64_t> channels{transposed ? weight.size(1) * groups : weight.size(0)};
  auto [x, w, b] = at::convolution_backward(views.of(grad), views.of(input), views.of(weight), Sizes(channels), stride,
                                            padding, dilation, transposed, output_padding, groups, mask);
  return {moved(x, input.device()), moved(w, input.device()), moved(b, input.device())};
}
Tensor histc(const Tensor& self, int64_t bins, const at::Scalar& low, const at::Scalar& high) {  // CUDA takes integers
  tell(LAUNCH, "histc", self.nbytes());
  return moved(at::histc(Views().of(self).to(at::kFloat), bins, low, high).to(self.scalar_type()), self.device());
}
Tensor mm_dtype(const Tensor& self, const Tensor& other, at::ScalarType dtype) {  // as CUDA has it: sums are float32
  TORCH_CHECK(self.scalar_type() == other.scalar_type(), "input dtypes must be the same");
  TORCH_CHECK(dtype == self.scalar_type() || dtype == at::kFloat, "out_dtype must be that of the factors or float32");
  tell(LAUNCH, "mm.dtype", self.nbytes() + other.nbytes());
  Views views;
  return moved(at::mm(views.of(self).to(at::kFloat), views.of(other).to(at::kFloat)).to(dtype), self.device());
}
}  // namespace accel

TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&accel::any>()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", TORCH_FN(accel::empty));
  m.impl("empty_strided", TORCH_FN(accel::empty_strided));
  m.impl("as_strided", TORCH_FN(accel::as_strided));
  m.impl("resize_", TORCH_FN(accel::resize_));
  m.impl("_copy_from", TORCH_FN(accel::copy_from));
  m.impl("_copy_from_and_resize", TORCH_FN(accel::copy_from_and_resize));
  m.impl("_local_scalar_dense", TORCH_FN(accel::item));
  m.impl("set_", TORCH_FN(accel::set_empty));
  m.impl("set_.source_Storage", TORCH_FN(accel::set_storage));
  m.impl("set_.source_Tensor", TORCH_FN(accel::set_tensor));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(at::native::set_storage_cpu_));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("view_as_real", TORCH_FN(at::native::view_as_real));
  m.impl("view_as_complex", TORCH_FN(at::native::view_as_complex));
  m.impl("convolution_overrideable", TORCH_FN(accel::convolution));
  m.impl("convolution_backward_overrideable", TORCH_FN(accel::convolution_backward));
  m.impl("histc", TORCH_FN(accel::histc));
  m.impl("mm.dtype", TORCH_FN(accel::mm_dtype));
}

// What Python calls: tensors as operations, numbers by ctypes.
at::Tensor random_state(int64_t device) { return accel::generator(device).get_state(); }
void set_random_state(int64_t device, const at::Tensor& state) { accel::generator(device).set_state(state); }
TORCH_LIBRARY(accel, m) {
  m.def("random_state(int device) -> Tensor", &random_state);
  m.def("set_random_state(int device, Tensor state) -> ()", &set_random_state);
}
extern "C" {
void accel_register() {
  c10::SetAllocator(accel::OURS, &accel::allocator);
  at::RegisterPrivateUse1HooksInterface(new accel::Hooks());
}
void accel_show(int devices) { accel::visible = devices; }
int accel_refuse(int what) { return accel::refused.exchange(what); }
int accel_shown() { return accel::visible; }
void accel_listen(accel::Listener told) { accel::listener = told; }
int accel_current() { return accel::current; }
void accel_seed(uint64_t seed) {
  for (int i = 0; i < accel::DEVICES; ++i) accel::generator(i).set_current_seed(seed);
}
void accel_limit(int device, int64_t bytes) { accel::memory.at(device).limit = bytes; }
void accel_forget_peak(int device) {
  auto& here = accel::memory.at(device);
  here.peak = here.used.load();
  here.count = 0;
}
void accel_memory(int device, int64_t* found) {  // used, peak, limit, how many allocations
  const auto& here = accel::memory.at(device);
  for (const auto* each : {&here.used, &here.peak, &here.limit, &here.count}) *found++ = *each;
}
}
