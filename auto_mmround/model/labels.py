"""Labels drawn from a model's prediction, without its logits in memory together.

Words lie in runs. First the run of a label is drawn, by what its words weigh together, and then the
word, by the logits of that run alone. So the head is read once for all positions, some words at a
time.

Shapes: T positions, D channels, W words of a piece, R runs, r words of a run, C labels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from auto_mmround.model.head import room

RUN = 64  # words
POSITIONS = 2048  # at a time, for the sums of their runs
LESS = 1 - 1e-6  # a mark behind the last word, by rounding, falls on the last that has a weight


def drawn(hidden_TD: Tensor, head: nn.Module, generator: torch.Generator, count: int) -> Tensor:
    """Labels (T, count) of softmax(head(hidden)), independent of one another.

    head: a linear layer; where it is none, ``hidden_TD`` are the logits themselves.
    """
    at_TC = torch.rand(len(hidden_TD), count, generator=generator).to(hidden_TD.device)
    pieces = zip(hidden_TD.split(POSITIONS), at_TC.split(POSITIONS), strict=True)
    return torch.cat([_drawn(some_TD, head, some_TC) for some_TD, some_TC in pieces])


def _drawn(hidden_TD: Tensor, head: nn.Module, at_TC: Tensor) -> Tensor:
    words = head.out_features if isinstance(head, nn.Linear) else hidden_TD.shape[-1]
    top_TR, weight_TR = _runs(hidden_TD, head, words)
    weight_TR *= (top_TR - top_TR.amax(-1, keepdim=True)).exp_()
    run_TC, at_TC = _place(weight_TR, at_TC)
    word_TCr = run_TC[..., None] * RUN + torch.arange(RUN, device=run_TC.device)
    known_TCr = word_TCr.clamp(max=words - 1)
    logits_TCr = _logits_of(hidden_TD, head, known_TCr).float()
    logits_TCr.masked_fill_(word_TCr != known_TCr, -torch.inf)
    weight_TCr = (logits_TCr - logits_TCr.amax(-1, keepdim=True)).exp_()
    inside_N1, _ = _place(weight_TCr.flatten(0, 1), at_TC.reshape(-1, 1))
    return run_TC * RUN + inside_N1.view_as(run_TC)


def _place(weight_NR: Tensor, at_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Where the weights of each row, added up, reach the shares ``at_NC`` of their sum; and how far
    inside, as a share of the weight there."""
    end_NR = weight_NR.cumsum(-1)
    mark_NC = at_NC.clamp(max=LESS) * end_NR[:, -1:]
    place_NC = torch.searchsorted(end_NR, mark_NC, right=True).clamp_(max=end_NR.shape[1] - 1)
    before_NC = end_NR.gather(1, (place_NC - 1).clamp(min=0)).where(place_NC > 0, 0)
    return place_NC, (mark_NC - before_NC) / (end_NR.gather(1, place_NC) - before_NC)


def _runs(hidden_TD: Tensor, head: nn.Module, words: int) -> tuple[Tensor, Tensor]:
    """The largest logit of each run (T, R), and the sum of exp(logit - largest), in float32."""
    step = max(1, room(hidden_TD.device) // max(1, len(hidden_TD)) // RUN) * RUN
    tops, sums = [], []
    for first in range(0, words, step):
        logits_TW = _logits(hidden_TD, head, slice(first, first + step))
        short = -logits_TW.shape[1] % RUN
        logits_TW = functional.pad(logits_TW, (0, short), value=-torch.inf) if short else logits_TW
        logits_TRr = logits_TW.unflatten(1, (-1, RUN))
        # finite, also where a model rules out all words of a run
        top_TR = logits_TRr.amax(-1).clamp_(min=torch.finfo(logits_TRr.dtype).min)
        weight_TRr = (logits_TRr - top_TR[..., None]).exp_()
        tops.append(top_TR.float())
        sums.append(weight_TRr.sum(-1, dtype=torch.float32))
    return torch.cat(tops, 1), torch.cat(sums, 1)


def _logits(hidden_TD: Tensor, head: nn.Module, words: slice) -> Tensor:
    if not isinstance(head, nn.Linear):
        return hidden_TD[:, words]
    bias_W = None if head.bias is None else head.bias[words]
    return functional.linear(hidden_TD, head.weight[words], bias_W)


def _logits_of(hidden_TD: Tensor, head: nn.Module, words_TCr: Tensor) -> Tensor:
    """(T, C, r), of some words of each position."""
    if not isinstance(head, nn.Linear):
        return hidden_TD.gather(1, words_TCr.flatten(1)).view_as(words_TCr)
    positions = max(1, room(hidden_TD.device) // words_TCr.shape[1:].numel() // hidden_TD.shape[1])
    made = [
        torch.matmul(head.weight[some_TCr], some_TD[:, None, :, None]).squeeze(-1)
        for some_TCr, some_TD in zip(words_TCr.split(positions), hidden_TD.split(positions))
    ]
    logits_TCr = torch.cat(made)
    return logits_TCr if head.bias is None else logits_TCr + head.bias[words_TCr]
