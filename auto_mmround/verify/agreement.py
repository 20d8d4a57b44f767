"""Does an engine agree with the decoded weights? Logits within a tolerance, tokens up to a near
tie."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_mmround.calibration.ready import PER_TOKEN
from auto_mmround.checkpoint.loader import from_quantized
from auto_mmround.evaluate.metrics import logits_in_turn, logits_of
from auto_mmround.model.devices import DTYPES
from auto_mmround.model.lockstep import in_turn
from auto_mmround.numerics.activations import integers_a_token
from auto_mmround.verify.engines import EngineResult

# Some readers compute in half precision only. Errors of a wrong packing are larger by orders of
# magnitude.
TOLERANCE = 0.05
# The effect of an engine's own dtype is no fault of the file. NOISE times that effect is allowed,
# but never more than this share of the logits' spread.
NOISE, WIDEST = 5, 0.5
Q8_BLOCK = 32  # columns that share a scale when llama.cpp rounds the inputs of a quantized layer
# If the margin between the two best logits is below this, or below NOISE times the measured
# difference, either choice is right.
NEAR_TIE = 0.15


@dataclass(frozen=True)
class Reference:
    """The decoded weights in float32, and their logits for each input.

    logits: (T, vocabulary) for each input. activations: the model quantizes the inputs of layers
    where the checkpoint asks for it. blocks: of a streamed model, those that are read when their
    turn comes. options: of `from_quantized`, where the weights are loaded again in another dtype.
    """

    folder: Path
    model: Any
    inputs: Sequence[Mapping[str, Any]]
    logits: Sequence[Tensor]
    activations: bool = False
    blocks: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spread(self) -> float:
        """Standard deviation of all logits."""
        return torch.cat([each.flatten() for each in self.logits]).std().item()

    def noise(self, dtype: str) -> float:
        """Largest difference to the logits with the same weights in another dtype; 0 in float32.

        "q8_0": float32, but the inputs of the text model's layers are rounded to 8 bits in blocks,
        as in llama.cpp.
        """
        if DTYPES.get(dtype, torch.float32) == torch.float32 and dtype != "q8_0":
            return 0.0
        if dtype == "q8_0":
            rounded = from_quantized(self.folder, dtype="float32", **self.options)
            for module in rounded.model.get_decoder().modules():
                if isinstance(module, torch.nn.Linear) and module.in_features % Q8_BLOCK == 0:
                    module.register_forward_pre_hook(_round_blocks)
        else:
            rounded = from_quantized(
                self.folder, dtype=dtype, activations=self.activations, **self.options
            )
        made = logits_in_turn(rounded.model, self.inputs, rounded.holder.blocks)
        ends = [logits[: len(want)] for logits, want in zip(made, self.logits, strict=True)]
        return largest_difference(ends, self.logits)


def _round_blocks(_: torch.nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (integers_a_token(given[0].unflatten(-1, (-1, Q8_BLOCK)), 8).flatten(-2), *given[1:])


def make_reference(
    folder: Path,
    model: Any,
    inputs: Sequence[Mapping[str, Any]],
    activations: bool = False,
    blocks: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Reference:
    """Run the decoded model on every input; see `Reference`."""
    logits = list(logits_in_turn(model, inputs, blocks))
    return Reference(folder, model, inputs, logits, activations, blocks, options or {})


def rounds_inputs(quantization: Mapping[str, Any] | None) -> bool:
    """Whether a checkpoint asks engines to quantize activations."""
    groups = (quantization or {}).get("config_groups") or {}
    return any(group.get("input_activations") for group in groups.values())


def largest_difference(given: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest difference between logits (.., t, v) and (T, V) over the last t positions.

    Engines may pad the vocabulary (v > V). NaN where there is nothing to compare, and where a logit
    is NaN.
    """
    if len(given) != len(wanted):
        return float("nan")
    pairs = [
        (got.reshape(-1, got.shape[-1])[:, : want.shape[-1]], want)
        for got, want in zip(given, wanted)
    ]
    gaps = [(got.float() - want[-len(got) :]).abs().max() for got, want in pairs]
    return torch.stack(gaps).max().item() if gaps else float("nan")


def greedy(model: Any, kwargs: Mapping[str, Any], count: int) -> tuple[list[int], list[float]]:
    """``count`` most likely next tokens, end tokens too, and the margin of each over the second
    best."""
    tokens: list[int] = []
    margins: list[float] = []
    ids = "decoder_input_ids" if "decoder_input_ids" in kwargs else "input_ids"
    for _ in range(count):
        best = logits_of(model, kwargs)[-1].topk(2)
        tokens.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
        kwargs = {**kwargs, **_longer(kwargs, ids, tokens[-1])}
    return tokens, margins


def _longer(kwargs: Mapping[str, Any], ids: str, token: int) -> dict[str, Tensor]:
    """The inputs with one more text token, in every entry that has one value per token."""
    length = kwargs[ids].shape[1]
    values = {ids: token, "attention_mask": 1}
    return {
        key: torch.cat([value, value.new_full((1, 1), values.get(key, 0))], dim=1)
        for key, value in kwargs.items()
        if key in (*PER_TOKEN, ids)
        and key != "position_ids"
        and value.ndim == 2
        and value.shape[1] == length
    }


def agreed(
    tokens: Sequence[int], margins: Sequence[float], given: Sequence[int], tie: float
) -> tuple[int, bool]:
    """(tokens that agree from the start, whether that is right).

    It is right if all agree, or if the next choice was a near tie.
    """
    for i, (token, margin, other) in enumerate(zip(tokens, margins, given)):
        if token != other:
            return i, margin < tie
    return min(len(tokens), len(given)), True


def judge(result: EngineResult, reference: Reference, planned: int) -> dict[str, Any]:
    """The figures of a verdict, with the status "right" or "wrong" and the reason."""
    worst = largest_difference(result.logits, reference.logits)
    if result.logprobs:
        worst = _next_difference(result.logprobs, reference.logits)
    gap = worst / reference.spread
    facts: dict[str, Any] = {"layers": result.quantized, "max_difference": worst, "gap": gap}
    problem = _problem(result, planned)
    if problem is None and not gap <= TOLERANCE:
        allowed = min(WIDEST, NOISE * reference.noise(result.dtype) / reference.spread)
        problem = None if gap <= allowed else f"logits differ by {gap:.1%} of their spread"
    if problem is None and result.tokens:
        facts["tokens"], problem = _judge_tokens(result, reference, worst)
    return facts | {"status": "wrong" if problem else "right", "reason": problem}


def _problem(result: EngineResult, planned: int) -> str | None:
    if not result.ok:
        return result.error or "the engine failed"
    if result.missing or result.unexpected:
        names = [*result.missing, *result.unexpected]
        return f"{len(names)} tensors missing or unknown, first {names[0]}"
    if result.quantized is not None and result.quantized != planned:
        return f"{result.quantized} quantized layers, {planned} planned"
    return None


def _next_difference(logprobs: Sequence[Mapping[int, float]], wanted: Sequence[Tensor]) -> float:
    """Largest difference of the given log probabilities of next tokens; NaN without any."""
    if len(logprobs) != len(wanted) or not all(logprobs):
        return float("nan")
    scores = [want[-1].log_softmax(-1) for want in wanted]
    return max(
        abs(value - float(score[i]))
        for given, score in zip(logprobs, scores)
        for i, value in given.items()
    )


def _judge_tokens(
    result: EngineResult, reference: Reference, worst: float
) -> tuple[tuple[int, int], str | None]:
    same = total = 0
    tie = max(NEAR_TIE, NOISE * worst) if worst == worst else NEAR_TIE
    works = [
        partial(greedy, reference.model, kwargs, answer.numel())
        for answer, kwargs in zip(result.tokens, reference.inputs)
    ]
    answers = in_turn(reference.model, reference.blocks, works, reference.inputs)
    for i, (tokens, margins) in enumerate(answers):
        answer = result.tokens[i]
        count, right = agreed(tokens, margins, answer.flatten().tolist(), tie)
        same, total = same + count, total + len(tokens)
        if not right:
            return (
                same,
                total,
            ), f"input {i}: token {count} is another, by a margin of {margins[count]:.2f}"
    return (same, total), None
