"""The one journey: capture, then block by block teach, tune, hand over; towers first, then text."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from auto_mmround.calibration.inputs import PAD, ModelInput, bucket, padded
from auto_mmround.errors import UserError
from auto_mmround.model import devices
from auto_mmround.model.capture import capture, recapture
from auto_mmround.model.chains import Chain, Kinds, as_dtype, run_plainly
from auto_mmround.model.compiled import Compiled
from auto_mmround.model.experts import separated
from auto_mmround.model.fisher import ROWS, channel_fisher, rows_of
from auto_mmround.model.structure import Stage
from auto_mmround.numerics.float_grids import Nearest
from auto_mmround.numerics.gram import Moments
from auto_mmround.numerics.grids import Codes
from auto_mmround.numerics.rounding import Rounding
from auto_mmround.numerics.start import StartConfig, closed_forms, collecting, in_turn
from auto_mmround.numerics.tuner import (
    TuneConfig,
    TunedWeight,
    TuneResult,
    held_out_split,
    mean_error,
    tune_block,
)
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run.equalize import equalize
from auto_mmround.run.layers import LayerErrors
from auto_mmround.run.plan import FUSED, Plan, WeightPlan, grid_of
from auto_mmround.run.processes import ALONE, Processes

log = logging.getLogger("auto_mmround")

# Tokens that a tower's sign step sees, at most: an image or a sound is a thousand or more, and eight of them cost four
# times as much as two.
TOWER_STEP = 4096


@dataclass(frozen=True)
class BlockReport:
    """What happened to a block. nearest, start, end: held-out error per element, rounded to nearest, at the start of
    the sign steps (the closed form, if there is one) and at their end; in units of the loss, see `fisher`."""

    name: str
    stage: str
    weights: int
    nearest: float | None
    start: float | None
    end: float | None
    best_iter: int
    seconds: float
    peak_gb: float
    layers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # share lost of each output, `LayerErrors`
    unreached: int = 0  # weights that no calibration token met (experts): their scales are searched, nothing is tuned

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
    inputs: Sequence[ModelInput],
    sink: Sink,
    watcher: Watcher | None = None,
    processes: Processes = ALONE,
) -> list[BlockReport]:
    """Quantize the planned weights of ``model`` in place and hand the codes of each block to ``sink``.

    inputs: calibration samples with ``kwargs`` (what the model takes) and ``modality_T``; not needed for rounding to
    nearest without equalization. The model's parameters hold the dequantized weights afterwards.
    """
    watcher = watcher or Watcher()
    if devices.traits(model.device).padded:
        inputs = [padded(sample, bucket(len(sample.modality_T))) for sample in inputs]
    reports: list[BlockReport] = []

    def finish(report: BlockReport, codes: dict[str, Codes]) -> None:
        processes.agree(report.name, codes)
        sink(report.name, codes)
        reports.append(report)
        watcher.block(report)

    with separated(model):
        if recipe.equalize != "none":
            equalize(model, recipe, plan, inputs, watcher.captured)
        if recipe.calibrates:
            _tune_stages(model, recipe, plan, inputs, finish, watcher, processes)
        else:
            for stage in plan.stages:
                for block in stage.blocks:
                    started = time.perf_counter()
                    tuned = leaves_of(model, plan.of_block(block))
                    finish(_report(model, block, stage, tuned, None, started), _codes(tuned))
        outside = [weight for weight in plan.weights if weight.scheme and weight.block is None]
        if outside:  # no block to measure: rounded to nearest
            started = time.perf_counter()
            tuned = leaves_of(model, outside)
            finish(_report(model, "outside the blocks", None, tuned, None, started), _codes(tuned))
    return reports


def _tune_stages(
    model: PreTrainedModel,
    recipe: Recipe,
    plan: Plan,
    inputs: Sequence[ModelInput],
    finish: Callable[[BlockReport, dict[str, Codes]], None],
    watcher: Watcher,
    processes: Processes,
) -> None:
    device = model.device
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    batches = [as_dtype(sample.kwargs, dtype) for sample in inputs]

    def precision() -> AbstractContextManager:
        return devices.autocast(device, dtype, recipe.amp)

    def record(stages: Sequence[Stage]) -> dict[str, Chain]:
        store = "cpu" if recipe.low_gpu_mem_usage else device
        chains = capture(
            model, stages, batches, precision=precision, store=store, only=processes.share(range(len(batches))),
            on_sample=lambda i: watcher.captured(i + 1, len(batches)),
        )  # fmt: skip
        return {path: replace(chain, runner=runner) for path, chain in processes.complete(chains, stages).items()}

    runner = Compiled(devices.traits(device).compiler) if recipe.enable_torch_compile else run_plainly
    teachers = record(plan.stages)
    students = dict(teachers)
    fisher = {}
    if recipe.fisher and recipe.algorithm == "auto":
        kinds = [Kinds(sample.modality_T, sample.tower_F) for sample in inputs]
        fisher = channel_fisher(
            model, plan.stages, batches, kinds, seed=recipe.seed, precision=precision, share=processes.share,
            add_up=lambda sums: processes.add_named(sums, device),
        )  # fmt: skip
    journey = _Journey(model, recipe, plan, inputs, batches, fisher, precision, finish, watcher, processes)
    for position, stage in enumerate(plan.stages):
        if stage.path not in teachers:
            raise UserError(
                f"{stage.path}: no calibration sample reaches this {stage.name} stage; calibrate with samples that "
                f"have {stage.name} input, e.g. --dataset liuhaotian/llava_conv_58k"
            )
        journey.tune_stage(teachers[stage.path], students[stage.path])
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
    inputs: Sequence[ModelInput]
    batches: Sequence[dict[str, Any]]  # what the model takes of each, in its dtype
    fisher: Mapping[str, Tensor]
    precision: Callable[[], AbstractContextManager]
    finish: Callable[[BlockReport, dict[str, Codes]], None]
    watcher: Watcher
    processes: Processes

    def tune_stage(self, teacher: Chain, student: Chain) -> None:
        """Tune the blocks of a stage in order; ``nblocks`` consecutive ones share a loss."""
        names = teacher.stage.blocks
        recipe, add_up = self.recipe, self.processes.add_up if self.processes.count > 1 else None
        count, places = self.processes.numbered(student)
        tokens = sum(self.processes.gather(sum(hidden.shape[:-1].numel() for hidden in student.hidden))) // count
        tokens = 0 if student.stage.name == "text" else tokens
        if teacher.live and recipe.nblocks > 1:
            raise UserError(f"{teacher.stage.path}: nblocks must be 1, what blocks are given depends on earlier ones")
        for first in range(0, len(names), recipe.nblocks):
            window = names[first : first + recipe.nblocks]
            blocks = [self.model.get_submodule(name) for name in window]
            started = time.perf_counter()
            with self.precision():
                target = teacher.advanced(blocks, first, recipe.batch_size)
                loss_weights = self._loss_weights(student, window[-1])
                measure = partial(self._moments, student, blocks, first)
                planned = [weight.name for name in window for weight in self.plan.of_block(name)]
                moments = measure(planned) if recipe.closed_form else {}
                tuned = {name: leaves_of(self.model, self.plan.of_block(name)) for name in window}
                leaves = {name: leaf for part in tuned.values() for name, leaf in part.items()}
                forward = _forward(student, blocks, first, target, loss_weights, places)
                turns = in_turn(moments, window) if recipe.in_turn else []
                errors = LayerErrors(leaves, moments)
                errors.note("nearest")
                nearest = self._start(leaves, moments, forward, count, turns, measure) if moments else None
                errors.note("start")
                unreached = set(leaves) - set(moments) if moments else set()
                result = tune_block(
                    list(leaves.values()),
                    forward,
                    count,
                    _tune_config(recipe, first, tokens),
                    on_step=partial(self._stepped, window[-1]),
                    add_up=add_up,
                )
                errors.note("end")
                student = student.advanced(blocks, first, recipe.batch_size) if recipe.enable_quanted_input else target
            if student.live and len(student) and recipe.enable_quanted_input and first + 1 < len(names):
                student = recapture(self.model, student, first + 1, self.batches, precision=self.precision)
            teacher = target
            for name in window:
                report = _report(self.model, name, teacher.stage, tuned[name], result, started, nearest)
                report = replace(report, layers=errors.of(tuned[name]), unreached=len(unreached & set(tuned[name])))
                if report.unreached:
                    log.warning("%s: %d weights saw no calibration token: searched scales, not tuned", name,
                                report.unreached)  # fmt: skip
                self.finish(report, _codes(tuned[name]))

    def _stepped(self, block: str, step: int) -> None:
        devices.traits(self.model.device).mark_step()
        self.watcher.step(block, step, self.recipe.steps)

    def _moments(
        self, student: Chain, blocks: Sequence[nn.Module], first: int, names: Sequence[str]
    ) -> dict[str, Moments]:
        """Second moments of the inputs of some layers, from the student's inputs through the blocks as they are."""
        layers = {name: self.model.get_submodule(name) for name in names}
        last = student.stage.blocks[first + len(blocks) - 1]
        weights = [self._token_weights(student, i, last) for i in range(len(student))]
        current: list[Tensor] = []
        with torch.no_grad(), collecting(layers, lambda: current) as collected:
            for at in range(0, len(student), self.recipe.batch_size):
                for group in student.groups(range(at, min(at + self.recipe.batch_size, len(student))), first):
                    current[:] = [_cat(parts) for parts in zip(*(weights[i] for i in group), strict=True)]
                    collected.next_pass()
                    student.run_group(blocks, first, group)
            return self.processes.add_moments(collected.moments(), self.model.device)

    def _start(
        self,
        leaves: Mapping[str, TunedWeight],
        moments: Mapping[str, Moments],
        forward: Any,
        count: int,
        turns: Sequence[Sequence[str]],
        measure: Callable[[Sequence[str]], dict[str, Moments]],
    ) -> float:
        """Put every weight at its closed-form start; returns the held-out error of rounding to nearest.

        turns: groups of layers that are solved one after another, each on what those before it, rounded, hand to it.
        """
        nearest = mean_error(forward, held_out_split(count)[1], self.recipe.batch_size, self.processes.add_up)
        config = StartConfig(dampening=self.recipe.dampening, order=self.recipe.actorder)  # type: ignore[arg-type]
        waiting = dict(leaves)
        for leaf in leaves.values() if turns else ():
            leaf.show_original()
        for turn in turns:
            fresh = moments if turn is turns[0] else {**moments, **measure(turn)}
            now = {name: waiting.pop(name) for name in turn}
            closed_forms({name: leaf.rounding for name, leaf in now.items()}, fresh, config)
            for leaf in now.values():
                leaf.refresh()
        closed_forms({name: leaf.rounding for name, leaf in waiting.items()}, moments, config)
        return nearest

    def _loss_weights(self, chain: Chain, block: str) -> list[Tensor]:
        """Weights of the block's error for every sample: 0 on padding, else 1, or the Fisher information of the
        channel for the token's modality, scaled to a mean of 1 over the modalities' channels."""
        table_RD = self._importance(chain.stage, block)
        return [table_RD[self._rows(chain, i)] for i in range(len(chain))]

    def _importance(self, stage: Stage, block: str) -> Tensor:
        """Weights of a block's errors by row of the Fisher table, (ROWS, channels or 1).

        Padding of text is worth nothing. What a tower makes of padding reaches the text, so its gradients tell.
        """
        if block in self.fisher:
            table_RD = self.fisher[block].cpu()
            table_RD = table_RD / table_RD[table_RD.sum(1) > 0].mean().clamp(min=1e-30)
        else:
            table_RD = torch.ones(ROWS, 1)
        if stage.name == "text":
            table_RD[PAD] = 0
        return table_RD

    def _token_weights(self, chain: Chain, i: int, block: str) -> list[Tensor]:
        """Weights of the tokens (B, T, 1), the mean over the channels: the block's own, then those of the tower's
        output, which cross attention reads."""
        found = [self._importance(chain.stage, block).mean(1, keepdim=True)[self._rows(chain, i)]]
        tower_F = self.inputs[chain.sample[i]].tower_F
        towers = [stage for stage in self.plan.stages if stage.name != "text"]
        if chain.stage.name == "text" and tower_F is not None and towers:
            heard_R1 = self._importance(towers[-1], towers[-1].blocks[-1]).mean(1, keepdim=True)
            found.append(heard_R1[tower_F.long()][None])
        return found

    def _rows(self, chain: Chain, i: int) -> Tensor:
        """Row of the Fisher table for every token of a hidden state, in its shape but for the channels."""
        shape, sample = chain.hidden[i].shape[:-1], self.inputs[chain.sample[i]]
        return rows_of(chain.stage, Kinds(sample.modality_T, sample.tower_F), shape.numel()).reshape(shape)


def _forward(
    student: Chain,
    blocks: Sequence[nn.Module],
    first: int,
    target: Chain,
    loss_weights: Sequence[Tensor],
    places: Mapping[int, int],
) -> Callable[[Sequence[int]], Any]:
    """places: number of a sample in the run -> its place in the chain; those of other processes are missing."""

    def forward(indices: Sequence[int]) -> Any:
        for group, output in student.forward(blocks, first, [places[i] for i in indices if i in places]):
            wanted, weights = _cat([target.hidden[i] for i in group]), _cat([loss_weights[i] for i in group])
            yield output, wanted.to(output.device), weights.to(output.device)

    return forward


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]


def _tune_config(recipe: Recipe, first: int, tower_tokens: int) -> TuneConfig:
    """tower_tokens: of a sample, on average; 0 for text."""
    factor_lr = 0.0 if not recipe.enable_minmax_tuning else recipe.minmax_lr
    accumulate = recipe.gradient_accumulate_steps
    if recipe.algorithm == "auto" and tower_tokens:
        accumulate = max(1, min(accumulate, TOWER_STEP // tower_tokens // recipe.batch_size))
    return TuneConfig(
        iters=recipe.steps,
        lr=recipe.learning_rate,
        factor_lr=factor_lr,
        batch_size=recipe.batch_size,
        accumulate=accumulate,
        keep_best=not recipe.not_use_best_mse,
        patience=recipe.dynamic_max_gap,
        seed=recipe.seed + first,
    )


def leaves_of(model: nn.Module, planned: Sequence[WeightPlan]) -> dict[str, TunedWeight]:
    """Rounding states for the weights; the parameters hold round-to-nearest values from here on."""
    leaves = {}
    peaks = _shared_peaks(model, planned)
    for weight in planned:
        layer = model.get_submodule(weight.name)
        transposed = isinstance(layer, Conv1D)
        parameter: nn.Parameter = layer.weight  # type: ignore[assignment]
        w_OI = (parameter.data.t() if transposed else parameter.data).clone()
        assert weight.scheme is not None
        scheme = weight.scheme
        if scheme.data_type == "int":
            rounding: Any = Rounding(w_OI, scheme.group_size, grid_of(scheme))
        else:
            rounding = Nearest(w_OI, scheme.data_type, scheme.group_size, peaks.get(weight.name))
        leaves[weight.name] = TunedWeight(parameter, rounding, transposed)
        leaves[weight.name].refresh()
    return leaves


def _shared_peaks(model: nn.Module, planned: Sequence[WeightPlan]) -> dict[str, Tensor]:
    """Largest magnitude of all members of each set of weights that engines fuse: NVFP4 has one scale for them."""
    sets: dict[tuple[str, int], list[str]] = {}
    for weight in planned:
        parent, _, leaf = weight.name.rpartition(".")
        for i, members in enumerate(FUSED):
            if leaf in members and weight.scheme and weight.scheme.data_type == "nvfp4":
                sets.setdefault((parent, i), []).append(weight.name)
    peaks = {
        name: model.get_parameter(f"{name}.weight").detach().abs().max() for names in sets.values() for name in names
    }
    return {name: max(peaks[other] for other in names) for names in sets.values() for name in names}


def _codes(tuned: dict[str, TunedWeight]) -> dict[str, Codes]:
    return {name: Codes(*_to_cpu(weight.rounding.codes())) for name, weight in tuned.items()}


def _to_cpu(codes: Codes) -> list[Any]:
    return [part.cpu() if isinstance(part, Tensor) else part for part in codes]


def _report(
    model: PreTrainedModel,
    name: str,
    stage: Stage | None,
    tuned: dict[str, TunedWeight],
    result: TuneResult | None,
    started: float,
    nearest: float | None = None,
) -> BlockReport:
    devices.traits(model.device).synchronize(model.device)
    return BlockReport(
        name=name,
        stage=stage.name if stage else "text",
        weights=len(tuned),
        nearest=nearest if nearest is not None or not result else result.start,
        start=result.start if result else None,
        end=result.end if result else None,
        best_iter=result.best_iter if result else 0,
        seconds=time.perf_counter() - started,
        peak_gb=max(devices.peak_memory(model.device).values()),
    )
