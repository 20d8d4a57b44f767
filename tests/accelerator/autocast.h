// Autocast as for CUDA, by torch's own lists: which operations compute in the low precision, which in float32.
#pragma once
#include <ATen/autocast_mode.h>

#include "operations.h"

namespace accel {
bool eligible(const Tensor& t) { return ours(t) && t.is_floating_point() && t.scalar_type() != at::kDouble; }

IValue cast(const IValue& value, at::ScalarType dtype) {
  const auto one = [&](const Tensor& t) { return eligible(t) ? t.to(dtype) : t; };
  if (value.isTensor()) return one(value.toTensor());
  if (!value.isTensorList()) return value;
  auto list = value.toTensorVector();
  for (auto& t : list) t = one(t);
  return list;
}

void in_dtype(const OperatorHandle& op, Stack* stack, at::ScalarType dtype) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastPrivateUse1);
  const auto begin = stack->size() - op.schema().arguments().size();
  for (auto i = begin; i < stack->size(); ++i) (*stack)[i] = cast((*stack)[i], dtype);
  op.callBoxed(stack);
}

void lower(const OperatorHandle& op, Stack* stack) { in_dtype(op, stack, at::autocast::get_autocast_dtype(OURS)); }
void full(const OperatorHandle& op, Stack* stack) { in_dtype(op, stack, at::kFloat); }

void full_result(const OperatorHandle& op, Stack* stack) {  // sums and the like, unless they are told a dtype
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastPrivateUse1);
  const auto& arguments = op.schema().arguments();
  const auto begin = stack->size() - arguments.size();
  const bool casts = (*stack)[begin].isTensor() && eligible((*stack)[begin].toTensor());
  for (const auto i : c10::irange(arguments.size()))
    if (casts && arguments[i].name() == "dtype" && (*stack)[begin + i].isNone()) (*stack)[begin + i] = at::kFloat;
  op.callBoxed(stack);
}

void widest(const OperatorHandle& op, Stack* stack) {
  auto dtype = at::autocast::get_autocast_dtype(OURS);
  const auto look = [&](const Tensor& t, bool) { if (eligible(t)) dtype = at::promote_types(dtype, t.scalar_type()); };
  for (const auto& value : torch::jit::last(*stack, op.schema().arguments().size())) Call::each(value, look);
  in_dtype(op, stack, dtype);
}

template <void (*kernel)(const OperatorHandle&, Stack*)>
void add(torch::Library& library, const std::string& name, const std::string& overload = "") {
  const std::string full_name = overload.empty() ? name : name + "." + overload;
  library.impl(full_name.c_str(), torch::CppFunction::makeFromBoxedFunction<kernel>());
}
}  // namespace accel

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define TEXT(x) #x
#define NAMES(name, ...) TEXT(name) __VA_OPT__(, TEXT(__VA_ARGS__))
#define LOWER(...) accel::add<accel::lower>(m, NAMES(__VA_ARGS__));
#define FULL(...) accel::add<accel::full>(m, NAMES(__VA_ARGS__));
#define FULL_RESULT(...) accel::add<accel::full_result>(m, NAMES(__VA_ARGS__));
#define WIDEST(...) accel::add<accel::widest>(m, NAMES(__VA_ARGS__));
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
  AT_FORALL_FP32(FULL)
  AT_FORALL_FP32_SET_OPT_DTYPE(FULL_RESULT)
  AT_FORALL_PROMOTE(WIDEST)
  for (const char* norm : {"Scalar", "ScalarOpt_dim", "names_ScalarOpt_dim"}) accel::add<accel::full>(m, "norm", norm);
}
