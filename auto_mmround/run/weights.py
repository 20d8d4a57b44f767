"""What the errors of a block weigh, token by token and channel by channel, and how many tokens a step sees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from auto_mmround.calibration.inputs import PAD, ModelInput
from auto_mmround.model.chains import Chain, Kinds
from auto_mmround.model.fisher import ROWS, rows_of
from auto_mmround.model.structure import Stage
from auto_mmround.recipe.recipe import Recipe

# Tokens that a tower's sign step sees, at most: an image or a sound is a thousand or more, and eight of them cost four
# times as much as two.
TOWER_STEP = 4096


def kinds_of(inputs: Sequence[ModelInput]) -> list[Kinds]:
    """Modalities of every sample's tokens."""
    return [Kinds(sample.modality_T, sample.tower_F) for sample in inputs]


def tower_tokens(chain: Chain) -> int:
    """Tokens of all samples of a tower's chain together; 0 for text."""
    return 0 if chain.stage.name == "text" else sum(hidden.shape[:-1].numel() for hidden in chain.hidden)


def accumulated(recipe: Recipe, tower_tokens: int) -> int:
    """Micro-batches a sign step. tower_tokens: of a sample, on average; 0 for text."""
    if recipe.algorithm != "auto" or not tower_tokens:
        return recipe.gradient_accumulate_steps
    return max(1, min(recipe.gradient_accumulate_steps, TOWER_STEP // tower_tokens // recipe.batch_size))


@dataclass(frozen=True)
class Weights:
    """stages: those of the run. kinds: by sample. fisher: by block, empty where errors all weigh alike."""

    stages: Sequence[Stage]
    kinds: Sequence[Kinds]
    fisher: Mapping[str, Tensor]

    def of_errors(self, chain: Chain, block: str) -> list[Tensor]:
        """Of the block's error for every sample, (B, T, 1 or channels): 0 on padding, else 1, or the Fisher information
        of the channel for that kind of token, scaled to a mean of 1 over the rows of the table."""
        table_RD = self._table(chain.stage, block)
        return [table_RD[self._rows(chain, i)] for i in range(len(chain))]

    def of_tokens(self, chain: Chain, i: int, block: str) -> list[Tensor]:
        """Of a sample's tokens (B, T, 1), the mean over the channels: the block's own, then those of the tower's
        output, which cross attention reads."""
        found = [self._table(chain.stage, block).mean(1, keepdim=True)[self._rows(chain, i)]]
        tower_F = self.kinds[chain.sample[i]].tower_F
        towers = [stage for stage in self.stages if stage.name != "text"]
        if chain.stage.name == "text" and tower_F is not None and towers:
            heard_R1 = self._table(towers[-1], towers[-1].blocks[-1]).mean(1, keepdim=True)
            found.append(heard_R1[tower_F.long()][None])
        return found

    def _table(self, stage: Stage, block: str) -> Tensor:
        """Weights by row of the Fisher table, (ROWS, channels or 1).

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

    def _rows(self, chain: Chain, i: int) -> Tensor:
        """Row of the Fisher table for every token of a hidden state, in its shape but for the channels."""
        shape = chain.hidden[i].shape[:-1]
        return rows_of(chain.stage, self.kinds[chain.sample[i]], shape.numel()).reshape(shape)
