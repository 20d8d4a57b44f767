"""Do the samples fit the model: do they reach its stages, does it know their words?"""

import logging
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from auto_mmround.calibration.inputs import PAD, TEXT, ModelInput, token_ids
from auto_mmround.errors import UserError
from auto_mmround.families import calibrates, reads_words
from auto_mmround.model.passes import reached
from auto_mmround.model.structure import READS, input_weight
from auto_mmround.run.out_of_memory import phase
from auto_mmround.run.plan import Plan
from auto_mmround.run.session import Session

log = logging.getLogger("auto_mmround")


def met(session: Session) -> Plan:
    """The plan without the towers that no sample reaches, which is said; all of it where none is
    reached, which the run refuses."""
    plan = session.plan
    with phase("looking for the stages that samples reach"):
        found = reached(session.model, plan.stages, session.batches, session.precision)
    missed = [stage for stage in plan.stages if stage.path not in found]
    if not any(stage.path in found and stage.name != "text" for stage in plan.stages):
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
        stages=tuple(stage for stage in plan.stages if stage.path in found),
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
