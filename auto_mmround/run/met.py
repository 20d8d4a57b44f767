"""Do the samples fit the model: do they reach its stages, does it know their words?"""

import logging
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from auto_mmround.calibration.inputs import ModelInput, token_ids
from auto_mmround.calibration.ready import PER_TOKEN
from auto_mmround.calibration.rows import BadSample
from auto_mmround.errors import UserError
from auto_mmround.families import calibrates, reads_words
from auto_mmround.modalities import MODALITIES, PAD, TEXT
from auto_mmround.model.chains import as_dtype
from auto_mmround.model.passes import NotTaken, reached
from auto_mmround.model.speaking import speaking
from auto_mmround.model.structure import READS, input_weight
from auto_mmround.run.out_of_memory import phase
from auto_mmround.run.plan import Plan
from auto_mmround.run.session import Session

FEATURES = re.compile("pixel|image|video|audio|input_features|input_values")  # of names of inputs

log = logging.getLogger("auto_mmround")


class StageTrial:
    """Runs samples up to the last stage's blocks: does the model take them, and which stages do
    they reach?

    every: not only the first of each kind. reached: paths of the stages that were reached.
    """

    def __init__(self, session: Session, every: bool) -> None:
        self._session, self._every = session, every
        self._known: set[frozenset[str]] = set()
        self.reached: set[str] = set()

    def __call__(self, made: ModelInput) -> None:
        """Raises BadSample for a sample that the model does not take, and UserError for one whose
        words it does not know."""
        model, given = self._session.model, frozenset(made.kwargs)
        check_words(model, [made])
        check_vocabulary(model, [made])
        if missing := no_features(model, made):
            raise BadSample("markers", missing)
        known = given in self._known
        if known and not self._every:
            return
        self._known.add(given)
        stages = self._session.plan.stages
        kwargs = as_dtype(made.kwargs, self._session.dtype)
        try:
            with phase("looking for the stages that samples reach"):
                within = stages[-1:] if known else stages  # no further than the last one's start
                self.reached |= reached(model, within, kwargs, self._session.precision)
        except NotTaken as error:
            raise BadSample("refused by the model", f"sample {made.id}: {error}") from error


@contextmanager
def naming(inputs: Sequence[ModelInput]) -> Iterator[None]:
    """While open, samples run through a model. Raises UserError that names one it does not take."""
    try:
        yield
    except NotTaken as error:
        for made in inputs:
            if all(_alike(value, error.kwargs.get(key)) for key, value in made.kwargs.items()):
                raise UserError(f"sample {made.id}: {error}") from error
        raise


def _alike(value: Any, other: Any) -> bool:
    """Whether this may be the same input, on another device and in another dtype."""
    if not isinstance(value, Tensor):
        return True
    if not isinstance(other, Tensor) or value.shape != other.shape:
        return False
    return value.is_floating_point() or torch.equal(value.cpu(), other.cpu())


def met(plan: Plan, reached: Collection[str]) -> Plan:
    """The plan without the towers that no sample reaches, which is said; all of it where none is
    reached, which the run refuses. reached: paths of the stages that samples reach."""
    missed = [stage for stage in plan.stages if stage.path not in reached]
    if not any(stage.path in reached and stage.name != "text" for stage in plan.stages):
        return plan
    for stage in missed:
        log.warning(
            "%s: no calibration sample reaches this %s stage, which stays as it is; add samples"
            " with %s input to quantize it too",
            stage.path, stage.name, READS.get(stage.name, stage.name),
        )  # fmt: skip
    blocks = {block for stage in missed for block in stage.blocks}
    reason = "no calibration sample reaches its stage"
    weights = [
        replace(w, scheme=None, reason=reason) if w.block in blocks and w.scheme else w
        for w in plan.weights
    ]
    return replace(
        plan,
        stages=tuple(stage for stage in plan.stages if stage.path in reached),
        weights=tuple(weights),
    )


def check_words(model: PreTrainedModel, inputs: Sequence[ModelInput]) -> None:
    """Raises UserError for plain text given to a model that reads no words."""
    if reads_words(model):
        return
    for sample in inputs:
        if "input_ids" in sample.kwargs:
            raise UserError(
                f"sample {sample.id} is plain text, and {type(model).__name__} reads no words:"
                f" calibrate with {' or '.join(calibrates(model)) or 'its own inputs'}"
            )


def check_inputs(model: PreTrainedModel, inputs: Sequence[ModelInput]) -> None:
    """Raises UserError for token ids and media that the model can't read."""
    check_vocabulary(model, inputs)
    for missing in filter(None, (no_features(model, made) for made in inputs)):
        raise UserError(missing)


def no_features(model: PreTrainedModel, made: ModelInput) -> str | None:
    """One line where places for media stand in the text, and no input that the model reads has
    their features: most classes swallow a key that they don't know, and read the places as
    words."""
    kinds = {MODALITIES[kind] for kind in made.modality_T.tolist()} - {"text", "pad"}
    takes = [key for key in signature(speaking(model).forward).parameters if key not in PER_TOKEN]
    given = [key for key, value in made.kwargs.items() if key in takes and not _counts(value)]
    reads = [key for key in takes if FEATURES.search(key)]
    if not kinds or given or not reads:  # a forward pass may name none of what it reads
        return None
    return (
        f"sample {made.id}: places for {' and '.join(sorted(kinds))} in its text, and no features"
        f" that {type(model).__name__} reads among its keys ({', '.join(made.kwargs)}); it reads"
        f" {', '.join(reads)}"
    )


def _counts(value: Any) -> bool:
    """Whether these are ids, sizes or a mask."""
    return isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32, torch.bool)


def check_vocabulary(model: PreTrainedModel, inputs: Sequence[ModelInput]) -> None:
    """Raises UserError for a sample whose text has token ids that the model has no embedding for.
    Ids of media are the model's own affair: it need not embed them."""
    weight = input_weight(model)
    if weight is None or weight.ndim != 2:
        return
    for sample in inputs:
        ids_T = token_ids(sample.kwargs)[0]
        if not len(ids_T):
            continue
        read_T = ids_T[(sample.modality_T == TEXT) | (sample.modality_T == PAD)]
        wrong = read_T[(read_T < 0) | (read_T >= len(weight))]
        if wrong.numel():
            raise UserError(
                f"sample {sample.id}: its token id {int(wrong[0])} is not in the model's "
                f"vocabulary of {len(weight)}; give the model's own "
                "tokenizer, or resize its embeddings to the tokenizer"
            )
