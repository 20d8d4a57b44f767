"""How much of each layer's own output a block's tuning loses: before, between and after."""

from collections.abc import Mapping

import torch
from torch import Tensor

from auto_mmround.numerics.moments import Moments
from auto_mmround.numerics.tuner import TunedWeight

ROWS = 512  # outputs of a layer that its error is measured on


class LayerErrors:
    """Errors of a block's weights under the second moments H of their inputs: tr((W - W~) H (W -
    W~)^T) / tr(W H W^T).

    0: nothing is lost, 1: as much as if the layer were not there. Comparable between layers and
    between runs. Of a weight with more outputs than `ROWS`, about as many are looked at, spread
    evenly: only the report reads this.
    """

    def __init__(self, leaves: Mapping[str, TunedWeight], moments: Mapping[str, Moments]):
        self._leaves = {name: leaf for name, leaf in leaves.items() if name in moments}
        self._moments = moments
        self._whole: dict[str, Tensor] = {}
        self._found: dict[str, dict[str, Tensor]] = {name: {} for name in self._leaves}

    def note(self, when: str, same: str = "") -> None:
        """Measure all weights as they are now; ``same``: nothing has changed since then."""
        for name, leaf in self._leaves.items():
            errors, moments = self._found[name], self._moments[name]
            if same:
                errors[when] = errors[same]
                continue
            rows = leaf.rounding.rows(slice(None, None, -(-len(leaf.rounding.w_OGg) // ROWS)))
            w_OI = rows.original().float()
            with torch.autocast(w_OI.device.type, enabled=False):
                if name not in self._whole:
                    self._whole[name] = moments.error(w_OI)
                errors[when] = moments.error(w_OI - rows.weight())

    def rest(self) -> None:
        """Of the second moments only what `note` reads is needed from now on."""
        for moments in {id(own): own for own in self._moments.values()}.values():
            moments.rest()

    def of(self, names: Mapping[str, TunedWeight]) -> dict[str, dict[str, float]]:
        """Weight -> when -> error, of some weights; the host waits for all of them at once."""
        known = [name for name in names if name in self._found]
        parts = [x for name in known for x in (self._whole[name], *self._found[name].values())]
        device = parts[0].device if parts else None
        numbers = iter(torch.stack([x.to(device) for x in parts]).tolist() if parts else ())
        shares = {}
        for name in known:
            whole = max(next(numbers), 1e-30)
            shares[name] = {when: next(numbers) / whole for when in self._found[name]}
        return shares
