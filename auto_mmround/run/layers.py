"""How much of each layer's own output a block's tuning loses: before, between and after."""

from collections.abc import Mapping

import torch
from torch import Tensor

from auto_mmround.numerics.gram import Moments, error
from auto_mmround.numerics.tuner import TunedWeight


class LayerErrors:
    """Errors of a block's weights under the second moments H of their inputs: tr((W - W~) H (W - W~)^T) / tr(W H W^T).

    0: nothing is lost, 1: as much as if the layer were not there. Comparable between layers and between runs.
    """

    def __init__(self, leaves: Mapping[str, TunedWeight], moments: Mapping[str, Moments]):
        self._leaves = {name: leaf for name, leaf in leaves.items() if name in moments}
        self._moments = moments
        self._whole: dict[str, float] = {}
        self._found: dict[str, dict[str, float]] = {name: {} for name in self._leaves}

    def note(self, when: str, same: str = "") -> None:
        """Measure all weights as they are now; ``same``: nothing has changed since then."""
        if same:
            for found in self._found.values():
                found[when] = found[same]
            return
        hessians: dict[int, Tensor] = {}
        for name, leaf in self._leaves.items():
            moments, rounding = self._moments[name], leaf.rounding
            if id(moments) not in hessians:
                hessians[id(moments)] = moments.hessian()
            h_II = hessians[id(moments)]
            w_OI = rounding.w_OGg.flatten(1)[:, : rounding.columns].float()
            with torch.autocast(w_OI.device.type, enabled=False):
                if name not in self._whole:
                    self._whole[name] = max(error(w_OI, torch.zeros_like(w_OI), h_II, exact=False), 1e-30)
                self._found[name][when] = error(w_OI, rounding.weight(), h_II, exact=False) / self._whole[name]

    def of(self, names: Mapping[str, TunedWeight]) -> dict[str, dict[str, float]]:
        """Weight -> when -> error, of some weights."""
        return {name: self._found[name] for name in names if name in self._found}
