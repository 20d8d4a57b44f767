"""The one journey: capture, then block by block teach, tune, hand over; towers first, then text."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from auto_mmround.calibration.inputs import ModelInput, bucket, padded
from auto_mmround.errors import UserError
from auto_mmround.model import devices
from auto_mmround.model.capture import capture, recapture
from auto_mmround.model.chains import Chain, Runner, as_dtype, run_plainly
from auto_mmround.model.compiled import Compiled
from auto_mmround.model.experts import Expert, separable, separated
from auto_mmround.model.fisher import Fisher
from auto_mmround.model.streaming import Holder, InMemory, device_of
from auto_mmround.model.structure import Stage
from auto_mmround.numerics.gram import Moments
from auto_mmround.numerics.grids import Codes
from auto_mmround.numerics.start import closed_forms, collecting, in_turn
from auto_mmround.numerics.tuner import (
    TunedWeight,
    held_out_split,
    mean_error,
    tune_block,
)
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run.equalize import equalize
from auto_mmround.run.finished import Finished
from auto_mmround.run.fisher import measure_fisher
from auto_mmround.run.journal import BlockReport, block_report
from auto_mmround.run.layers import LayerErrors
from auto_mmround.run.leaves import codes_of, leaves_of, rounded, write_back
from auto_mmround.run.memory import SHORTER, BatchSize, Graph, Places, moved_away, phase
from auto_mmround.run.objective import forward_of, start_config, tune_config
from auto_mmround.run.plan import Plan, WeightPlan, grid_of
from auto_mmround.run.polish import STEPS, Teacher, listen, polish
from auto_mmround.run.processes import ALONE, Processes
from auto_mmround.run.ranges import check_equalized
from auto_mmround.run.static_inputs import input_scales
from auto_mmround.run.weights import Weights, accumulated, kinds_of, tower_tokens

log = logging.getLogger("auto_mmround")


@dataclass(frozen=True)
class Watcher:
    """What a run tells the outside world; the default keeps silent."""

    captured: Callable[[int, int], None] = lambda done, total: None
    step: Callable[[str, int, int], None] = lambda block, step, total: None
    block: Callable[[BlockReport], None] = lambda report: None


def quantize(
    model: PreTrainedModel,
    recipe: Recipe,
    plan: Plan,
    inputs: Sequence[ModelInput],
    finished: Finished,
    watcher: Watcher | None = None,
    holder: Holder | None = None,
    processes: Processes = ALONE,
) -> None:
    """Quantize the planned weights of ``model`` in place; each block's codes and report go to ``finished`` at once.

    inputs: calibration samples with ``kwargs`` (what the model takes) and ``modality_T``; not needed for rounding to
    nearest without equalization. What ``finished`` (of several processes: the first one's) holds is not tuned again.
    The model's parameters hold the dequantized weights afterwards, unless ``holder`` streams its blocks.
    """
    if devices.traits(device_of(model)).padded:
        inputs = [padded(sample, bucket(len(sample.modality_T))) for sample in inputs]
    watcher = watcher or Watcher()
    if recipe.equalize != "none":
        with phase("equalizing"), separated(model):
            equalize(model, recipe, plan, inputs, watcher.captured, finished.spool)
        check_equalized(model, plan)
    journey = _Journey(
        model, recipe, plan, inputs, finished, watcher, holder or InMemory(), separable(model),
        BatchSize(recipe.batch), processes,
        input_scales(model, plan, inputs, amp=recipe.amp, captured=watcher.captured),
    )  # fmt: skip
    with phase("polish", f"leave --polish out, or {SHORTER}"):
        teacher = listen(model, journey.batches, kinds_of(inputs), journey.precision) if recipe.polish else None
    done = all(finished.has(stage.blocks) for stage in plan.stages)
    if recipe.calibrates and not processes.gather(done)[0]:
        journey.run()
    else:
        for stage in plan.stages:
            for block in stage.blocks:
                phase(block)(journey.nearest)(block, stage.name, plan.of_block(block))
    outside = [weight for weight in plan.weights if weight.scheme and weight.block is None]
    if outside:  # no block to measure: rounded to nearest
        phase("outside the blocks")(journey.nearest)("outside the blocks", "text", outside)
    if teacher:
        journey.polish(teacher)


@dataclass(frozen=True)
class _Journey:
    """What every stage of one run shares."""

    model: PreTrainedModel
    recipe: Recipe
    plan: Plan
    inputs: Sequence[ModelInput]
    finished: Finished
    watcher: Watcher
    holder: Holder
    experts: Mapping[str, Expert]
    batch: BatchSize
    processes: Processes
    input_scales: Mapping[str, Tensor]

    @cached_property
    def dtype(self) -> torch.dtype:
        """The model's."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @cached_property
    def device(self) -> torch.device:
        """Where blocks run."""
        return device_of(self.model)

    @cached_property
    def batches(self) -> list[dict[str, Any]]:
        """What the model takes of each sample, in its dtype."""
        return [as_dtype(sample.kwargs, self.dtype) for sample in self.inputs]

    @cached_property
    def weights(self) -> Weights:
        """What errors weigh; to be asked for before anything is quantized."""
        kinds, fisher = kinds_of(self.inputs), Fisher()
        if self.recipe.fisher and self.recipe.closed_form:
            with phase("Fisher information"):
                fisher = measure_fisher(
                    self.model, self.recipe, self.plan.stages, self.batches, kinds, self.plan.quantized,
                    holder=self.holder, precision=self.precision, disk=self._disk, processes=self.processes,
                )  # fmt: skip
        return Weights(kinds, fisher)

    @cached_property
    def runner(self) -> Runner:
        """How blocks are called."""
        return Compiled(devices.traits(self.device).compiler) if self.recipe.enable_torch_compile else run_plainly

    def precision(self) -> AbstractContextManager:
        """What blocks compute in."""
        return devices.autocast(self.device, self.dtype, self.recipe.amp)

    def run(self) -> None:
        """Tune the stages in order."""
        stages = self.plan.stages
        teachers = self._record(stages)
        students = dict(teachers)
        _ = self.weights  # of the untouched model
        for position, stage in enumerate(stages):
            if stage.path not in teachers:
                raise UserError(
                    f"{stage.path}: no calibration sample reaches this {stage.name} stage; calibrate with samples that "
                    f"have {stage.name} input, e.g. --dataset liuhaotian/llava_conv_58k"
                )
            self._tune_stage(teachers.pop(stage.path), students.pop(stage.path))
            if stages[position + 1 :] and self.recipe.enable_quanted_input:
                # What the quantized stage gets wrong must reach the stages that it feeds.
                students = self._record(stages[position + 1 :])

    def _record(self, stages: Sequence[Stage]) -> dict[str, Chain]:
        run = partial(
            capture, self.model, stages, self.batches, precision=self.precision,
            only=self.processes.share(range(len(self.batches))),
            on_sample=lambda i: self.watcher.captured(i + 1, len(self.batches)),
        )  # fmt: skip
        chains = Places.of(self.recipe, self.device, self._disk).fitting("capturing inputs", run)
        whole = self.processes.complete(chains, stages)
        return {path: replace(chain, runner=self.runner, device=self.device) for path, chain in whole.items()}

    def polish(self, teacher: Teacher) -> None:
        """Tune scales and norms on the whole model's output."""
        grids = {weight.name: grid_of(weight.scheme) for weight in self.plan.weights if weight.scheme}
        graph = Graph(self.model, max(len(sample.modality_T) for sample in self.inputs))
        with separated(self.model, self.experts):
            self.finished.polished = BatchSize().fitting(
                "polish",
                lambda size: polish(
                    self.model, self.finished.codes, grids, teacher, batch_size=self.recipe.batch,
                    seed=self.recipe.seed, on_step=partial(self._stepped, "polish", STEPS), graph=graph,
                ),
                graph.relieve,
                f"finished blocks are kept; leave --polish out, or {SHORTER}",
            )  # fmt: skip

    def nearest(self, name: str, stage: str, planned: Sequence[WeightPlan]) -> None:
        """Round weights to nearest, or take them as they were finished before."""
        with self.holder.resident([name]), separated(self.model, self.experts, [name]):
            if not self._taken([name], planned):
                started = time.perf_counter()
                tuned = leaves_of(self.model, planned, self.input_scales)
                with rounded(tuned):
                    self._finish([block_report(self.device, name, stage, tuned, None, started)], codes_of(tuned))
        self.watcher.block(self.finished.reports[name])

    def _taken(self, names: Sequence[str], planned: Sequence[WeightPlan]) -> bool:
        """Whether the first process finished these blocks before; their weights hold what it found then."""
        mine = None
        if self.finished.has(names) and self.processes.first:
            reports = [self.finished.reports[name] for name in names]
            mine = reports, {weight.name: self.finished.codes[weight.name] for weight in planned}
        found = self.processes.gather(mine)[0]
        if found is not None:
            write_back(self.model, planned, found[1])
            if not self.processes.first:
                self.finished.add(*found)
        return found is not None

    def _finish(self, reports: Sequence[BlockReport], codes: Mapping[str, Codes]) -> None:
        """Keep what belongs to blocks that were tuned together, if all processes found the same."""
        broken = next((name for name, weight in codes.items() if not weight.scale_OG.isfinite().all()), None)
        if broken:
            raise UserError(f"{broken}: its scales became NaN or infinite; calibrate with other samples, or --iters 0")
        self.processes.agree(reports[0].name, codes)
        self.finished.add(reports, codes)

    def _tune_stage(self, teacher: Chain, student: Chain) -> None:
        """Tune the blocks of a stage in order; ``nblocks`` consecutive ones share a loss."""
        names = teacher.stage.blocks
        if teacher.live and self.recipe.nblocks > 1:
            raise UserError(f"{teacher.stage.path}: nblocks must be 1, what blocks are given depends on earlier ones")
        for first in range(0, len(names), self.recipe.nblocks):
            window = names[first : first + self.recipe.nblocks]
            with self.holder.resident(window), separated(self.model, self.experts, window), self.precision():
                teacher, student = self._pass(teacher, student, window, first)
            devices.trim_heap()
            for name in window:
                planned = self.plan.of_block(name)
                self.holder.replace(name, partial(self._write_back, name, planned))
                self.watcher.block(self.finished.reports[name])
            if student.live and len(student) and self.recipe.enable_quanted_input and first + 1 < len(names):
                student = BatchSize().fitting(
                    window[-1],
                    partial(recapture, self.model, student, first + 1, self.batches, self.precision),
                    partial(moved_away, [student], self._disk),
                )

    def _pass(self, teacher: Chain, student: Chain, window: Sequence[str], first: int) -> tuple[Chain, Chain]:
        """Quantize the blocks of a window, or take them as they were finished before; the chains behind them."""
        blocks = [self.model.get_submodule(name) for name in window]
        chains = [teacher, student]
        relieve = partial(moved_away, chains, self._disk)
        read = self._compared(teacher)
        target = self.batch.fitting(window[0], lambda size: teacher.advanced(blocks, first, size, read), relieve)
        chains.append(target)
        if not self._taken(window, [weight for name in window for weight in self.plan.of_block(name)]):
            tune = partial(self._tune, teacher, student, target, blocks, window, first)
            # Several processes measure together: one alone can't start a block again.
            self.batch.fitting(window[0], tune, relieve) if self.processes.count == 1 else tune(self.batch.size)
        if not self.recipe.enable_quanted_input or window[-1] == student.stage.blocks[-1]:
            return target, target  # nobody reads what the last block gives
        return target, self.batch.fitting(window[0], lambda size: student.advanced(blocks, first, size), relieve)

    def _compared(self, teacher: Chain) -> list[int] | None:
        """Entries of a chain whose outputs the student's are compared with: without sign steps only the held-out ones.
        None: all."""
        if self.recipe.steps or self.recipe.retarget or teacher.live or not self.recipe.enable_quanted_input:
            return None
        count, places = self.processes.numbered(teacher)
        return sorted(places[i] for i in held_out_split(count)[1] if i in places)

    def _disk(self, tensor: Tensor) -> Tensor:
        return self.finished.spool(tensor)

    def _write_back(self, block: str, planned: Sequence[WeightPlan]) -> None:
        with separated(self.model, self.experts, [block]):
            write_back(self.model, planned, self.finished.codes)

    def _tune(
        self,
        teacher: Chain,
        student: Chain,
        target: Chain,
        blocks: Sequence[nn.Module],
        window: Sequence[str],
        first: int,
        batch_size: int,
    ) -> None:
        """Tune blocks that share a loss, and keep their codes and reports. If that fails the weights are as before."""
        recipe, started = self.recipe, time.perf_counter()
        loss_weights = self.weights.of_errors(student, window[-1])
        count, places = self.processes.numbered(student)
        accumulate = accumulated(recipe, sum(self.processes.gather(tower_tokens(student))) // count)
        measure = partial(self._moments, teacher, student, blocks, first, batch_size)
        planned = [weight.name for name in window for weight in self.plan.of_block(name)]
        moments = measure(planned) if recipe.closed_form else {}
        tuned = {name: leaves_of(self.model, self.plan.of_block(name)) for name in window}
        leaves = {name: leaf for part in tuned.values() for name, leaf in part.items()}
        forward = forward_of(student, blocks, first, target, loss_weights, places)
        turns = in_turn(moments, window) if recipe.in_turn else []
        unreached = set(leaves) - set(moments) if moments else set()
        with rounded(leaves):
            errors = LayerErrors(leaves, moments)
            errors.note("nearest")
            nearest = self._start(leaves, moments, forward, count, turns, measure, batch_size) if moments else None
            errors.note("start")
            result = tune_block(
                list(leaves.values()),
                forward,
                count,
                tune_config(recipe, first, batch_size, accumulate),
                on_step=partial(self._stepped, window[-1], recipe.steps),
                add_up=self.processes.add_up if self.processes.count > 1 else None,
            )
            errors.note("end", "" if recipe.steps or not moments else "start")
            reports = []
            for name in window:
                report = block_report(self.device, name, student.stage.name, tuned[name], result, started, nearest)
                missed = len(unreached & set(tuned[name]))
                reports.append(replace(report, layers=errors.of(tuned[name]), unreached=missed))
                if missed:
                    log.warning("%s: %d weights saw no calibration token: searched scales, not tuned", name, missed)
            self._finish(reports, codes_of(leaves))

    def _stepped(self, block: str, total: int, step: int) -> None:
        devices.traits(self.device).mark_step()
        self.watcher.step(block, step, total)

    def _moments(
        self,
        teacher: Chain,
        student: Chain,
        blocks: Sequence[nn.Module],
        first: int,
        batch_size: int,
        names: Sequence[str],
    ) -> dict[str, Moments]:
        """Second moments of the inputs of some layers, from the student's inputs through the blocks as they are; with
        `retarget` those of the teacher's inputs with them too."""
        layers = {name: self.model.get_submodule(name) for name in names}
        current: list[int] = []

        def weights(name: str) -> Tensor:
            return torch.cat(self.weights.of_tokens(student, name, current))

        with torch.no_grad(), collecting(layers, weights, self.recipe.retarget) as collected:
            for at in range(0, len(student), batch_size):
                for group in student.groups(range(at, min(at + batch_size, len(student))), first):
                    current[:] = group
                    if self.recipe.retarget:
                        collected.next_pass(teacher=True)
                        teacher.run_group(blocks, first, group)
                    collected.next_pass()
                    student.run_group(blocks, first, group)
            return self.processes.add_moments(collected.moments(), self.device)

    def _start(
        self,
        leaves: Mapping[str, TunedWeight],
        moments: Mapping[str, Moments],
        forward: Any,
        count: int,
        turns: Sequence[Sequence[str]],
        measure: Callable[[Sequence[str]], dict[str, Moments]],
        batch_size: int,
    ) -> float:
        """Put every weight at its closed-form start; returns the held-out error of rounding to nearest.

        turns: groups of layers that are solved one after another, each on what those before it, rounded, hand to it.
        """
        nearest = mean_error(forward, held_out_split(count)[1], batch_size, self.processes.add_up)
        config = start_config(self.recipe)
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
