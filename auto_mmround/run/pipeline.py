"""The one journey: capture, then block by block teach, tune, hand over; towers first, then text."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from auto_mmround.errors import UserError
from auto_mmround.model import devices
from auto_mmround.model.chains import Chain, capture
from auto_mmround.model.structure import Stage
from auto_mmround.numerics.grids import SCALE_DTYPES, Codes, Grid
from auto_mmround.numerics.rounding import Rounding
from auto_mmround.numerics.tuner import TuneConfig, TunedWeight, tune_block
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.recipe.schemes import Scheme
from auto_mmround.run.plan import Plan, WeightPlan

log = logging.getLogger("auto_mmround")


@dataclass(frozen=True)
class BlockReport:
    """What happened to a block. start, end: held-out squared error per element, rounded to nearest and tuned."""

    name: str
    stage: str
    weights: int
    start: float | None
    end: float | None
    best_iter: int
    seconds: float
    peak_gb: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for the journal."""
        return asdict(self)


@dataclass(frozen=True)
class Watcher:
    """What a run tells the outside world; the default keeps silent."""

    captured: Callable[[int, int], None] = lambda done, total: None
    step: Callable[[str, int, int], None] = lambda block, step, total: None
    block: Callable[[BlockReport], None] = lambda report: None


Sink = Callable[[str, dict[str, Codes]], None]  # (block, codes by module name); called once a block, in order


def quantize(
    model: PreTrainedModel,
    recipe: Recipe,
    plan: Plan,
    inputs: Sequence[Any],
    sink: Sink,
    watcher: Watcher | None = None,
) -> list[BlockReport]:
    """Quantize the planned weights of ``model`` in place and hand the codes of each block to ``sink``.

    inputs: calibration samples with ``kwargs`` (what the model takes) and ``modality_T``; not needed for rounding to
    nearest. The model's parameters hold the dequantized weights afterwards.
    """
    watcher = watcher or Watcher()
    reports: list[BlockReport] = []

    def finish(report: BlockReport, codes: dict[str, Codes]) -> None:
        sink(report.name, codes)
        reports.append(report)
        watcher.block(report)

    if recipe.tunes:
        _tune_stages(model, recipe, plan, inputs, finish, watcher)
    else:
        for stage in plan.stages:
            for block in stage.blocks:
                started = time.perf_counter()
                tuned = _leaves(model, plan.of_block(block))
                finish(_report(model, block, stage, tuned, None, started), _codes(tuned))
    outside = [weight for weight in plan.weights if weight.scheme and weight.block is None]
    if outside:  # no block to measure: rounded to nearest
        started = time.perf_counter()
        tuned = _leaves(model, outside)
        finish(_report(model, "outside the blocks", None, tuned, None, started), _codes(tuned))
    return reports


def _tune_stages(
    model: PreTrainedModel,
    recipe: Recipe,
    plan: Plan,
    inputs: Sequence[Any],
    finish: Callable[[BlockReport, dict[str, Codes]], None],
    watcher: Watcher,
) -> None:
    device = model.device
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    batches = [_cast(sample.kwargs, dtype) for sample in inputs]

    def precision() -> Any:
        return devices.autocast(device, dtype, recipe.amp)

    def record(stages: Sequence[Stage]) -> dict[str, Chain]:
        store = "cpu" if recipe.low_gpu_mem_usage else device
        return capture(
            model, stages, batches, precision=precision, store=store,
            on_sample=lambda i: watcher.captured(i + 1, len(batches)),
        )  # fmt: skip

    teachers = record(plan.stages)
    students = dict(teachers)
    for position, stage in enumerate(plan.stages):
        if stage.path not in teachers:
            raise UserError(
                f"{stage.path}: no calibration sample reaches this {stage.name} stage; calibrate with samples that "
                f"have {stage.name} input, e.g. --dataset liuhaotian/llava_conv_58k"
            )
        student = students[stage.path]
        weights = [_token_weights(student, i, inputs) for i in range(len(student))]
        journey = _Journey(model, recipe, plan, precision, finish, watcher)
        journey.tune_stage(teachers[stage.path], student, weights)
        later = plan.stages[position + 1 :]
        if later and recipe.enable_quanted_input:
            # What the quantized stage gets wrong must reach the stages that it feeds.
            students |= record(later)


@dataclass(frozen=True)
class _Journey:
    """What every stage of one run shares."""

    model: PreTrainedModel
    recipe: Recipe
    plan: Plan
    precision: Callable[[], Any]
    finish: Callable[[BlockReport, dict[str, Codes]], None]
    watcher: Watcher

    def tune_stage(self, teacher: Chain, student: Chain, token_weights: Sequence[Tensor]) -> None:
        """Tune the blocks of a stage in order; ``nblocks`` consecutive ones share a loss."""
        names = teacher.stage.blocks
        recipe = self.recipe
        for first in range(0, len(names), recipe.nblocks):
            window = names[first : first + recipe.nblocks]
            blocks = [self.model.get_submodule(name) for name in window]
            started = time.perf_counter()
            with self.precision():
                target = teacher.advanced(blocks, first, recipe.batch_size)
                tuned = {name: _leaves(self.model, self.plan.of_block(name)) for name in window}
                result = tune_block(
                    [weight for leaves in tuned.values() for weight in leaves.values()],
                    _forward(student, blocks, first, target, token_weights),
                    len(student),
                    _tune_config(recipe, first),
                    on_step=lambda step, name=window[-1]: self.watcher.step(name, step, recipe.iters),  # type: ignore
                )
                student = student.advanced(blocks, first, recipe.batch_size) if recipe.enable_quanted_input else target
            teacher = target
            for name in window:
                report = _report(self.model, name, teacher.stage, tuned[name], result, started)
                self.finish(report, _codes(tuned[name]))


def _forward(
    student: Chain, blocks: Sequence[nn.Module], first: int, target: Chain, token_weights: Sequence[Tensor]
) -> Callable[[Sequence[int]], Any]:
    def forward(indices: Sequence[int]) -> Any:
        for group, output in student.forward(blocks, first, indices):
            wanted = torch.cat([target.hidden[i] for i in group]) if len(group) > 1 else target.hidden[group[0]]
            weights = torch.cat([token_weights[i] for i in group]) if len(group) > 1 else token_weights[group[0]]
            yield output, wanted.to(output.device), weights.to(output.device)

    return forward


def _tune_config(recipe: Recipe, first: int) -> TuneConfig:
    factor_lr = 0.0 if not recipe.enable_minmax_tuning else recipe.minmax_lr
    return TuneConfig(
        iters=recipe.iters,
        lr=recipe.lr,
        factor_lr=factor_lr,
        batch_size=recipe.batch_size,
        accumulate=recipe.gradient_accumulate_steps,
        keep_best=not recipe.not_use_best_mse,
        patience=recipe.dynamic_max_gap,
        seed=recipe.seed + first,
    )


def grid_of(scheme: Scheme) -> Grid:
    """The grid that a scheme describes."""
    return Grid(scheme.bits, scheme.sym, SCALE_DTYPES[scheme.scale_dtype], scheme.min_zero)


def _leaves(model: nn.Module, planned: Sequence[WeightPlan]) -> dict[str, TunedWeight]:
    """Rounding states for the weights; the parameters hold round-to-nearest values from here on."""
    leaves = {}
    for weight in planned:
        layer = model.get_submodule(weight.name)
        transposed = isinstance(layer, Conv1D)
        parameter: nn.Parameter = layer.weight  # type: ignore[assignment]
        w_OI = (parameter.data.t() if transposed else parameter.data).clone()
        assert weight.scheme is not None
        rounding = Rounding(w_OI, weight.scheme.group_size, grid_of(weight.scheme))
        leaves[weight.name] = TunedWeight(parameter, rounding, transposed)
        leaves[weight.name].refresh()
    return leaves


def _codes(tuned: dict[str, TunedWeight]) -> dict[str, Codes]:
    return {name: Codes(*_to_cpu(weight.rounding.codes())) for name, weight in tuned.items()}


def _to_cpu(codes: Codes) -> list[Any]:
    return [part.cpu() if isinstance(part, Tensor) else part for part in codes]


def _cast(kwargs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Pixel values and audio features in the model's dtype."""
    return {
        key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in kwargs.items()
    }


def _token_weights(chain: Chain, i: int, inputs: Sequence[Any]) -> Tensor:
    """1 for every token, 0 for padding; shape of the hidden state without its channels."""
    shape = chain.hidden[i].shape[:-1]
    modality_T = inputs[chain.sample[i]].modality_T
    if modality_T is not None and modality_T.numel() == shape.numel():
        return (modality_T != 4).float().reshape(shape)
    return torch.ones(shape)


def _report(
    model: PreTrainedModel, name: str, stage: Stage | None, tuned: dict[str, TunedWeight], result: Any, started: float
) -> BlockReport:
    return BlockReport(
        name=name,
        stage=stage.name if stage else "text",
        weights=len(tuned),
        start=result.start if result else None,
        end=result.end if result else None,
        best_iter=result.best_iter if result else 0,
        seconds=time.perf_counter() - started,
        peak_gb=max(devices.peak_memory(model.device).values()),
    )
