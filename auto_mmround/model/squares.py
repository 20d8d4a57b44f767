"""Sums of squared gradients: by block and modality, and by layer and token."""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import accumulate

import torch
from torch import Tensor, nn

from auto_mmround.modalities import MODALITIES, PAD
from auto_mmround.model.chains import Modalities, token_modalities
from auto_mmround.model.structure import Stage

# Rows of a table of squares: one a modality, then one for each of a text's first tokens.
KINDS, FIRST = len(MODALITIES), 4
ROWS = KINDS + FIRST

# Bounds of a token's weight. Few tokens with huge gradients must not outweigh all others, and a
# sink of attention, whose inputs are huge, must not count nothing.
BOUNDS = (0.001, 20.0)


def put(waiting: list[tuple["Tokens", int, Tensor]]) -> None:
    """Copy the waiting values to the host, in one copy from each device, and empty the list."""
    for device in {value_T.device for _, _, value_T in waiting}:
        here = [each for each in waiting if each[2].device == device]
        sizes = [len(value_T) for _, _, value_T in here]
        values = torch.cat([value_T for _, _, value_T in here]).cpu().split(sizes)
        for (tokens, i, _), value_T in zip(here, values, strict=True):
            tokens.add(i, value_T)
    waiting.clear()


class Tokens:
    """One number for each token of each sample. Samples of the expected ``lengths`` share one piece
    of memory: thousands of small tensors between large ones would keep the heap several times
    larger than its contents."""

    def __init__(self, lengths: Mapping[int, int]) -> None:
        ends = list(accumulate(lengths.values()))
        self._places = {
            i: slice(end - lengths[i], end) for i, end in zip(lengths, ends, strict=True)
        }
        self._room, self._others = torch.zeros(ends[-1] if ends else 0), dict[int, Tensor]()
        self.seen: set[tuple[int, int]] = set()  # samples, and which of their draws

    def add(self, i: int, value_T: Tensor) -> None:
        """Add to the numbers of a sample, in host memory. Where the number of tokens has changed,
        the new numbers replace the old ones."""
        into_T = self._others.get(i, self._room[self._places[i]])
        if len(into_T) == len(value_T):
            into_T.add_(value_T)
        else:
            self._others[i] = value_T.clone()

    def by_sample(self) -> dict[int, Tensor]:
        """Sample -> (tokens,)."""
        return {
            i: self._others[i] if i in self._others else self._room[self._places[i]]
            for i in sorted({sample for sample, _ in self.seen})
        }


class Readers:
    """Groups of layers that read the same tensor, in the order in which they run."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[weakref.ref[Tensor], tuple[str, ...]]] = {}
        self.groups: dict[str, tuple[str, ...]] = {}

    def see(self, name: str, x: Tensor) -> None:
        """Note that the layer reads ``x``."""
        known = self._seen.get(id(x))
        names = known[1] if known and known[0]() is x else ()
        names = (*names, name) if name not in names else names
        self._seen[id(x)] = (weakref.ref(x), names)
        for member in names:  # a block that is computed again may stop halfway
            self.groups[member] = max(self.groups.get(member, ()), names, key=len)


def shared(
    tokens: Mapping[str, Mapping[int, Tensor]],
    means: Mapping[str, Tensor],
    groups: Mapping[str, Sequence[str]],
) -> dict[str, dict[int, Tensor]]:
    """Weights of tokens: layer -> sample -> (tokens,). A token's number is divided by the layer's
    mean and kept within BOUNDS; it is 1 where the mean is zero. Layers of a group share the mean of
    theirs."""
    made: dict[tuple[str, ...], dict[int, Tensor]] = {}
    weights: dict[str, dict[int, Tensor]] = {}
    for name in means:
        group = tuple(other for other in groups.get(name, (name,)) if other in means)
        if group not in made:
            parts = [
                {
                    i: (t / means[n].cpu()).nan_to_num(1.0).clamp(*BOUNDS)
                    for i, t in tokens[n].items()
                }
                for n in group
            ]
            samples = [
                i
                for i in parts[0]
                if all(i in part and len(part[i]) == len(parts[0][i]) for part in parts)
            ]
            made[group] = {i: torch.stack([part[i] for part in parts]).mean(0) for i in samples}
        weights[name] = made[group]
    return weights


def rows_of(stage: Stage, own: Modalities, tokens: int) -> Tensor:
    """Row (tokens,) of the table for each of a stage's tokens: its modality, or its place among the
    first of a text."""
    rows_T = token_modalities(stage, own, tokens)
    if stage.name == "text" and len(own.text_T) == tokens:
        first_F = rows_T[:FIRST]
        rows_T = torch.cat(
            [
                torch.where(first_F == PAD, first_F, KINDS + torch.arange(len(first_F))),
                rows_T[FIRST:],
            ]
        )
    return rows_T


def _one_hot(
    modalities: Sequence[Modalities], stage: Stage, i: int, count: int, device: torch.device
) -> Tensor:
    """`rows_of` sample ``i``'s tokens as (T, ROWS), one in each row's column."""
    rows_T = rows_of(stage, modalities[i], count)
    return nn.functional.one_hot(rows_T, ROWS).float().to(device)


def means_of(squares_RD: Tensor, counts_R1: Tensor) -> Tensor:
    """Mean squares by row. The first tokens are too few for channels of their own: each has its own
    size, with the mean over all tokens as its channels."""
    means_RD = squares_RD / counts_R1.clamp(min=1)
    all_D = squares_RD.sum(0) / counts_R1.sum()
    means_RD[KINDS:] = (
        means_RD[KINDS:].mean(1, keepdim=True) * all_D / all_D.mean().clamp(min=1e-30)
    )
    return means_RD


class Squares:
    """Sums of squared gradients over samples, for blocks and for layers.

    blocks: block -> squares (ROWS, channels), then a column with the number of tokens. tokens:
    layer -> a number for each sample and token.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        modalities: Sequence[Modalities],
        layers: Iterable[str],
        samples: Iterable[int],
    ):
        self.blocks: dict[str, Tensor] = {}
        lengths = {i: len(modalities[i].text_T) for i in samples}
        self.tokens = {name: Tokens(lengths) for name in layers}
        self._stage_of = {name: stage for stage in stages for name in stage.blocks}
        self._again = set[str]()
        # of one sample; they go to the host together when the next sample begins
        self._waiting: list[tuple[Tokens, int, Tensor]] = []
        # The blocks of a stage read the same tokens. A bound method here would make a cycle: its
        # object would hold itself, and tensors on a device would wait for the garbage collector.
        self._one_hot = lru_cache(maxsize=2 * len(stages))(partial(_one_hot, modalities))

    @property
    def watched(self) -> list[str]:
        """Blocks and layers whose gradients are wanted."""
        return [*self._stage_of, *self.tokens]

    def add(self, name: str, i: int, grad_TD: Tensor, draw: int = 0) -> None:
        """The gradient at the output of a block or layer, for sample ``i``. draw: which of the
        gradients of this sample."""
        if self._waiting and self._waiting[0][1] != i:
            put(self._waiting)
        if name in self.tokens:
            self._again.update([name] if (i, draw) in self.tokens[name].seen else [])
            self.tokens[name].seen.add((i, draw))
            self._waiting.append((self.tokens[name], i, grad_TD.square().mean(-1)))
            return
        one_hot_TR = self._one_hot(self._stage_of[name], i, len(grad_TD), grad_TD.device)
        fresh = torch.zeros(ROWS, grad_TD.shape[1] + 1, device=grad_TD.device)
        counted_TD1 = torch.cat([grad_TD.square(), torch.ones_like(grad_TD[:, :1])], 1)
        self.blocks.setdefault(name, fresh).add_(one_hot_TR.t() @ counted_TD1)

    def means(
        self,
        add_up: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        spoken: Mapping[int, Tensor],
        groups: Mapping[str, Sequence[str]],
    ) -> tuple[dict[str, Tensor], dict[str, dict[int, Tensor]]]:
        """Block -> (ROWS, channels), and layer -> sample -> weights of its tokens, see `shared`.

        add_up: over several processes. spoken: sample -> bool (T,), tokens that are no padding.
        """
        put(self._waiting)
        tokens = {name: part.by_sample() for name, part in self.tokens.items()}
        sums = dict(self.blocks)
        for name, by_sample in tokens.items():
            # padding has no gradient
            counted = [
                t[spoken[i]] if len(t) == len(spoken[i]) else t for i, t in by_sample.items()
            ]
            total = sum(t.sum().item() for t in counted)
            sums[name] = torch.tensor([total, float(sum(map(len, counted)))])
        whole = add_up(sums)
        of_blocks = {
            name: means_of(table[:, :-1], table[:, -1:])
            for name, table in whole.items()
            if name in self._stage_of
        }
        of_layers = {
            name: whole[name][0] / whole[name][1].clamp(min=1)
            for name in self.tokens
            if name not in self._again
        }
        return of_blocks, shared(tokens, of_layers, groups)
