"""The student's layers see their inputs as engines will round them, where a scheme says so.

The teacher never does: hooks are there only while `ServedInputs.rounding` is open.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

from torch import Tensor, nn

from auto_mmround.numerics.activations import rounded_inputs, straight_through
from auto_mmround.numerics.grids import Codes
from auto_mmround.run.plan import WeightPlan

_Rounding = tuple[tuple[Any, ...], Callable[[Tensor], Tensor]]


class ServedInputs:
    """What rounds the inputs of the student's layers.

    measured: layer -> float32 (1,), what calibration found of all its inputs, for schemes of which
      the engine does not find it itself.
    """

    def __init__(self) -> None:
        self.measured: dict[str, Tensor] = {}
        self._paused = False

    def take(self, codes: Mapping[str, Codes]) -> None:
        """Remember what was measured for finished layers: it stands in their codes."""
        for name, weight in codes.items():
            if weight.input_scale is not None:
                self.measured[name] = weight.input_scale

    @contextmanager
    def rounding(self, model: nn.Module, planned: Sequence[WeightPlan]) -> Iterator[None]:
        """While open, these layers round their inputs where their scheme has few bits for them;
        gradients pass straight through. Experts that the model holds in a stack are left out."""
        shared = _Shared()
        with ExitStack() as hooks:
            hooks.callback(shared.clear)
            for weight in planned:
                hook, layer = self._hook(weight, shared), _layer(model, weight.name)
                if hook is not None and layer is not None:
                    hooks.callback(layer.register_forward_pre_hook(hook).remove)
            yield

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Layers see their inputs as they are: a teacher pass between the student's."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def seen_by(self, weight: WeightPlan, x: Tensor) -> Tensor:
        """What an engine makes of these inputs of a layer."""
        rounded = self._rounding(weight)
        return x if rounded is None else rounded[1](x)

    def _rounding(self, weight: WeightPlan) -> "_Rounding | None":
        """Equal keys round alike; None for a scheme that rounds nothing."""
        scheme = weight.scheme
        if scheme is None or scheme.act_bits >= 16:
            return None
        whole = self.measured[weight.name] if scheme.inputs_measured else None
        inputs, how = scheme.inputs, scheme.act_how

        measured = cache(lambda device: None if whole is None else whole.to(device))

        def rounded(x: Tensor) -> Tensor:
            return straight_through(x, rounded_inputs, *inputs, measured(x.device), how)

        return (*inputs, how, None if whole is None else whole.item()), rounded

    def _hook(self, weight: WeightPlan, shared: "_Shared") -> Callable[..., Any] | None:
        rounding = self._rounding(weight)
        if rounding is None:
            return None

        def hook(layer: nn.Module, args: tuple[Any, ...]) -> Any:
            if self._paused or not args[0].numel():
                return None
            return shared.of(args[0], *rounding), *args[1:]

        return hook


class _Shared:
    """The last tensor that was rounded: layers that are given the same one after another (q, k, v)
    get the same, so that they share their second moments too."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, int, tuple[Any, ...], Tensor] | None = None

    def of(self, x: Tensor, key: tuple[Any, ...], rounded: Callable[[Tensor], Tensor]) -> Tensor:
        """What ``rounded`` makes of x. key: equal for what rounds alike."""
        last, version = self._last, 0 if x.is_inference() else x._version
        if last is None or last[0] is not x or last[1:3] != (version, key):
            last = self._last = x, version, key, rounded(x)
        return last[3]

    def clear(self) -> None:
        """Keep no tensor alive."""
        self._last = None


def _layer(model: nn.Module, name: str) -> nn.Module | None:
    """None for an expert that is no module of its own."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
