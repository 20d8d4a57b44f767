"""Scales of static activations: one for all inputs of a layer, from the largest magnitude that
calibration shows."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from auto_mmround.model.experts import separated
from auto_mmround.model.passes import run_without_logits
from auto_mmround.numerics.float_grids import E4M3_TOP
from auto_mmround.run.out_of_memory import SHORTER, phase
from auto_mmround.run.session import Session, Told

log = logging.getLogger("auto_mmround")


def input_scales(session: Session, told: Told = lambda done, total: None) -> dict[str, Tensor]:
    """``max|x| / 448``, float32 (1,), of every planned layer with static activations, over all
    samples.

    Layers that read the same tensor (q, k, v), which engines fuse, get the same. One that no token
    reaches gets 1.
    """
    names = [name for name, scheme in session.plan.quantized.items() if not scheme.act_dynamic]
    peaks: dict[str, Tensor] = {}
    if not names:
        return {}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args[0].numel():
                peak = args[0].detach().abs().amax().float().cpu().reshape(1)
                peaks[name] = torch.maximum(peaks.get(name, peak), peak)

        return hook

    with separated(session.model, session.experts):
        handles = [
            session.model.get_submodule(name).register_forward_pre_hook(hook_for(name))
            for name in names
        ]
        try:
            with (
                phase("scales of static inputs", f"leave --act_static out, or {SHORTER}"),
                torch.no_grad(),
                session.precision(),
            ):
                for i, sample in enumerate(session.batches):
                    run_without_logits(session.model, sample)
                    told(i + 1, len(session.batches))
        finally:
            for handle in handles:
                handle.remove()
    unreached = [name for name in names if name not in peaks]
    if unreached:
        log.warning(
            "%d layers saw no calibration token, first %s: their input scale is 1",
            len(unreached),
            unreached[0],
        )
    zero = torch.zeros(1)
    return {
        name: torch.where(p > 0, p / E4M3_TOP, 1.0)
        for name in names
        for p in [peaks.get(name, zero)]
    }
