"""Samples to measure on: whole conversations and texts, without calibration's changes."""

from pathlib import Path

from auto_mmround.calibration import samples
from auto_mmround.calibration.inputs import ModelInput
from auto_mmround.model.loading import DEMO, Loaded
from auto_mmround.run.job import preparers
from auto_mmround.run.met import check_inputs

HELD_OUT = DEMO.parent / "heldout"
MANY = 10**9


def parts(dataset: str) -> list[str | Path]:
    """The sets of a dataset argument to measure on; `demo` is the demo model's held-out set."""
    return [HELD_OUT / "text.jsonl", HELD_OUT / "vqa.json"] if dataset == "demo" else [dataset]


def held_out(
    loaded: Loaded,
    dataset: str,
    *,
    template: str | None = None,
    extra_data_dir: str | None = None,
    limit: int | None = None,
    seqlen: int = 4096,
) -> list[ModelInput]:
    """Model inputs for a dataset argument; `demo` is the demo model's held-out set.

    limit: most samples of each file. Raises UserError as calibration does.
    """
    inputs: list[ModelInput] = []
    for part in parts(dataset):
        beside = str(part.parent) if isinstance(part, Path) else None
        made, _ = samples.build(
            part,
            preparers(loaded, template),
            samples.Reading(
                limit or MANY,
                seqlen,
                truncation=False,
                extra_data_dir=extra_data_dir or beside,
                quiet=True,
            ),
        )
        inputs += made
    check_inputs(loaded.model, inputs)
    return inputs
