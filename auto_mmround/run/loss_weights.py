"""Weights of a block's errors, one a token and channel, and how many tokens a step sees."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from auto_mmround.calibration.inputs import ModelInput
from auto_mmround.modalities import PAD
from auto_mmround.model.chains import Chain, Modalities, token_modalities
from auto_mmround.model.fisher import Fisher
from auto_mmround.model.squares import ROWS, rows_of
from auto_mmround.model.structure import Stage
from auto_mmround.recipe.recipe import Recipe

# Tokens that a step sees for each sample asked for, at most: an image or a sound is a thousand or
# more, and eight of them cost four times as much as two.
TEXT_SAMPLE, TOWER_SAMPLE = 1024, 512


def modalities_of(inputs: Sequence[ModelInput]) -> list[Modalities]:
    """One `Modalities` a sample."""
    return [Modalities(sample.modality_T, sample.tower_F) for sample in inputs]


def tokens_of(chain: Chain) -> int:
    """Of all samples of a chain together."""
    return sum(hidden.shape[:-1].numel() for hidden in chain.hidden)


def samples_a_step(recipe: Recipe, tokens: int, stage: str = "text") -> int:
    """Samples that a sign step sees. tokens: of a sample, on average. stage: its name."""
    asked, most = recipe.step_samples, TEXT_SAMPLE if stage == "text" else TOWER_SAMPLE
    if not recipe.how.bounded:
        return asked
    return max(1, min(asked, most * asked // max(1, tokens)))


class ErrorWeights(NamedTuple):
    """Weights of the errors of a block's output. table_RD: float32, by row of the Fisher table; one
    channel where all count alike. row_N: int8, the row of every token of all samples. end_S: where
    each sample's tokens end."""

    table_RD: Tensor
    row_N: Tensor
    end_S: Tensor

    def of(self, samples: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Of some samples' tokens together, (*shape, channels); shape: (B, T)."""
        ends = [0, *self.end_S.tolist()]
        row_N = torch.cat([self.row_N[ends[i] : ends[i + 1]] for i in samples])
        return self.table_RD[row_N.long().reshape(tuple(shape))]


@dataclass(frozen=True)
class Weights:
    """modalities: by sample. fisher: empty where all errors have the same weight."""

    modalities: Sequence[Modalities]
    fisher: Fisher

    def of_errors(self, chain: Chain, block: str) -> ErrorWeights:
        """Of the block's error for every sample: 0 on padding, else 1, or the Fisher information of
        the channel for that modality, scaled to a mean of 1 over the rows of the table. On the
        device that the block runs on."""
        rows = [self._rows(chain, i) for i in range(len(chain))]
        ends = [0, *accumulate(map(len, rows))]
        row_N = torch.cat([torch.empty(0, dtype=torch.long), *rows]).to(torch.int8)
        device = chain.device or torch.device("cpu")
        return ErrorWeights(
            self._table(chain.stage, block).to(device), row_N.to(device), torch.tensor(ends[1:])
        )

    def of_tokens(
        self, chain: Chain, layer: str, entries: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Weights of a layer's tokens in its second moments, flat, one tensor for each entry of the
        chain, or for ``entries``. A weight is 0 on padding of text. Else it is 1, or it tells how
        much the model's output depends on the layer's output at that token."""
        measured = self.fisher.tokens.get(layer, {})
        asked = range(len(chain)) if entries is None else entries
        known = all(chain.sample[i] in measured for i in asked)
        counts = []
        for i in asked:
            sample = chain.sample[i]
            counted_N = torch.ones(chain.hidden[i].shape[:-1].numel())
            if chain.stage.name == "text":
                counted_N = (
                    token_modalities(chain.stage, self.modalities[sample], len(counted_N)) != PAD
                ).float()
            if known:  # of as many tokens as the layer reads: another stage's in cross attention
                same = len(measured[sample]) == len(counted_N)
                counted_N = measured[sample] * counted_N if same else measured[sample]
            counts.append(counted_N)
        return counts

    def _table(self, stage: Stage, block: str) -> Tensor:
        """Weights by row of the Fisher table, (ROWS, channels or 1).

        Padding of text is worth nothing. What a tower makes of padding reaches the text, so its
        gradients tell.
        """
        table_RD = (
            self.fisher.channels.get(block, torch.zeros(ROWS, 1)).cpu().nan_to_num(0.0, 0.0, 0.0)
        )
        # NaN without any: not measured, or nothing depends on the block
        mean = table_RD[table_RD.sum(1) > 0].mean()
        table_RD = table_RD / mean.clamp(min=1e-30) if mean > 0 else torch.ones(ROWS, 1)
        if stage.name == "text":
            table_RD[PAD] = 0
        return table_RD

    def _rows(self, chain: Chain, i: int) -> Tensor:
        """Row of the Fisher table for every token of a hidden state, flat."""
        own = self.modalities[chain.sample[i]]
        return rows_of(chain.stage, own, chain.hidden[i].shape[:-1].numel())
