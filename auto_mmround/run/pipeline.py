"""The one journey: capture, then block by block teach, tune, hand over; towers first, then text."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from transformers import PreTrainedModel

from auto_mmround.calibration.inputs import ModelInput, bucket, padded
from auto_mmround.calibration.named import STAND_IN
from auto_mmround.errors import UserError
from auto_mmround.model import devices
from auto_mmround.model.capture import recapture
from auto_mmround.model.chains import Chain
from auto_mmround.model.divergence import Before
from auto_mmround.model.experts import separated
from auto_mmround.model.streaming import Holder, InMemory, device_of
from auto_mmround.model.structure import READS, Stage
from auto_mmround.numerics.grids import Codes
from auto_mmround.numerics.moments import Moments
from auto_mmround.numerics.start import in_turn
from auto_mmround.numerics.tuner import TunedWeight, held_out_split, mean_error, tune_block
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run.block_loss import forward_of, tune_config
from auto_mmround.run.equalize import equalize
from auto_mmround.run.finished import Finished
from auto_mmround.run.kv_cache import kv_scales
from auto_mmround.run.layers import LayerErrors
from auto_mmround.run.leaves import codes_of, leaves_of, rounded, starting, write_back
from auto_mmround.run.loss_weights import Weights, samples_a_step, tokens_of
from auto_mmround.run.nearest import Nearest, errors_by_sample
from auto_mmround.run.out_of_memory import SHORTER, BatchSize, Graph, moved_away, phase
from auto_mmround.run.output_head import HeadTuner
from auto_mmround.run.plan import Plan, WeightPlan, grid_of
from auto_mmround.run.polish import PolishSteps, listen, polish
from auto_mmround.run.processes import ALONE, Processes
from auto_mmround.run.ranges import check_equalized
from auto_mmround.run.record import BlockReport, block_report
from auto_mmround.run.session import Session, Window
from auto_mmround.run.static_inputs import input_scales, scales_of_window

OUTSIDE = "outside the blocks"
KEPT = f"finished blocks are kept, {SHORTER}"

log = logging.getLogger("auto_mmround")


@dataclass(frozen=True)
class Watcher:
    """What a run tells the outside world; the default keeps silent."""

    captured: Callable[[int, int], None] = lambda done, total: None
    step: Callable[[str, int, int], None] = lambda block, step, total: None
    block: Callable[[BlockReport], None] = lambda report: None
    writing: Callable[[], None] = lambda: None  # all blocks are done, and folders come next


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
    """Quantize the planned weights in place; a block's codes and report go to ``finished`` at once.

    inputs: calibration samples with ``kwargs`` (what the model takes) and ``modality_T``; not
    needed for rounding to nearest without equalization. What ``finished`` (of several processes:
    the first one's) holds is not tuned again. The model's parameters hold the dequantized weights
    afterwards, unless ``holder`` streams its blocks.
    """
    if devices.traits(device_of(model)).padded:
        inputs = [padded(sample, bucket(len(sample.modality_T))) for sample in inputs]
    watcher = watcher or Watcher()
    session = Session(
        model, recipe, plan, inputs, finished.spool, holder or InMemory(), processes,
        BatchSize(recipe.batch),
    )  # fmt: skip
    if recipe.equalize != "none":
        with phase("equalizing"):
            equalize(replace(session, processes=ALONE), watcher.captured)  # all samples
        check_equalized(model, plan)
    early = plan.weights if not recipe.calibrates else [w for w in plan.weights if not w.block]
    session.served.measured |= input_scales(session, early, watcher.captured)
    journey = _Journey(session, finished, watcher)
    with phase("polish", f"leave --polish out, or {SHORTER}"):
        teacher = listen(session) if recipe.polish else None
    done = all(finished.has(stage.blocks) for stage in plan.stages)
    if recipe.calibrates and not processes.gather(done)[0]:
        journey.run()
    else:
        for stage in plan.stages:
            for block in stage.blocks:
                with phase(block):
                    journey.nearest(block, stage.name, plan.of_block(block))
    outside = [weight for weight in plan.weights if weight.scheme and weight.block is None]
    if outside:  # the output head
        with phase(OUTSIDE):
            journey.nearest(OUTSIDE, "text", outside)
    if teacher:
        journey.polish(teacher)
    if recipe.kv_cache_scheme is not None:
        with session.serving([block for stage in plan.stages for block in stage.blocks]):
            finished.kv_scales = kv_scales(session, watcher.captured)


def _say_unreached(block: str, count: int, back: bool) -> None:
    """back: the block is rounded to nearest anyway."""
    if count:
        what = "" if back else ": searched scales, not tuned"
        log.warning("%s: %d weights saw no calibration token%s", block, count, what)


def _unreached(stage: Stage) -> str:
    kind = READS.get(stage.name, "")
    wanted = f", e.g. --dataset {STAND_IN[kind]}" if kind else ""
    return (
        f"{stage.path}: no calibration sample reaches this {stage.name} stage; calibrate with"
        f" samples that have {kind or stage.name} input{wanted}, or choose the stages with"
        " to_quant_block_names"
    )


@dataclass(frozen=True)
class _Journey:
    """What every stage of one run shares."""

    session: Session
    finished: Finished
    watcher: Watcher

    @cached_property
    def weights(self) -> Weights:
        """The weights of errors. Ask for them before anything is quantized."""
        with phase("Fisher information"):
            return self.session.weights()

    def run(self) -> None:
        """Tune the stages in order."""
        stages = self.session.plan.stages
        record = partial(self.session.record, told=self.watcher.captured, samples=self.session.used)
        some, every = len(self.session.used), len(self.session.inputs)
        if self.session.processes.count == 1 and some < every:
            log.info("%d of %d samples pass the blocks; more are not needed", some, every)
        teachers = record(stages)
        students = dict(teachers)
        _ = self.weights  # of the untouched model
        for position, stage in enumerate(stages):
            if stage.path not in teachers:
                raise UserError(_unreached(stage))
            self._tune_stage(teachers.pop(stage.path), students.pop(stage.path))
            if stages[position + 1 :] and self.session.recipe.enable_quanted_input:
                # What the quantized stage gets wrong must reach the stages that it feeds.
                before = [block for passed in stages[: position + 1] for block in passed.blocks]
                with self.session.serving(before):
                    students = record(stages[position + 1 :])

    def polish(self, teacher: Before) -> None:
        """Tune scales and norms on the whole model's output."""
        session = self.session
        grids = {
            weight.name: grid_of(weight.scheme) for weight in session.plan.weights if weight.scheme
        }
        graph = Graph(session.model, max(len(sample.modality_T) for sample in session.inputs))
        steps = PolishSteps(batch=session.recipe.batch, seed=session.recipe.seed)
        with (
            separated(session.model, session.experts),
            session.served.rounding(session.model, session.plan.weights),
        ):
            self.finished.polished = BatchSize().fitting(
                "polish",
                lambda size: polish(
                    session.model, self.finished.codes, grids, teacher, steps,
                    on_step=partial(self._stepped, "polish", steps.count), graph=graph,
                ),
                graph.relieve,
                f"finished blocks are kept; leave --polish out, or {SHORTER}",
            )  # fmt: skip

    def nearest(self, name: str, stage: str, planned: Sequence[WeightPlan]) -> None:
        """Round weights to nearest, or take them as they were finished before."""
        session = self.session
        with session.holder.resident([name]), separated(session.model, session.experts, [name]):
            if not self._taken([name], planned):
                started = time.perf_counter()
                solves = name == OUTSIDE and session.recipe.closed_form
                head = HeadTuner.of(session, *planned) if solves else None
                tuned = leaves_of(session.model, planned, session.served.measured)
                with rounded(tuned):
                    head_report: Any = head.tune(*tuned.values()) if head else {}
                    report = block_report(session.device, name, stage, tuned, None, started)
                    self._finish([replace(report, **head_report)], codes_of(tuned))
        if name != OUTSIDE:  # whole passes may follow
            session.holder.replace(name, partial(self._write_back, name, planned))
        self.watcher.block(self.finished.reports[name])

    def _taken(self, names: Sequence[str], planned: Sequence[WeightPlan]) -> bool:
        """Whether the first process finished these blocks before; their weights hold what it found
        then."""
        mine = None
        if self.finished.has(names) and self.session.processes.first:
            reports = [self.finished.reports[name] for name in names]
            mine = reports, {weight.name: self.finished.codes[weight.name] for weight in planned}
        taken = self.session.processes.gather(mine)[0]
        if taken is not None:
            write_back(self.session.model, planned, taken[1])
            self.session.served.take(taken[1])
            if not self.session.processes.first:
                self.finished.add(*taken)
        return taken is not None

    def _finish(self, reports: Sequence[BlockReport], codes: Mapping[str, Codes]) -> None:
        """Keep what belongs to blocks that were tuned together, if all processes found the same."""
        broken = next(
            (name for name, weight in codes.items() if not weight.scale_OG.isfinite().all()), None
        )
        if broken:
            raise UserError(
                f"{broken}: its scales became NaN or infinite; calibrate with other samples, or"
                " --iters 0"
            )
        self.session.processes.agree(reports[0].name, codes)
        self.finished.add(reports, codes)

    def _tune_stage(self, teacher: Chain, student: Chain) -> None:
        """Tune the blocks of a stage in order; ``nblocks`` consecutive ones share a loss."""
        session, recipe = self.session, self.session.recipe
        if teacher.live and recipe.nblocks > 1:
            raise UserError(
                f"{teacher.stage.path}: nblocks must be 1, what blocks are given depends on earlier"
                " ones"
            )

        def visit(window: Window) -> None:
            nonlocal teacher, student
            teacher, student = self._pass(teacher, student, window)

        def behind(window: Window) -> None:
            nonlocal student
            for name in window.names:
                session.holder.replace(
                    name, partial(self._write_back, name, session.plan.of_block(name))
                )
                self.watcher.block(self.finished.reports[name])
            following = window.first + len(window.names)
            if (
                student.live
                and len(student)
                and recipe.enable_quanted_input
                and following < student.stage.depth
            ):
                again = partial(
                    recapture, session.model, student, following, session.batches, session.precision
                )
                relieve = partial(moved_away, [student], session.disk)
                with session.serving(self._before(student.stage, following)):
                    student = BatchSize().fitting(window.names[-1], again, relieve)

        session.walk(teacher.stage, visit, behind, recipe.nblocks)

    def _pass(self, teacher: Chain, student: Chain, window: Window) -> tuple[Chain, Chain]:
        """Quantize the blocks of a window, or take them as they were finished before; the chains
        behind them."""
        session, (names, first, blocks) = self.session, window
        chains = [teacher, student]
        fitting = partial(session.fitting, names[0], chains=chains, helps=KEPT)
        read = self._compared(teacher)
        target = fitting(lambda size: teacher.advanced(blocks, first, size, read))
        chains.append(target)
        planned = [weight for name in names for weight in session.plan.of_block(name)]
        # Several processes measure together: one alone can't start a block again.
        alone = fitting if session.processes.count == 1 else lambda work: work(session.batch.size)
        taken = self._taken(names, planned)
        if not taken:
            measure = partial(scales_of_window, session, student, window, planned)
            session.served.measured |= alone(measure)
        with session.served.rounding(session.model, planned):
            if not taken:
                alone(partial(self._tune, teacher, student, target, window))
            if not session.recipe.enable_quanted_input or names[-1] == student.stage.blocks[-1]:
                return target, target  # nobody reads what the last block gives
            return target, fitting(lambda size: student.advanced(blocks, first, size))

    def _before(self, stage: Stage, count: int) -> list[str]:
        """Blocks of earlier stages, and the first ``count`` of this one."""
        stages = self.session.plan.stages
        earlier = stages[: next(i for i, own in enumerate(stages) if own.path == stage.path)]
        return [*(block for own in earlier for block in own.blocks), *stage.blocks[:count]]

    def _compared(self, teacher: Chain) -> list[int] | None:
        """Entries of a chain whose outputs the student's are compared with: without sign steps only
        the held-out ones. None: all."""
        recipe = self.session.recipe
        if recipe.steps or recipe.retarget or teacher.live or not recipe.enable_quanted_input:
            return None
        count, places = self.session.processes.numbered(teacher)
        return sorted(places[i] for i in held_out_split(count)[1] if i in places)

    def _write_back(self, block: str, planned: Sequence[WeightPlan]) -> None:
        with separated(self.session.model, self.session.experts, [block]):
            write_back(self.session.model, planned, self.finished.codes)

    def _tune(
        self, teacher: Chain, student: Chain, target: Chain, window: Window, batch_size: int
    ) -> None:
        """Tune blocks that share a loss, and keep their codes and reports. If that fails the
        weights are as before."""
        session, recipe, started = self.session, self.session.recipe, time.perf_counter()
        names, first, blocks = window
        loss_weights = self.weights.of_errors(student, names[-1])
        count, places = session.processes.numbered(student)
        tokens = sum(session.processes.gather(tokens_of(student)))
        samples = samples_a_step(recipe, tokens // count, student.stage.name)
        measure = partial(
            session.moments, student, window, weights=self.weights, size=batch_size,
            teacher=teacher if recipe.retarget else None,
        )  # fmt: skip
        planned = [weight.name for name in names for weight in session.plan.of_block(name)]
        moments = measure(planned) if recipe.closed_form else {}
        scales = session.served.measured
        tuned = {n: leaves_of(session.model, session.plan.of_block(n), scales) for n in names}
        leaves = {name: leaf for part in tuned.values() for name, leaf in part.items()}
        forward = forward_of(student, blocks, first, target, loss_weights, places)
        turns = in_turn(moments, names) if recipe.in_turn else []
        unreached = set(leaves) - set(moments) if moments else set()
        with rounded(leaves):
            errors = LayerErrors(leaves, moments)
            errors.note("nearest")
            nearest = self._start(leaves, moments, forward, count, turns, measure, batch_size)
            errors.note("start")
            errors.rest()
            result = tune_block(
                list(leaves.values()),
                forward,
                count,
                tune_config(recipe, first, batch_size, samples),
                on_step=partial(self._stepped, names[-1], recipe.steps),
                add_up=session.processes.add_up if session.processes.count > 1 else None,
                kernels=session.kernels,
            )
            result, back = nearest.at_worst(result, leaves, names[-1])
            errors.note("end", "nearest" if back else "" if recipe.steps else "start")
            reports = []
            for name, part in tuned.items():
                report = block_report(
                    session.device, name, student.stage.name, part, result, started, nearest.error
                )
                missed = len(unreached & set(part))
                reports.append(replace(report, layers=errors.of(part), unreached=missed))
                _say_unreached(name, missed, back)
            self._finish(reports, codes_of(leaves))

    def _stepped(self, block: str, total: int, step: int) -> None:
        devices.traits(self.session.device).mark_step()
        self.watcher.step(block, step, total)

    def _start(
        self,
        leaves: Mapping[str, TunedWeight],
        moments: Mapping[str, Moments],
        forward: Any,
        count: int,
        turns: Sequence[Sequence[str]],
        measure: Callable[[Sequence[str]], dict[str, Moments]],
        batch_size: int,
    ) -> Nearest:
        """Put every weight at the algorithm's start; returns what they were, rounded to nearest.
        Without moments there is no such start.

        turns: groups of layers that are solved one after another, each on what those before it,
          rounded, hand to it.
        """
        if not moments:
            return Nearest()
        held, recipe = held_out_split(count)[1], self.session.recipe
        add_up = self.session.processes.add_up
        error = mean_error(forward, held, batch_size, add_up)
        each = partial(errors_by_sample, forward, held, add_up)
        nearest = Nearest.of({} if recipe.not_use_best_mse else leaves, error, each)
        config, start = self.session.solving, starting(recipe.how)
        waiting = dict(leaves)
        for leaf in leaves.values() if turns else ():
            leaf.show_original()
        for turn in turns:
            fresh = moments if turn is turns[0] else {**moments, **measure(turn)}
            now = {name: waiting.pop(name) for name in turn}
            start({name: leaf.rounding for name, leaf in now.items()}, fresh, config)
            for leaf in now.values():
                leaf.refresh()
        start({name: leaf.rounding for name, leaf in waiting.items()}, moments, config)
        return nearest
