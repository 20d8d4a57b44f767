// Any operation on the stand-in: may its tensors meet? It is told, and computed by the processor's kernel.
#pragma once
#include <ATen/EmptyTensor.h>
#include <torch/library.h>

#include <set>

#include "device.h"

namespace accel {
using c10::IValue;
using c10::OperatorHandle;
using torch::jit::Stack;

// ---- views of our tensors that the processor's kernels can work on --------------------------------------------------
struct Views {  // tensors that share a storage share one here too
  std::vector<std::pair<c10::StorageImpl*, c10::Storage>> known;

  Tensor of(const Tensor& t) {
    auto* storage = t.storage().unsafeGetStorageImpl();
    auto found = std::find_if(known.begin(), known.end(), [&](auto& each) { return each.first == storage; });
    if (found == known.end()) {
      c10::DataPtr data(storage->mutable_data(), Device(c10::kCPU));
      known.emplace_back(storage, c10::Storage(c10::Storage::use_byte_size_t(), storage->nbytes(), std::move(data),
                                               c10::GetCPUAllocator(), true));
      found = known.end() - 1;
    }
    auto made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(found->second),
                                                         c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
    made.unsafeGetTensorImpl()->set_storage_offset(t.storage_offset());
    made.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides());
    made._set_neg(t.is_neg());
    made._set_conj(t.is_conj());
    return made;
  }
};

Tensor empty_like(const Tensor& t, Device device) {
  c10::DeviceGuard guard(device);
  return at::detail::empty_strided_generic(t.sizes(), t.strides(), &allocator, KEYS, t.scalar_type());
}

Tensor moved(const Tensor& t, Device device) {  // a kernel's result into our memory
  if (!t.defined()) return t;
  const Tensor made = empty_like(t, device);
  if (t.numel()) Views().of(made).copy_(t);
  if (t.unsafeGetTensorImpl()->is_wrapped_number()) made.unsafeGetTensorImpl()->set_wrapped_number(true);
  return made;
}

// ---- the rules: which operations take what --------------------------------------------------------------------------
using Names = std::set<std::string>;

const Names WITH_NUMBERS{  // kernels of CUDA that take a tensor of one number in host memory beside its own
    "__ilshift__", "__irshift__", "__lshift__", "__rshift__", "_index_put_impl", "_unsafe_index", "_unsafe_index_put",
    "add", "addcdiv", "addcmul", "atan2", "bitwise_and", "bitwise_left_shift", "bitwise_or", "bitwise_right_shift",
    "bitwise_xor", "clamp", "clamp_max", "clamp_min", "copysign", "div", "eq", "floor_divide", "fmax", "fmin", "fmod",
    "gcd", "ge", "gt", "heaviside", "huber_loss", "hypot", "index", "index_fill", "index_put", "lcm", "ldexp", "le",
    "lerp", "logical_and", "logical_or", "logical_xor", "lt", "masked_fill", "maximum", "minimum", "mse_loss", "mul",
    "ne", "nextafter", "pow", "remainder", "rsub", "smooth_l1_loss", "sub", "threshold", "true_divide", "where",
    "xlogy"};
const Names NO_INTEGERS{"addbmm", "addmm", "addmv", "baddbmm", "bmm", "dot", "mm", "mv"};  // products of cuBLAS
const Names WAITS{"_linalg_eigh", "_linalg_svd", "_unique2", "bincount", "equal", "is_set_to", "linalg_eig",
                  "masked_select", "nonzero", "repeat_interleave", "unique_consecutive", "unique_dim"};
const Names SHAPES{"_unique2", "bincount", "masked_select", "nonzero", "repeat_interleave", "unique_consecutive",
                   "unique_dim"};  // whose result's shape depends on values
const Names INDEXING{"_index_put_impl", "_unsafe_index", "_unsafe_index_put", "index", "index_put"};

std::string bare(const OperatorHandle& op) {  // aten::mul_.Tensor -> mul
  std::string name = op.schema().name().substr(op.schema().name().find("::") + 2);
  const bool in_place = name.size() > 1 && name.back() == '_' && name.substr(0, 2) != "__";
  return in_place ? name.substr(0, name.size() - 1) : name;
}

// What an operation is called with: its device, bytes, and whether it makes the host wait.
struct Call {
  const OperatorHandle& op;
  const std::string name;
  std::optional<Device> device;
  int64_t bytes = 0;
  bool waits;
  bool masked = false;
  bool sets = false;  // values at places: a mask must be counted first; for reading, nonzero was called before

  Call(const OperatorHandle& handle, const Stack& stack) : op(handle), name(bare(handle)), waits(WAITS.count(name)) {
    const auto& arguments = op.schema().arguments();
    const auto given = torch::jit::last(stack, arguments.size());
    const bool writes = INDEXING.count(name) && name.find("put") != std::string::npos;
    sets = writes && given[2].isTensor() && given[2].toTensor().numel() != 1;
    for (const auto i : c10::irange(arguments.size())) {
      if (given[i].isDevice() && given[i].toDevice().type() == OURS && !device) device = given[i].toDevice();
      each(given[i], [&](const Tensor& t, bool listed) { look(t, listed); });
    }
    for (const auto i : c10::irange(arguments.size())) {
      const auto* alias = arguments[i].alias_info();
      const bool written = alias && alias->isWrite();
      each(given[i], [&](const Tensor& t, bool listed) { refuse_host(t, listed, written); });
    }
    if (!device || device->index() < 0) device = Device(OURS, current);
  }

  template <typename Function>
  static void each(const IValue& value, Function&& f) {
    if (value.isTensor()) f(value.toTensor(), false);
    else if (value.isTensorList()) for (const Tensor& t : value.toTensorVector()) f(t, true);
    else if (value.isOptionalTensorList())
      for (const auto& t : value.toOptionalTensorVector()) if (t) f(*t, true);
  }

  void look(const Tensor& t, bool listed) {
    if (!ours(t)) return;
    TORCH_CHECK(!device || device->index() < 0 || *device == t.device(), "Expected all tensors to be on the same ",
                "device, but found at least two devices, ", *device, " and ", t.device(), "! (", name, ")");
    TORCH_CHECK(!NO_INTEGERS.count(name) || !at::isIntegralType(t.scalar_type(), true), name,
                ": the stand-in, like CUDA, has no products of integers");
    TORCH_CHECK(!(refused & REFUSED_DOUBLES) || t.scalar_type() != at::kDouble || t.dim() == 0, name,
                ": float64 is refused now");
    device = t.device();
    bytes += t.nbytes();
    masked |= listed && sets && t.scalar_type() == at::kBool;
    waits |= masked;
  }

  void refuse_host(const Tensor& t, bool listed, bool written) {
    if (!on_host(t) || !device) return;
    if (listed && INDEXING.count(name)) { waits = true; return; }  // an index is copied over
    const bool number = t.dim() == 0 && !written;
    TORCH_CHECK(number && (WITH_NUMBERS.count(name) || t.unsafeGetTensorImpl()->is_wrapped_number()), "Expected all ",
                "tensors to be on the same device, but found at least two devices, ", *device, " and cpu! (", name,
                ", a tensor of shape ", t.sizes(), " in host memory)");
  }
};

// ---- any operation: check, tell, compute with the processor's kernel ------------------------------------------------
struct Written {
  Tensor original, view;

  void settle() const {  // a kernel may have given the view another size, and then other memory
    if (view.sizes() == original.sizes() && view.const_data_ptr() == original.const_data_ptr()) return;
    auto* impl = original.unsafeGetTensorImpl();
    if (view.sizes() != original.sizes()) at::native::resize_impl_cpu_(impl, view.sizes(), std::nullopt);
    if (view.strides() != original.strides()) impl->set_sizes_and_strides(view.sizes(), view.strides());
    if (view.numel()) Views().of(original).copy_(view);
  }
};

IValue for_host(const IValue& value, Views& views) {
  const auto view = [&](const Tensor& t) { return ours(t) ? views.of(t) : t; };
  if (value.isTensor()) return view(value.toTensor());
  if (value.isTensorList()) {
    auto list = value.toTensorVector();
    for (auto& t : list) t = view(t);
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const auto& t : value.toOptionalTensorVector()) list.push_back(t ? std::optional<Tensor>(view(*t)) : t);
    return list;
  }
  if (value.isDevice() && value.toDevice().type() == OURS) return Device(c10::kCPU);
  if (value.isGenerator()) {
    TORCH_CHECK(value.toGenerator().device().type() == OURS, "Expected a generator of the device accel, not of ",
                value.toGenerator().device());
    return inner(value.toGenerator());
  }
  return value;
}

void any(const OperatorHandle& op, Stack* stack) {
  const Call call(op, *stack);
  TORCH_CHECK(!(refused & REFUSED_SHAPES) || !(call.masked || SHAPES.count(call.name)), call.name,
              ": shapes that depend on values are refused now");
  c10::DeviceGuard guard(*call.device);
  tell(call.waits ? WAIT : LAUNCH, call.name, call.bytes);

  const auto& schema = op.schema();
  const auto begin = stack->size() - schema.arguments().size();
  Views views;
  std::vector<Written> written;
  std::vector<std::pair<const c10::AliasInfo*, Tensor>> aliased;
  for (const auto i : c10::irange(schema.arguments().size())) {
    const auto& argument = schema.arguments()[i];
    IValue& value = (*stack)[begin + i];
    IValue replaced = for_host(value, views);
    if (value.isNone() && argument.name() == "generator") replaced = inner(generator(call.device->index()));
    if (argument.alias_info() && value.isTensor()) {
      aliased.emplace_back(argument.alias_info(), value.toTensor());
      if (argument.alias_info()->isWrite() && ours(value.toTensor()))
        written.push_back({value.toTensor(), replaced.toTensor()});
    }
    value = std::move(replaced);
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (const auto& each : written) each.settle();

  const auto& returns = schema.returns();
  for (const auto i : c10::irange(returns.size())) {
    IValue& value = (*stack)[stack->size() - returns.size() + i];
    if (const auto* info = returns[i].alias_info()) {
      const auto same = std::find_if(aliased.begin(), aliased.end(), [&](auto& each) { return *each.first == *info; });
      TORCH_CHECK(info->isWrite() && same != aliased.end(), "the stand-in lacks the view ", call.name);
      value = same->second;
    } else if (value.isTensor()) {
      value = moved(value.toTensor(), *call.device);
    } else if (value.isTensorList()) {
      auto list = value.toTensorVector();
      for (auto& t : list) t = moved(t, *call.device);
      value = list;
    }
  }
}
}  // namespace accel
