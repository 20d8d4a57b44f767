"""What calibration finds of the inputs of layers whose engines do not find it themselves: the scale
of static FP8, what NVFP4 divides its scales by. Both come from the largest magnitude."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from auto_mmround.model.chains import Chain
from auto_mmround.model.experts import separated
from auto_mmround.model.passes import run_without_logits
from auto_mmround.numerics.float_grids import E4M3_TOP, nvfp4_global
from auto_mmround.recipe.schemes import Scheme
from auto_mmround.run.out_of_memory import SHORTER, phase
from auto_mmround.run.plan import WeightPlan
from auto_mmround.run.session import Session, Told, Window

log = logging.getLogger("auto_mmround")


def input_scales(
    session: Session, planned: Sequence[WeightPlan], told: Told = lambda done, total: None
) -> dict[str, Tensor]:
    """Layer -> float32 (1,) where its scheme has inputs measured, over all samples through the
    model as it is: ``max|x| / 448`` of static FP8, ``448 * 6 / max|x|`` of NVFP4.

    Layers that read the same tensor (q, k, v), which engines fuse, get the same. One that no token
    reaches gets 1.
    """
    schemes = _measured(planned)
    if not schemes:
        return {}
    with (
        phase("scales of static inputs", f"leave inputs in 16 bits (--act_bits 16), or {SHORTER}"),
        separated(session.model, session.experts),
        _watching(session.model, schemes) as peaks,
        torch.no_grad(),
        session.precision(),
    ):
        for i, sample in enumerate(session.batches):
            run_without_logits(session.model, sample)
            told(i + 1, len(session.batches))
    return _scales(schemes, peaks)


def scales_of_window(
    session: Session, chain: Chain, window: Window, planned: Sequence[WeightPlan], size: int
) -> dict[str, Tensor]:
    """The same as a chain passes some blocks, over all processes. size: samples at a time."""
    schemes = _measured(planned)
    if not schemes:
        return {}
    with _watching(session.model, schemes) as peaks:
        chain.passed(window.blocks, window.first, size, None, lambda group: None)
    largest: dict[str, Tensor] = {}
    for part in session.processes.gather(peaks):
        _raise(largest, part)
    return _scales(schemes, largest)


def _measured(planned: Sequence[WeightPlan]) -> dict[str, Scheme]:
    return {w.name: w.scheme for w in planned if w.scheme and w.scheme.inputs_measured}


@contextmanager
def _watching(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Layer -> largest magnitude (1,) of its inputs while open; behind it in host memory."""
    peaks: dict[str, Tensor] = {}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args[0].numel():
                _raise(peaks, {name: args[0].detach().abs().amax().float().reshape(1)})

        return hook

    with ExitStack() as hooks:
        for name in names:
            layer = model.get_submodule(name)
            hooks.callback(layer.register_forward_pre_hook(hook_for(name)).remove)
        yield peaks
    peaks |= {name: peak.cpu() for name, peak in peaks.items()}


def _raise(peaks: dict[str, Tensor], seen: Mapping[str, Tensor]) -> None:
    for name, peak in seen.items():
        peaks[name] = torch.maximum(peaks.get(name, peak), peak)


def _scales(schemes: Mapping[str, Scheme], peaks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    unreached = [name for name in schemes if name not in peaks]
    if unreached:
        log.warning(
            "%d layers saw no calibration token, first %s: their input scale is 1",
            len(unreached),
            unreached[0],
        )
    zero = torch.zeros(1)
    return {
        name: nvfp4_global(peak)
        if scheme.data_type == "nvfp4"
        else torch.where(peak > 0, peak / E4M3_TOP, 1.0)
        for name, scheme in schemes.items()
        for peak in [peaks.get(name, zero)]
    }
