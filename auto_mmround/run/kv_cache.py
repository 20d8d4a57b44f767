"""Scales of keys and values, for engines that keep their cache in FP8."""

import torch
from torch import Tensor

from auto_mmround.errors import UserError
from auto_mmround.model.kv_cache import SCALES, Change, cached_attention, changing
from auto_mmround.model.passes import run_without_logits
from auto_mmround.numerics.float_grids import E4M3_TOP
from auto_mmround.run.out_of_memory import SHORTER, phase
from auto_mmround.run.session import Session, Told


def kv_scales(session: Session, told: Told = lambda done, total: None) -> dict[str, Tensor]:
    """``<attention>.k_scale`` and ``.v_scale`` -> float32 (1,), or (heads, 1, 1) where the recipe
    wants one a head: max|x| / 448 over all samples of all processes, as the model is now. x is what
    engines put into the cache; keys are turned by then.

    Raises UserError for attention that no key passes: it reads another layer's keys.
    """
    peaks: dict[str, Tensor] = {}
    of_heads = session.recipe.kv_cache_scheme == "fp8_head"

    def watch(name: str) -> Change:
        def see(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            for part, states in zip(SCALES, (key, value), strict=True):
                peak_BHT = states.detach().abs().amax(-1).float()
                peak = peak_BHT.amax((0, 2)) if of_heads else peak_BHT.amax()
                peak = peak.reshape((-1, 1, 1) if of_heads else 1)
                peaks[f"{name}.{part}"] = torch.maximum(peaks.get(f"{name}.{part}", peak), peak)
            return key, value

        return see

    own = cached_attention(session.model)
    samples = session.processes.share(range(len(session.batches)))
    with (
        phase("scales of keys and values", f"leave --kv_cache_scheme out, or {SHORTER}"),
        changing(session.model, {name: watch(name) for name in own}),
        torch.no_grad(),
        session.precision(),
    ):
        for i in samples:
            run_without_logits(session.model, session.batches[i])
            told(i + 1, len(session.batches))
    largest: dict[str, Tensor] = {}
    for part in session.processes.gather({name: peak.cpu() for name, peak in peaks.items()}):
        for name, peak in part.items():
            largest[name] = torch.maximum(largest.get(name, peak), peak)
    for name in own:
        if f"{name}.{SCALES[0]}" not in largest:
            raise UserError(
                f"kv_cache_scheme: {name} hands no keys to the cache, it reads those of another"
                " layer; leave it out"
            )
    return {n: torch.where(peak > 0, peak / E4M3_TOP, 1.0) for n, peak in largest.items()}
