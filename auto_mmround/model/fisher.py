"""The Fisher information of the model's output distribution at each block's output.

For every sample two labels a position are drawn from the model's prediction. The difference of
their log probabilities is run backwards; where samples are few, this is done several times. The
mean squared gradient at a block's output is the diagonal of the Fisher information there: the
second-order change of KL(model || changed model) for a small change of that channel, for tokens of
that modality. The first tokens of a text have rows of their own, because they are much alike in all
samples. One of them often is a sink of attention: its hidden state is a thousand times as large as
others, but hardly matters to the output.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from auto_mmround.modalities import PAD
from auto_mmround.model import devices
from auto_mmround.model.abreast import abreast
from auto_mmround.model.chains import (
    Modalities,
    Precision,
    first_tensor,
    hidden_of,
    moved,
    with_hidden,
)
from auto_mmround.model.head import ToHead, to_head
from auto_mmround.model.labels import drawn
from auto_mmround.model.squares import Readers, Squares
from auto_mmround.model.streaming import device_of
from auto_mmround.model.structure import Stage

ENOUGH = 2048  # tokens; means of squares over more change the result within noise
DRAWS = 4  # gradients of one sample, at most


@dataclass(frozen=True)
class SideBySide:
    """``count`` samples go through the blocks together, see `abreast`. order: all blocks, in the
    order of a pass. keep: moves a block's inputs to the place where they wait for the backward
    pass."""

    count: int
    order: Sequence[str]
    keep: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Fisher:
    """How much the model's output depends on blocks and tokens. channels: block -> mean squared
    gradient (ROWS, channels) at its output, see `rows_of`. tokens: layer -> sample -> (tokens,)
    weights from the mean squared gradient over the layer's outputs, see `squares.shared`."""

    channels: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: Mapping[str, Mapping[int, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class FisherPasses:
    """How samples are run.

    enough: tokens of text that suffice if no layer's tokens are weighed. weighed: this process's
    samples to run if they are; None: all. draws: gradients of each sample, from labels drawn anew,
    see `draws_of`. side: how several samples go through the blocks together, for blocks that have
    to be read; the result is the same. For several processes:
    ``share`` gives one process its part of the samples, ``add_up`` adds up the sums by block, and
    ``here`` processes share this machine's memory.
    """

    seed: int = 42
    precision: Precision = nullcontext
    enough: int = ENOUGH
    weighed: Sequence[int] | None = None
    draws: int = 1
    side: SideBySide | None = None
    share: Callable[[list[int]], list[int]] = list
    add_up: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    here: int = 1


def measure_fisher(
    model: PreTrainedModel,
    stages: Sequence[Stage],
    inputs: Sequence[Mapping[str, Any]],
    modalities: Sequence[Modalities],
    layers: Iterable[str] = (),
    how: FisherPasses = FisherPasses(),
) -> Fisher:
    """Run the model forward and backward over the samples, with one sample in memory at a time and
    the logits of a few positions.

    All tokens of a tower count as the first row, unless their modalities are known. Modalities
    without tokens have zeros. Weights get no gradients. ``layers``: layers whose tokens get
    weights. With any, the samples ``how.weighed`` are run; else as many as hold ``how.enough``
    tokens of text, see `spread`. Two kinds of layers get no weights of tokens: a layer that runs
    more than once a sample (one image after another), and a layer that stands in for a part of a
    weight (fused experts).
    """
    present = [name for name in layers if _is_there(model, name)]
    if present and how.weighed is not None:
        chosen = list(how.weighed)
    else:
        every = list(range(len(inputs)))
        chosen = how.share(every if present else spread(modalities, how.enough))
    squares, readers = Squares(stages, modalities, present, chosen), Readers()
    spoken = {i: modalities[i].text_T != PAD for i in chosen}
    if chosen:
        mine = {i: inputs[i] for i in chosen}
        passes = _Passes(model, mine, spoken, how.seed, how.draws, how.precision)
        current = [(0, 0)]
        run = passes.to_head()  # before anything watches

        def see(name: str, grad: Tensor) -> None:
            i, draw = current[0]
            squares.add(name, i, _flat(grad), draw)

        with _watching(model, stages, squares.watched, see, readers.see):
            if how.side is None:
                passes.one_by_one(run, current)
            else:
                passes.side_by_side(run, how.side, stages, current)
    return Fisher(*squares.means(how.add_up, spoken, readers.groups))


def _is_there(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


@dataclass(frozen=True)
class _Passes:
    """Runs samples through the model and back. spoken: sample -> bool (T,), the tokens that draw a
    label; all of them for a sample that is not in it."""

    model: PreTrainedModel
    inputs: Mapping[int, Mapping[str, Any]]
    spoken: Mapping[int, Tensor]
    seed: int
    draws: int
    precision: Precision

    def to_head(self) -> ToHead:
        """How to run the model, tried on the first sample."""
        with self.precision():
            return to_head(self.model, self._kwargs(next(iter(self.inputs))))

    def one_by_one(self, run: ToHead, current: list[tuple[int, int]]) -> None:
        """``current[0]`` is the sample whose gradients are made, and which of them."""
        for i in self.inputs:
            with self.precision(), torch.enable_grad():
                hidden_TD, head = self._forward(run, i)
                # else none of the watched ran, as towers don't for plain text
                for draw in range(self.draws if hidden_TD.requires_grad else 0):
                    current[0] = i, draw
                    grad_TD = self._gradient(current[0], hidden_TD, head)
                    hidden_TD.backward(grad_TD, retain_graph=draw + 1 < self.draws)
            del hidden_TD
            devices.trim_heap()

    def side_by_side(
        self, run: ToHead, side: SideBySide, stages: Sequence[Stage], current: list[tuple[int, int]]
    ) -> None:
        """The same, ``side.count`` samples at a time, block by block."""
        starts = frozenset(stage.blocks[0] for stage in stages)
        each = list(self.inputs)

        def begin(i: int, draw: int) -> None:
            current[0] = i, draw

        for at in range(0, len(each), side.count):
            works = {i: partial(self._forward, run, i) for i in each[at : at + side.count]}
            with abreast(self.model, side.order, starts, works, side.keep, self.precision) as (
                passings,
                backward,
            ):
                for i, passing in passings.items():
                    hidden_TD, head = passing.end
                    if hidden_TD.requires_grad:
                        with self.precision():
                            passing.begin_backward(
                                self._gradient((i, draw), hidden_TD, head)
                                for draw in range(self.draws)
                            )
                    del hidden_TD
                backward(begin)
            devices.trim_heap()

    def _kwargs(self, i: int) -> dict[str, Any]:
        return moved(dict(self.inputs[i]), device_of(self.model))  # type: ignore[no-any-return]

    def _forward(self, run: ToHead, i: int) -> tuple[Tensor, nn.Module]:
        return run(self.model, self._kwargs(i))

    def _gradient(self, one: tuple[int, int], hidden_TD: Tensor, head: nn.Module) -> Tensor:
        """The gradient (T, D) at the end of the model, from drawn labels. one: sample and draw."""
        i, draw = one
        # a sample's own, whoever runs it; the generator reads 32 bits
        generator = torch.Generator().manual_seed(self.seed + i + (draw << 24))
        device = hidden_TD.device  # of several the last one
        rows_T = self.spoken.get(i, torch.ones(0)).to(device)
        rows_T = (
            rows_T
            if len(rows_T) == len(hidden_TD)
            else torch.ones(len(hidden_TD), device=device).bool()
        )
        grad_TD = torch.zeros_like(hidden_TD)
        grad_TD[rows_T] = _sampled_gradient(hidden_TD.detach()[rows_T], head, generator)
        return grad_TD


def draws_of(samples: int, gradients: int) -> int:
    """Gradients of each sample, so that there are about ``gradients`` of all together, which keep
    the noise of drawn labels low."""
    return max(1, min(DRAWS, gradients // max(1, samples)))


def _flat(grad: Tensor) -> Tensor:
    return grad.float().reshape(-1, grad.shape[-1])


def spread(modalities: Sequence[Modalities], enough: int) -> list[int]:
    """Indices of samples that hold about ``enough`` tokens together, or all if there are fewer.
    Every mixture of modalities gives the same share of its samples, evenly spread, and at least
    one."""
    share = enough / max(1, sum(len(own.text_T) for own in modalities))
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, own in enumerate(modalities):
        alike.setdefault(tuple(own.text_T.unique().tolist()), []).append(i)
    chosen = []
    for group in alike.values():
        wanted = min(len(group), max(1, round(len(group) * share)))
        chosen += [group[i * len(group) // wanted] for i in range(wanted)]
    return sorted(chosen)


def _sampled_gradient(hidden_TD: Tensor, head: nn.Module, generator: torch.Generator) -> Tensor:
    """A gradient (T, D) whose second moments are the Fisher information F of p =
    softmax(head(hidden)).

    It is (W_y - W_y') / sqrt(2), with the rows W of the head for two labels y, y' drawn from p.
    The gradient d log p(y) / d hidden is W_y - E[W]. So the difference has mean 0 and covariance F,
    and the mean over all words is not needed.
    """
    with torch.no_grad():
        one_T, other_T = drawn(hidden_TD, head, generator, 2).unbind(1)
        if isinstance(head, nn.Linear):
            made_TD = (head.weight[one_T].float() - head.weight[other_T].float()) / math.sqrt(2)
            return made_TD.to(hidden_TD.dtype)
        grad_TV = torch.zeros_like(hidden_TD)  # of the logits themselves
        place_T = torch.arange(len(grad_TV), device=grad_TV.device)
        grad_TV[place_T, one_T] += math.sqrt(0.5)
        grad_TV[place_T, other_T] -= math.sqrt(0.5)
        return grad_TV


@contextmanager
def _watching(
    model: PreTrainedModel,
    stages: Sequence[Stage],
    watched: Iterable[str],
    add: Callable[[str, Tensor], None],
    note: Callable[[str, Tensor], None],
) -> Iterator[None]:
    """While open, the gradient at every watched module's output goes to ``add``, and the module's
    input to ``note``. The graph begins at the first block of each stage."""
    with ExitStack() as stack:
        for name in watched:
            module = model.get_submodule(name)
            stack.callback(module.register_forward_hook(_watch(name, module, add, note)).remove)
        for stage in stages:
            first = model.get_submodule(stage.blocks[0])
            stack.callback(first.register_forward_pre_hook(_open_graph, with_kwargs=True).remove)
        yield


def _watch(
    name: str,
    watched: nn.Module,
    add: Callable[[str, Tensor], None],
    note: Callable[[str, Tensor], None],
) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if module is not watched:  # it stands in for it
            return
        hidden = first_tensor(output)
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: add(name, grad))
        if args:
            note(name, args[0])

    return hook


def _open_graph(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    """The first hidden state asks for gradients, unless an earlier stage made it do so."""
    hidden, slot = hidden_of(args, kwargs)
    if hidden.requires_grad:
        return None
    return with_hidden(args, kwargs, slot, hidden.detach().requires_grad_())
