"""Scales of keys and values, of engines that keep their cache in FP8."""

from collections.abc import Iterator
from typing import Any

from auto_mmround.checkpoint.findings import Finding, fault
from auto_mmround.checkpoint.subject import Subject
from auto_mmround.model.kv_cache import PROJECTIONS, SCALES, STRATEGIES, fits
from auto_mmround.run.record import checksum

# Of a configuration that says anything else it is not known here what engines do.
KNOWN = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}


def check_kv_cache(s: Subject) -> Iterator[Finding]:
    """Each attention has a scale of its keys and one of its values, or none has any; all are
    positive numbers."""
    said: Any = (s.quantization or {}).get("kv_cache_scheme")
    if not said:
        for name in sorted(s.kv_scales)[:1]:
            text = "scales keys or values, but quantization_config has no kv_cache_scheme"
            yield fault(name, text)
        return
    if s.fmt is None or not s.fmt.kv_cache:
        text = f"format {s.fmt.name if s.fmt else 'unknown'} has no place for scales of a cache"
        yield fault("quantization_config.kv_cache_scheme", text)
        return
    other = [key for key, value in KNOWN.items() if said.get(key, value) != value]
    if other:
        text = f"{other[0]} = {said[other[0]]!r} is not checked, {KNOWN[other[0]]!r} is"
        yield Finding("warning", "quantization_config.kv_cache_scheme", text)
        return
    strategy = said.get("strategy", "tensor")
    if strategy not in STRATEGIES:
        text = f"strategy = {strategy!r} is not checked, {' and '.join(STRATEGIES)} are"
        yield Finding("warning", "quantization_config.kv_cache_scheme", text)
        return
    yield from _check_scales(s, strategy)


def _check_scales(s: Subject, strategy: str) -> Iterator[Finding]:
    wanted = _places(s)
    for name in sorted(wanted - s.kv_scales.keys()):
        yield fault(name, "is missing, quantization_config has a kv_cache_scheme")
    for name in sorted(s.kv_scales.keys() - wanted if wanted else ()):
        yield fault(name, "belongs to no attention with a cache")
    written = s.record.get("kv_cache") or {}
    for name, tensor in s.read(sorted(s.kv_scales)):
        if not fits(strategy, tensor) or not tensor.is_floating_point():
            each = " for each head" if strategy == "attn_head" else ""
            text = f"is {tuple(tensor.shape)} of {tensor.dtype}, no number{each}"
            yield fault(name, text)
        elif not (good := tensor.isfinite() & (tensor > 0)).all():
            bad = tensor[~good].flatten()[0].float().item()
            yield fault(name, f"is {bad:g}, no positive number")
        elif strategy == "attn_head" and _outputs(s, name) % len(tensor):
            text = f"is for {len(tensor)} heads, which {_outputs(s, name)} keys can't be split into"
            yield fault(name, text)
        elif written.get(name, checksum(tensor)) != checksum(tensor):
            text = "is not what the run wrote (its checksum in run.json differs)"
            yield fault(name, text)


def _places(s: Subject) -> set[str]:
    """Names that scales must have, by the run's record or by the attention that others' lie at.
    Empty where nothing is known."""
    written = s.record.get("kv_cache")
    if written:
        return set(written)
    attention = {name.rpartition(".")[0] for name in s.kv_scales}
    blocks = {_numberless(name) for name in attention}
    for layer in s.skeleton.linears if s.skeleton else ():
        parent, _, leaf = layer.rpartition(".")
        if leaf in PROJECTIONS and (not blocks or _numberless(parent) in blocks):
            attention.add(parent)
    return {f"{name}.{part}" for name in attention for part in SCALES}


def _outputs(s: Subject, name: str) -> int:
    """Outputs of the projection that a scale belongs to; 0 where they are not known."""
    attention, _, part = name.rpartition(".")
    layer = (s.skeleton.linears if s.skeleton else {}).get(f"{attention}.{part[0]}_proj")
    return layer.out_features if layer else 0


def _numberless(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split(".") if not part.isdigit())
