"""bfloat16 on processors without instructions for it: products read their factors as float32,
results are rounded.

torch emulates such products at a quarter of float32's speed. The results here are those of the
instructions, up to the order of summation: exact products, added up in float32, rounded once.
Weights stay in bfloat16 in memory.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

P = ParamSpec("P")
T = TypeVar("T")

CHUNK = 2**21  # elements of a weight that are float32 at a time: they stay in the processor's cache
FEW = 8  # tokens; below that torch's own products are no slower


class _Linear(torch.autograd.Function):
    """x W^T + b; saves the bfloat16 factors, not copies of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """(.., in), (out, in), (out,) -> (.., out)."""
        ctx.save_for_backward(x, w_OI)
        wide, parts = x.float(), _parts(w_OI)
        biases = (
            [None] * len(parts)
            if bias_O is None
            else bias_O.float().split([len(part_PI) for part_PI in parts])
        )
        made = (
            functional.linear(wide, part_PI.float(), bias_P)
            for part_PI, bias_P in zip(parts, biases, strict=True)
        )
        return torch.cat([part.to(x.dtype) for part in made], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """The gradients of x, W and b, where they are asked for."""
        x, w_OI = ctx.saved_tensors
        parts = _parts(w_OI)
        grad_TO = grad.reshape(-1, len(w_OI)).float()
        grads = grad_TO.split([len(part_PI) for part_PI in parts], -1)
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            sum_TI = torch.zeros(len(grad_TO), x.shape[-1])
            for grad_TP, part_PI in zip(grads, parts, strict=True):
                sum_TI.addmm_(grad_TP, part_PI.float())
            grad_x = sum_TI.to(x.dtype).view_as(x)
        if ctx.needs_input_grad[1]:
            x_TI = x.reshape(-1, x.shape[-1]).float()
            grad_w = torch.cat([(grad_TP.t() @ x_TI).to(w_OI.dtype) for grad_TP in grads])
        return grad_x, grad_w, grad_TO.sum(0).to(x.dtype) if ctx.needs_input_grad[2] else None


def _parts(w_OI: Tensor) -> Sequence[Tensor]:
    return w_OI.split(max(1, CHUNK // w_OI.shape[1]))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.numel() < FEW * x.shape[-1] and not torch.is_grad_enabled():
        # a word at a time: reading the weight is what takes time
        return functional.linear(x, weight, bias)
    made: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return made


def _widened(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For products of activations, which are small: float32 copies of everything."""

    def wide(value: Any) -> Any:
        return (
            value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value
        )

    def call(*args: Any, **kwargs: Any) -> Tensor:
        return function(
            *map(wide, args), **{key: wide(value) for key, value in kwargs.items()}
        ).bfloat16()

    return call


PRODUCTS: Mapping[Any, Callable[..., Tensor]] = {functional.linear: _linear} | {
    function: _widened(function)
    for function in (functional.scaled_dot_product_attention, functional.conv1d, functional.conv2d,
        functional.conv3d,
                     torch.matmul, torch.bmm, torch.addmm, Tensor.matmul, Tensor.__matmul__)
}  # fmt: skip


class Float32Products(TorchFunctionMode):
    """While open, products of bfloat16 tensors in main memory are made so.

    It is closed while torch runs a backward pass; what computes a block again there opens it anew.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take over the table's functions where they are given bfloat16."""
        first = args[0] if args else None
        if (
            func in PRODUCTS
            and isinstance(first, Tensor)
            and first.dtype == torch.bfloat16
            and first.is_cpu
        ):
            func = PRODUCTS[func]
        return func(*args, **(kwargs or {}))


def unseen(work: Callable[P, T]) -> Callable[P, T]:
    """The same work, without `Float32Products`. For work in float32 that consists of many small
    operations: to be asked about one takes longer than to do it."""

    def call(*args: P.args, **named: P.kwargs) -> T:
        with torch._C.DisableTorchFunction():
            return work(*args, **named)

    return call
