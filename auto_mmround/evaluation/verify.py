"""Is an exported checkpoint what was tuned, and does a real engine agree? A verdict a checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_mmround.evaluation.engines import EngineResult, interpreter, run_transformers
from auto_mmround.evaluation.loader import from_quantized
from auto_mmround.evaluation.metrics import logits_of
from auto_mmround.export.checkpoint import read_checkpoint
from auto_mmround.export.formats import from_config

# Readers compute in half precision where they offer nothing else; a wrong packing misses by orders of magnitude more.
TOLERANCE = 0.05


@dataclass(frozen=True)
class Verdict:
    """folder, format; layers: quantized layers the engine made; planned: as many as should be; gap: largest logit
    difference to the decoded weights, relative to the logits' standard deviation; error: why it is not right."""

    folder: Path
    format: str
    engine: str
    layers: int
    planned: int
    max_difference: float
    gap: float
    error: str | None

    def line(self) -> str:
        """One line for people."""
        if self.error:
            return f"WRONG {self.folder.name}: {self.error}"
        return (
            f"right {self.folder.name}: {self.engine}, {self.layers} of {self.planned} quantized layers, "
            f"largest logit difference {self.max_difference:.2g} ({self.gap:.2g} of their spread)"
        )


def same_weights(folder: Path, tuned: Mapping[str, Tensor]) -> list[str]:
    """Names of the parameters that the checkpoint, decoded, does not hold bit for bit as ``tuned`` (by module name)."""
    state = from_quantized(folder).model.state_dict()
    return [name for name, wanted in tuned.items() if not torch.equal(state[name].to(wanted.dtype), wanted)]


def verify_transformers(
    folder: Path, inputs: Sequence[Mapping[str, Any]], planned: int, *, root: Path = Path(), timeout: float = 600
) -> Verdict:
    """Load the checkpoint in the real Transformers path of its format and compare logits with the decoded weights."""
    checkpoint = read_checkpoint(folder)
    assert checkpoint.quantization_config is not None
    name = from_config(checkpoint.quantization_config).name
    reference = from_quantized(folder, dtype="float32").model
    wanted = [logits_of(reference, kwargs) for kwargs in inputs]
    result = run_transformers(folder, inputs, python=interpreter(name, root), timeout=timeout)
    worst = gap = float("nan")
    if result.logits:
        worst = max((got[0] - want).abs().max().item() for got, want in zip(result.logits, wanted, strict=True))
        gap = worst / torch.cat([want.flatten() for want in wanted]).std().item()
    return Verdict(folder, name, result.engine, result.quantized, planned, worst, gap, _problem(result, planned, gap))


def _problem(result: EngineResult, planned: int, gap: float) -> str | None:
    if not result.ok:
        return result.error or "the engine failed"
    if result.missing or result.unexpected:
        names = [*result.missing, *result.unexpected]
        return f"{len(names)} tensors missing or unknown, first {names[0]}"
    if result.quantized != planned:
        return f"{result.quantized} quantized layers, {planned} planned"
    return None if gap <= TOLERANCE else f"logits differ by {gap:.1%} of their spread"
