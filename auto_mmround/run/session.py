"""A model with its calibration samples, and the one walk that takes them through the blocks of a
stage."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from auto_mmround.calibration.inputs import ModelInput
from auto_mmround.model import devices
from auto_mmround.model.capture import capture
from auto_mmround.model.chains import Chain, Modalities, Runner, as_dtype, run_plainly
from auto_mmround.model.compiled import Compiled
from auto_mmround.model.experts import Expert, separable, separated
from auto_mmround.model.fisher import Fisher, FisherPasses, draws_of, spread
from auto_mmround.model.streaming import Holder, InMemory, device_of
from auto_mmround.model.structure import Stage
from auto_mmround.numerics.moments import Moments
from auto_mmround.numerics.rounding import PLAIN, Kernels, moved, put
from auto_mmround.numerics.start import Collector, StartConfig, collecting, is_expert
from auto_mmround.numerics.tuner import HELD_OUT
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run.fisher import measure_fisher, places_of
from auto_mmround.run.loss_weights import Weights, modalities_of, samples_a_step
from auto_mmround.run.out_of_memory import FEWER, BatchSize, Places, moved_away
from auto_mmround.run.plan import Plan, WeightPlan
from auto_mmround.run.processes import ALONE, Processes
from auto_mmround.run.served import ServedInputs

# Blocks of a class that are worth compiling it unasked: a minute or so, against a second a block.
# Experts that run one after another are not: their code is as many pieces as there are experts.
MANY = 12

# Tokens that second moments are taken over, and at least as many a column: more change little, and
# each costs a forward pass, and its weight costs two.
TOKENS, PER_COLUMN = 2**15, 4
# Sign steps that see a sample: a sample's way through the blocks costs nearly as much as one.
SEEN = 2

T = TypeVar("T")
Told = Callable[[int, int], None]  # (done, total)


class Window(NamedTuple):
    """Consecutive blocks of a stage. first: index of the first one."""

    names: Sequence[str]
    first: int
    blocks: Sequence[nn.Module]


@dataclass(frozen=True)
class Session:
    """What everything that runs calibration samples through a model needs.

    inputs: the samples. disk: puts a hidden state into a file. batch: how many samples run
      together. served: what rounds the inputs of the student's layers.
    """

    model: PreTrainedModel
    recipe: Recipe
    plan: Plan
    inputs: Sequence[ModelInput]
    disk: Callable[[Tensor], Tensor] = Tensor.cpu
    holder: Holder = field(default_factory=InMemory)
    processes: Processes = ALONE
    batch: BatchSize = field(default_factory=BatchSize)
    served: ServedInputs = field(default_factory=ServedInputs)

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
    def modalities(self) -> list[Modalities]:
        """Modalities of every sample's tokens."""
        return modalities_of(self.inputs)

    @cached_property
    def experts(self) -> Mapping[str, Expert]:
        """Experts that lie in stacks."""
        return separable(self.model)

    @cached_property
    def runner(self) -> Runner:
        """How blocks are called."""
        asked, traits = self.recipe.enable_torch_compile, devices.traits(self.device)
        if asked is None:
            asked = traits.compiles and not self.experts and self._alike() >= MANY
        return Compiled(traits.compiler) if asked else run_plainly

    @cached_property
    def kernels(self) -> Kernels:
        """What sign steps do with every element of a weight: compiled where blocks are."""
        if not isinstance(self.runner, Compiled):
            return PLAIN
        return Kernels(self.runner.of(moved), self.runner.of(put), in_pieces=False)

    def _alike(self) -> int:
        """How many of the blocks are of one class."""
        names = (name for stage in self.plan.stages for name in stage.blocks)
        kinds = Counter(type(self.model.get_submodule(name)) for name in names)
        return max(kinds.values(), default=0)

    @property
    def solving(self) -> StartConfig:
        """How weights are solved."""
        order: Any = self.recipe.actorder
        return StartConfig(
            self.recipe.dampening, order, self.recipe.block_size, retarget=self.recipe.retarget
        )

    def precision(self) -> AbstractContextManager:
        """What blocks compute in."""
        return devices.autocast(self.device, self.dtype, self.recipe.amp)

    def exactly(self) -> AbstractContextManager:
        """Compute in the dtype of the weights, where outputs are compared."""
        return torch.autocast(self.device.type, enabled=False)

    def of(self, samples: Sequence[int]) -> "Session":
        """The same with some of the samples."""
        return replace(self, inputs=[self.inputs[i] for i in samples])

    def weights(self, layers: Iterable[str] | None = None) -> Weights:
        """The weights of errors, by the model as it is now. layers: whose tokens get weights, too;
        default the planned ones."""
        fisher = Fisher()
        if self.recipe.fisher and self.recipe.closed_form:
            fisher = self.fisher(self.plan.quantized if layers is None else layers)
        return Weights(self.modalities, fisher)

    @cached_property
    def used(self) -> list[int]:
        """Those of this process's samples that pass the blocks: as many as sign steps, held-out
        errors and second moments need. All where experts share the tokens, where ranges of inputs
        are measured, where only a part may reach a tower, and without closed form."""
        mine = self.processes.share(range(len(self.inputs)))
        ranges = any(w.scheme and w.scheme.inputs_measured for w in self.plan.weights)
        towers = any(stage.name != "text" for stage in self.plan.stages)
        parted = towers and len(spread(self.modalities, 0)) > 1
        if self._routes or ranges or parted or not self.recipe.closed_form:
            return mine
        tokens = sum(len(own.text_T) for own in self.modalities) // max(1, len(self.modalities))
        step = samples_a_step(self.recipe, tokens)
        steps = max(step, self.recipe.steps * step // SEEN, HELD_OUT)
        return self._spread(mine, max(self._enough, (steps + HELD_OUT) * tokens))

    @cached_property
    def sampled(self) -> list[int]:
        """The part of `used` for second moments, and for the weights of their tokens: `TOKENS` of
        text, more where a layer is wide. All of `used` where experts share the tokens."""
        return self.used if self._routes else self._spread(self.used, self._enough)

    @property
    def _routes(self) -> bool:
        """Whether experts share the tokens."""
        return any(weight.scheme and is_expert(weight.name) for weight in self.plan.weights)

    @property
    def _enough(self) -> int:
        """Tokens of text for second moments."""
        widths = (weight.in_features for weight in self.plan.weights if weight.scheme)
        return max(TOKENS, PER_COLUMN * max(widths, default=0))

    def _spread(self, samples: Sequence[int], tokens: int) -> list[int]:
        """This process's part of so many tokens, of every mixture of modalities alike."""
        own = [self.modalities[i] for i in samples]
        return [samples[i] for i in spread(own, tokens // self.processes.count)]

    def measured(self, chain: Chain) -> list[int] | None:
        """The chain's entries of those samples; None: all, as where none of them is in the
        chain."""
        sampled = set(self.sampled)
        return [i for i, sample in enumerate(chain.sample) if sample in sampled] or None

    @property
    def draws(self) -> int:
        """Gradients of each sample for the Fisher information; in all processes the same."""
        own = self.modalities
        samples = len(own) if self._routes else len(spread(own, self._enough))
        return draws_of(samples, self.recipe.gradients)

    def fisher(self, layers: Iterable[str], draws: int | None = None) -> Fisher:
        """The Fisher information at the outputs of the blocks, and of some layers."""
        how = FisherPasses(
            self.recipe.seed, self.precision, weighed=self.sampled,
            draws=self.draws if draws is None else draws, share=self.processes.share,
            add_up=lambda sums: self.processes.add_named(sums, self.device),
            here=self.processes.here,
        )  # fmt: skip
        places = places_of(self.device, self.disk, self.recipe.offload_states)
        return measure_fisher(
            self.model, self.plan.stages, self.batches, self.modalities, layers, how, self.holder,
            places,
        )  # fmt: skip

    def record(
        self,
        stages: Sequence[Stage],
        told: Told = lambda done, total: None,
        what: str = "capturing inputs",
        helps: str = FEWER,
        samples: Sequence[int] | None = None,
    ) -> dict[str, Chain]:
        """The chains of the stages that samples reach, each before its first block. samples: this
        process's; None: all. Raises UserError for a stage whose replay is not the model, and where
        memory does not suffice."""
        chosen = self.processes.share(range(len(self.batches)))
        chosen = chosen if samples is None else list(samples)
        run = partial(
            capture, self.model, stages, self.batches, precision=self.precision, only=chosen,
            on_sample=lambda i: told(chosen.index(i) + 1, len(chosen)),
        )  # fmt: skip
        recorded = Places.of(self.recipe, self.device, self.disk).fitting(what, run, helps)
        chains = self.processes.complete(recorded, stages)
        return {
            path: replace(chain, runner=self.runner, device=self.device)
            for path, chain in chains.items()
        }

    @contextmanager
    def opened(self, names: Sequence[str]) -> Iterator[list[nn.Module]]:
        """Some blocks, in memory, with their experts apart, computing in the run's precision."""
        with (
            self.holder.resident(names),
            separated(self.model, self.experts, names),
            self.precision(),
        ):
            yield [self.model.get_submodule(name) for name in names]

    @contextmanager
    def serving(self, blocks: Sequence[str]) -> Iterator[None]:
        """Layers of these blocks, which are finished, round their inputs while the whole model
        runs."""
        rounding = {
            block: [w for w in self.plan.of_block(block) if w.scheme and w.scheme.act_bits < 16]
            for block in blocks
        }
        stacked = [b for b, own in rounding.items() if any(w.name in self.experts for w in own)]
        in_turn = stacked if self.holder.blocks else []
        with ExitStack() as stack:
            for block in in_turn:
                stack.enter_context(self._serving_in_turn(block, rounding.pop(block)))
            if set(stacked) - set(in_turn):
                stack.enter_context(separated(self.model, self.experts, stacked))
            planned = [weight for own in rounding.values() for weight in own]
            stack.enter_context(self.served.rounding(self.model, planned))
            yield

    @contextmanager
    def _serving_in_turn(self, block: str, planned: Sequence[WeightPlan]) -> Iterator[None]:
        """`serving` for a block whose stacked experts are in memory only while it runs."""
        running = ExitStack()

        def enter(module: nn.Module, args: Any) -> None:
            running.enter_context(separated(self.model, self.experts, [block], known=True))
            running.enter_context(self.served.rounding(self.model, planned))

        def leave(*_: Any) -> None:
            running.close()

        module = self.model.get_submodule(block)
        with running, ExitStack() as hooks:
            # behind the hook that reads the block
            hooks.callback(module.register_forward_pre_hook(enter).remove)
            hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
            yield

    def walk(
        self,
        stage: Stage,
        visit: Callable[[Window], None],
        behind: Callable[[Window], None] = lambda window: None,
        width: int = 1,
        skip: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """Call ``visit`` for the blocks of a stage in order, opened, ``width`` at a time; then
        ``behind``, closed again. skip: windows that begin with such a block are passed by,
        unopened."""
        for first in range(0, len(stage.blocks), width):
            names = stage.blocks[first : first + width]
            if skip(names[0]):
                continue
            with self.opened(names) as blocks:
                window = Window(names, first, blocks)
                visit(window)
            devices.trim_heap()
            behind(window)

    def push(
        self,
        chain: Chain,
        visit: Callable[[Chain, Window], Chain],
        skip: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """`walk` with the chain before each block; ``visit`` returns the chain behind it."""

        def at(window: Window) -> None:
            nonlocal chain
            chain = visit(chain, window)

        self.walk(chain.stage, at, skip=skip)

    def fitting(
        self, what: str, attempt: Callable[[int], T], chains: Sequence[Chain], helps: str = FEWER
    ) -> T:
        """The result of ``attempt(samples at a time)``, tried with fewer, then with the chains'
        states moved away, until memory suffices. Raises UserError when nothing helps."""

        def compiled(size: int) -> T:
            runner = self.runner
            work = partial(attempt, size)
            return runner.or_plainly(work) if isinstance(runner, Compiled) else work()

        return self.batch.fitting(what, compiled, partial(moved_away, chains, self.disk), helps)

    def moments(
        self,
        chain: Chain,
        window: Window,
        names: Sequence[str],
        weights: Weights | None,
        size: int,
        teacher: Chain | None = None,
    ) -> dict[str, Moments]:
        """Layer -> second moments of its inputs, as the chain passes the blocks; over all
        processes.

        names: the layers. weights: of their tokens; None: all count alike. size: samples at a time.
        teacher: the cross moments with its inputs are taken too, see `gptq.retarget`.
        """
        with self.collecting(chain, window, names, weights, teacher) as (collected, begin):
            chain.passed(window.blocks, window.first, size, self.measured(chain), begin)
            return self.processes.add_moments(collected.moments(), self.device)

    @contextmanager
    def collecting(
        self,
        chain: Chain,
        window: Window,
        names: Sequence[str],
        weights: Weights | None,
        teacher: Chain | None = None,
    ) -> Iterator[tuple[Collector, Callable[[list[int]], None]]]:
        """What collects second moments while the chain passes the blocks, and what to call before
        each group."""
        layers = {name: self.model.get_submodule(name) for name in names}
        current: list[int] = []
        entries = self.measured(chain) or range(len(chain))

        @cache  # the layers that are asked about are few: of those that share an input, one
        def all_of(name: str) -> Mapping[int, Tensor]:
            assert weights is not None
            parts_T = weights.of_tokens(chain, name, entries)
            whole = torch.cat(parts_T).to(chain.device or parts_T[0].device)  # one copy for all
            return dict(zip(entries, whole.split([len(part_T) for part_T in parts_T]), strict=True))

        def weigh(name: str) -> Tensor | None:
            if weights is None:
                return None
            known = all_of(name)
            # A sample that nothing was measured on counts nothing, where all samples pass.
            parts_T = [
                known[i]
                if i in known
                else torch.zeros(chain.hidden[i].shape[:-1].numel(), device=chain.device)
                for i in current
            ]
            return torch.cat(parts_T) if len(parts_T) > 1 else parts_T[0]

        with torch.no_grad(), collecting(layers, weigh, teacher is not None) as collected:

            def begin(group: list[int]) -> None:
                current[:] = group
                if teacher is not None:
                    collected.next_pass(teacher=True)
                    with self.served.untouched():
                        teacher.run_group(window.blocks, window.first, group)
                collected.next_pass()

            yield collected, begin
