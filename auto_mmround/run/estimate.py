"""What a run will take: minutes, memory, disk; from a few seconds of its own work on this machine.

One block of each kind is run, measured, solved and tuned as the run would do it, on few samples;
all the rest is counting how often. The model is left as it was.
"""

import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch

from auto_mmround.errors import UserError
from auto_mmround.model import devices
from auto_mmround.model.chains import Chain, map_tensors
from auto_mmround.model.compiled import Compiled
from auto_mmround.model.fisher import Fisher
from auto_mmround.model.pairs import shape_signature
from auto_mmround.numerics.moments import Moments
from auto_mmround.numerics.tuner import (
    TuneConfig,
    TunedWeight,
    held_out_split,
    looked_at,
    tune_block,
)
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run.job import Job
from auto_mmround.run.leaves import leaves_of, rounded, starting
from auto_mmround.run.loss_weights import samples_a_step, tokens_of
from auto_mmround.run.met import naming
from auto_mmround.run.out_of_memory import phase
from auto_mmround.run.session import Session, Window
from auto_mmround.run.static_inputs import scales_of_window
from auto_mmround.run.writing_cost import standing, writing

BUDGET = 20.0  # seconds that measuring may take, about
SHARE = 0.9  # of what is free that a run may plan to use
BACKWARD = 1.1  # a pass back to the inputs of all blocks, in passes forward


@dataclass(frozen=True)
class Estimate:
    """seconds by part of the run. memory, free_memory: bytes at the peak, and bytes that this
    process can have; of the device, where that has memory of its own. sizes: bytes of each folder
    that will be written, by format. used: of how many samples pass the blocks. presets: seconds of
    the whole run with each."""

    seconds: Mapping[str, float]
    memory: int
    free_memory: int
    sizes: Mapping[str, int]
    free_disk: int
    used: tuple[int, int] = (0, 0)
    advice: tuple[str, ...] = ()
    presets: Mapping[str, float] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether memory and disk suffice."""
        return self.memory <= self.free_memory and sum(self.sizes.values()) <= self.free_disk


@dataclass
class BlockCost:
    """Seconds of one block: a sample through it, the same while moments are added up, a step, what
    comes once; and what the first block of its kind takes longer to be compiled."""

    forward: float = 0.0
    moments: float = 0.0
    step: float = 0.0
    once: float = 0.0
    compiling: float = 0.0

    def seconds(self, runs: float, measured: float, steps: float) -> float:
        """runs: samples through the block, all times together. measured: samples of the second
        moments. steps: of as many samples as `step` was measured with."""
        return runs * self.forward + measured * self.moments + steps * self.step + self.once


@dataclass
class _Probe:
    """A session that is timed. deadline: of the clock, for what can be left out."""

    session: Session
    deadline: float
    clock: Callable[[], float]
    known: dict[Any, BlockCost] = field(default_factory=dict)

    def timed(self, work: Callable[[], Any], least: float = 0.3) -> float:
        """Seconds of ``work``: the median of as many runs as fit in ``least`` seconds, at least
        one."""
        seconds: list[float] = []
        device = self.session.device
        while not seconds or (sum(seconds) < least and len(seconds) < 9):
            started = self.clock()
            work()
            devices.traits(device).synchronize(device)
            seconds.append(self.clock() - started)
        return statistics.median(seconds)

    def capture(self, only: Sequence[int]) -> tuple[dict[str, Chain], float, float]:
        """Chains of some samples; seconds a sample, and of what is done once (the proof that a
        replay is the model)."""
        marks = [self.clock()]
        chains = self.session.of(only).record(
            self.session.plan.stages, lambda done, total: marks.append(self.clock()), "planning"
        )
        each = [after - before for before, after in pairwise(marks)]
        usual = statistics.median(each[1:]) if len(each) > 1 else each[0] / 4
        return chains, usual, max(0.0, sum(each) - usual * len(each))

    def fisher(self) -> float:
        """Seconds of the Fisher information, from one sample and then two."""
        wanted = len(self.session.sampled)
        at = len(self.session.inputs) // 2

        def run(samples: Sequence[int]) -> Fisher:
            return self.session.of(samples).fisher(self.session.plan.quantized, self.session.draws)

        one = self.timed(lambda: run([at]), 0.0)
        if wanted == 1 or self.clock() + 2 * one > self.deadline:
            return one * wanted
        two = self.timed(lambda: run([at, at]), 0.0)
        return one + (wanted - 1) * max(two - one, one / 4)

    def costs(self, chain: Chain) -> list[BlockCost]:
        """The cost of every block of a chain's stage: one of each kind is measured, the others cost
        the same.

        Samples go from block to block only where blocks leave something for later ones; else all
        are given the first one's hidden states, which cost the same.
        """
        handed_on = any(chain.shared)
        alike = [self._like(chain, name) for name in chain.stage.blocks]

        def visit(chain: Chain, window: Window) -> Chain:
            like = alike[window.first]
            if like not in self.known:
                self.known[like] = self._measure(chain, window)
            if handed_on:
                return chain.advanced(window.blocks, window.first, self.session.recipe.batch)
            return chain

        def skip(name: str) -> bool:
            return not handed_on and self._like(chain, name) in self.known

        self.session.push(chain, visit, skip)
        return [self.known[like] for like in alike]

    def _like(self, chain: Chain, name: str) -> Any:
        """Equal for blocks that cost the same."""
        return chain.stage.path, shape_signature(self.session.model.get_submodule(name))

    def _measure(self, chain: Chain, window: Window) -> BlockCost:
        session = self.session
        recipe = self.session.recipe
        count = len(chain)
        started = self.clock()
        planned = [weight for name in window.names for weight in session.plan.of_block(name)]
        run = partial(chain.advanced, window.blocks, window.first, recipe.batch)
        target, first = run(), self.clock() - started  # the first time is not the usual one
        cost = BlockCost(self.timed(run) / count)
        cost.compiling = self._compiling(first - cost.forward * count)
        size, served = recipe.batch, session.served
        served.measured |= scales_of_window(session, chain, window, planned, size)
        with served.rounding(session.model, planned):
            self._measure_tuning(chain, window, target, cost)
        return cost

    def _measure_tuning(self, chain: Chain, window: Window, target: Chain, cost: BlockCost) -> None:
        session, recipe, count = self.session, self.session.recipe, len(chain)
        planned = [weight for name in window.names for weight in session.plan.of_block(name)]
        moments: dict[str, Moments] = {}
        if recipe.closed_form:
            started = self.clock()
            moments = session.moments(
                chain, window, [weight.name for weight in planned], None, recipe.batch
            )
            cost.moments = (self.clock() - started) / count
        started = self.clock()
        leaves = leaves_of(session.model, planned)
        with rounded(leaves, keep=False):
            if recipe.closed_form:
                plain = replace(session.solving, retarget=False)
                roundings = {name: leaf.rounding for name, leaf in leaves.items()}
                starting(recipe.how)(roundings, moments, plain)
            cost.once = self.clock() - started
            if recipe.steps:
                steps = partial(self._step, chain, window, leaves, target, cost.forward * count)
                first = steps() if self.compiled else 0.0
                cost.step = steps()
                cost.compiling += self._compiling(2 * (first - cost.step))

    @property
    def compiled(self) -> bool:
        """Whether blocks are compiled when they first run."""
        return isinstance(self.session.runner, Compiled)

    def _compiling(self, more: float) -> float:
        return max(0.0, more) if self.compiled else 0.0

    def _step(
        self,
        chain: Chain,
        window: Window,
        leaves: Mapping[str, TunedWeight],
        target: Chain,
        all_: float,
    ) -> float:
        """Seconds of a step: two steps by way of the tuner, less the two looks at all samples that
        it takes."""
        recipe = self.session.recipe
        samples = samples_a_step(recipe, tokens_of(chain) // len(chain), chain.stage.name)
        config = TuneConfig(2, 0.001, 0.001, recipe.batch, samples, checks=1)

        def forward(indices: Sequence[int]) -> Any:
            for group, output in chain.forward(window.blocks, window.first, indices):
                wanted = torch.cat([target.hidden[i] for i in group]).to(output.device)
                yield output, wanted, torch.ones_like(wanted[..., :1])

        took = self.timed(
            lambda: tune_block(
                list(leaves.values()), forward, len(chain), config, kernels=self.session.kernels
            ),
            0.0,
        )
        drawn = min(samples, len(chain))
        wanted = min(samples, len(self.session.used))
        return max(took - 2 * all_, took / 4) / 2 * wanted / drawn


def estimate(
    job: Job, budget: float = BUDGET, clock: Callable[[], float] = time.perf_counter
) -> Estimate:
    """Measure for about ``budget`` seconds, then count. Nothing of the model changes.

    clock: what seconds are; `time.process_time` leaves out what other work on the machine takes.
    """
    place = job.loaded.model.device
    traits = devices.traits(place)
    sizes, seconds_writing = writing(job, clock)
    seconds, states, more = dict[str, float](), 0, dict[str, float]()
    used = 0, len(job.inputs)
    with _high_water(place) as peak:
        if job.recipe.calibrates:
            session = Session(
                job.loaded.model, job.recipe, job.plan, job.inputs, holder=job.loaded.holder
            )
            used = len(session.used), len(job.inputs)
            helps = "lower --batch_size or --seqlen, or use a larger machine"
            with phase("planning", helps), naming(job.inputs):
                seconds, states, more = _calibrated(
                    _Probe(session, clock() + budget, clock), budget
                )
    memory = peak() + states
    own = psutil.Process().memory_info().rss if place.type == "cpu" else 0
    seconds["writing"] = seconds_writing
    costs = Estimate(
        seconds=seconds,
        memory=memory,
        free_memory=int(SHARE * (traits.free(place) + own)),
        sizes=sizes,
        free_disk=int(SHARE * shutil.disk_usage(standing(Path(job.recipe.output_dir))).free),
        used=used,
    )
    presets = {name: sum(seconds.values()) + rest for name, rest in more.items()}
    return replace(costs, advice=tuple(_advice(job, costs, states)), presets=presets)


def _calibrated(probe: _Probe, budget: float) -> tuple[dict[str, float], int, dict[str, float]]:
    """Seconds by part; bytes of the hidden states that a run keeps; by preset, seconds more than
    the recipe's."""
    recipe, stages = probe.session.recipe, probe.session.plan.stages
    lengths = [len(own.text_T) for own in probe.session.modalities]
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    chains, each, once = probe.capture(by_length[len(by_length) // 2 :][:1])
    most = min(len(lengths), 8, recipe.step_samples)
    count = max(1, min(most, int(budget / 8 / max(each, 1e-3))))
    chosen = [by_length[(2 * i + 1) * len(by_length) // (2 * count)] for i in range(count)]
    chains, each, once = probe.capture(chosen)
    length = sum(lengths[i] for i in chosen) / count

    def alike(session: Session) -> float:
        return sum(lengths[i] for i in session.used) / length

    samples = alike(probe.session)
    captures = len(stages) if recipe.enable_quanted_input else 1
    seconds = {"capture": captures * (each * samples + once)}
    others = {
        name: replace(probe.session, recipe=recipe.with_preset(name)) for name in recipe.how.presets
    }
    states, by_preset = 0, dict.fromkeys(others, 0.0)
    if recipe.fisher and recipe.closed_form:
        with torch.no_grad():
            seconds["Fisher information"] = took = probe.fisher()
        a_draw = took / (1 / BACKWARD + probe.session.draws)
        by_preset = {
            name: a_draw * (other.draws - probe.session.draws) for name, other in others.items()
        }
    for stage in stages:
        if stage.path not in chains:
            raise UserError(
                f"{stage.path}: no estimate, none of the samples tried reaches this stage"
            )
        chain = chains[stage.path]
        each_of, costs = len(chain) / count, probe.costs(chain)
        own = _blocks(probe.session, recipe, chain, costs, each_of * samples)
        seconds[f"{stage.name} blocks"] = own
        for name, other in others.items():
            by_preset[name] += _blocks(other, recipe, chain, costs, each_of * alike(other)) - own
        passes = 1 + recipe.enable_quanted_input
        states += round(_bytes_kept(chain, 2 * passes) * samples / count)
    if probe.compiled:
        seconds["compiling"] = sum(cost.compiling for cost in probe.known.values())
    return seconds, states, by_preset


def _blocks(
    session: Session, measured: Recipe, chain: Chain, costs: Sequence[BlockCost], entries: float
) -> float:
    """Seconds of a stage's blocks. measured: the recipe that their steps were timed with. chain: of
    some samples. entries: of the whole chain."""
    recipe, share = session.recipe, len(session.sampled) / len(session.used)
    steps = range(1, recipe.steps + 1)
    looks = 1 + recipe.closed_form + sum(looked_at(step, recipe.steps) for step in steps)
    runs = (1 + recipe.enable_quanted_input) * entries
    runs += looks * len(held_out_split(round(entries))[1])
    tokens = tokens_of(chain) // len(chain)
    now, then = (
        min(samples_a_step(each, tokens, chain.stage.name), entries) for each in (recipe, measured)
    )
    return sum(cost.seconds(runs, share * entries, now / then * recipe.steps) for cost in costs)


def _bytes_kept(chain: Chain, copies: int) -> int:
    """Hidden states in as many copies as teacher, target and student make, and once what blocks are
    called with."""
    hidden = sum(tensor.nbytes for tensor in chain.hidden)
    seen: dict[int, int] = {}
    for call in (call for calls in chain.calls for call in calls):
        map_tensors(
            (call.args, call.kwargs), lambda tensor: seen.update({tensor.data_ptr(): tensor.nbytes})
        )
    return (1 + copies) * hidden + sum(seen.values())


@contextmanager
def _high_water(place: torch.device) -> Iterator[Callable[[], int]]:
    """Gives a function for the most bytes in use since then, of this process or of its device.

    Linux forgets the old peak when it is asked to; elsewhere it stays, so that the figure may be
    too high.
    """
    measured = devices.traits(place).peak
    if measured:
        yield partial(measured, place)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    yield _peak


def _peak() -> int:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    if kilobytes:
        return 1000 * kilobytes[0]
    return int(devices.peak_memory(torch.device("cpu"))["process"] * 1e9)


def _advice(job: Job, costs: Estimate, states: int) -> Iterator[str]:
    """Flags that make the run fit, the most useful first."""
    disk = sum(costs.sizes.values())
    if disk > costs.free_disk:
        yield f"--output_dir on a disk with {disk / 1e9:.1f} GB free, or fewer formats"
    over = costs.memory - costs.free_memory
    if over <= 0:
        return
    recipe = job.recipe
    if recipe.calibrates and 0.9 * states > over:
        yield f"--nsamples {max(8, int(costs.used[0] * (1 - over / (0.9 * states))))}"
    if job.loaded.model.device.type != "cpu" and not recipe.low_gpu_mem_usage and states > over:
        yield "--low_gpu_mem_usage"
    if recipe.calibrates and recipe.batch > 1:
        yield (
            "--batch_size 1 --gradient_accumulate_steps"
            f" {recipe.batch * recipe.gradient_accumulate_steps}"
        )
    if recipe.calibrates:
        yield "--algorithm rtn, which needs no calibration"
