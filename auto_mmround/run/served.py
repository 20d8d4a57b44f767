"""The student's layers see their inputs as engines will round them, where a scheme says so."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from auto_mmround.numerics.activations import rounded_inputs
from auto_mmround.run.plan import WeightPlan


class ServedInputs:
    """Rounds the inputs of layers in hooks, with straight-through gradients, until `close`.

    Layers that are given the same tensor one after another (q, k, v) share the rounded one, so that
    they share their second moments too.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._last: tuple[Tensor, tuple[Any, ...], Tensor] | None = None
        self._on = True

    def begin(self, model: PreTrainedModel, planned: Sequence[WeightPlan]) -> None:
        """Round the inputs of these layers from now on, where their scheme has few bits for
        them."""
        for weight in planned:
            scheme = weight.scheme
            if scheme is None or scheme.act_bits >= 16 or not scheme.act_dynamic:
                continue
            how = scheme.data_type, scheme.act_bits, scheme.group_size
            layer = model.get_submodule(weight.name)
            self._handles.append(
                layer.register_forward_pre_hook(
                    lambda _, args, how=how: (self._rounded(args[0], how), *args[1:])
                )
            )

    def _rounded(self, x: Tensor, how: tuple[Any, ...]) -> Tensor:
        if not self._on or not x.numel():
            return x
        if self._last is None or self._last[0] is not x or self._last[1] != how:
            fixed = x.detach()
            self._last = x, how, x + (rounded_inputs(fixed, *how) - fixed)
        return self._last[2]

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Layers see their inputs as they are: the teacher passes."""
        before, self._on = self._on, False
        try:
            yield
        finally:
            self._on = before

    def close(self) -> None:
        """Layers are as before."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._last = None
