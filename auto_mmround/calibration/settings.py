"""What the data ask of the run: which set, how long, how many at once. The rules of the original, made explicit."""

from collections.abc import Callable, Sized
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from auto_mmround.calibration.datasets import DEMO, NAMED, SHORT, STREAM_ROWS, Rows, load_rows, parse_spec
from auto_mmround.calibration.template import Template

FALLBACK = "liuhaotian/llava_conv_58k"
TEXT_SEQLEN, MEDIA_SEQLEN = 2048, 512


@dataclass(frozen=True)
class Settings:
    """Resolved values. multimodal: some samples carry media."""

    dataset: Any
    multimodal: bool
    nsamples: int
    seqlen: int
    truncation: bool
    batch_size: int
    gradient_accumulate_steps: int


def carries_media(dataset: Any, load: Callable[[Any], list[Rows]] = load_rows) -> list[bool]:
    """For each set of a dataset argument, whether it has media: known sets by name, all others by their content."""
    if not isinstance(dataset, str):
        return [rows.multimodal() for rows in load(dataset)]
    answers = []
    for source in parse_spec(dataset):
        name = SHORT.get(source.name, source.name)
        if source.name in DEMO:
            answers.append(source.name == "demo-llava")
        elif name in NAMED:
            answers.append(NAMED[name].multimodal)
        else:
            answers += [rows.multimodal() for rows in load(source.spec())]
    return answers


def choose(
    dataset: Any,
    template: Template,
    *,
    text_only: bool,
    quant_nontext_module: bool = False,
    nsamples: int = 128,
    batch_size: int = 8,
    gradient_accumulate_steps: int = 1,
    seqlen: int | None = None,
    truncation: bool | None = None,
    load: Callable[[Any], list[Rows]] = load_rows,
) -> tuple[Settings, tuple[str, ...]]:
    """The settings and one note, for the log, on each thing that is not as it was asked.

    dataset: as given, or None for the template's own. text_only: the model takes plain text without media.
    load: reads a set whose kind its name doesn't tell. Raises UserError as `load_rows` does.
    """
    notes: list[str] = []
    if dataset is None:
        dataset = template.default_dataset
    elif isinstance(dataset, Path):
        dataset = str(dataset)
    elif not isinstance(dataset, Sized):
        dataset = list(islice(dataset, STREAM_ROWS))  # it can be read only once
    media = carries_media(dataset, load)
    if not any(media) and (quant_nontext_module or not text_only):
        why = "non-text modules are quantized" if quant_nontext_module else "this model can't take plain text"
        if isinstance(dataset, str):
            # Only text sets are replaced: the embedded one by its sister, so that it stays offline.
            wanted = "demo-llava" if all(s.name in DEMO for s in parse_spec(dataset)) else FALLBACK
            notes.append(f"{why}: the dataset {dataset} has no media and is replaced by {wanted}")
            dataset, media = wanted, [True]
        else:
            notes.append(f"{why}, but the given samples carry no media")
    elif not all(media) and not text_only and isinstance(dataset, str) and any(media):
        notes.append("this model can't take plain text: only the sets with media are used")
        kept = [source for source, has in zip(parse_spec(dataset), media, strict=True) if has]
        dataset = ",".join(source.spec() for source in kept)
    multimodal = any(media)
    if multimodal:
        resolved = MEDIA_SEQLEN if seqlen is None else seqlen
        cut = False
        if truncation:
            notes.append("truncation is off: the dataset carries media")
        if seqlen is None:
            notes.append(f"seqlen is {MEDIA_SEQLEN}: the dataset carries media")
    else:
        resolved = TEXT_SEQLEN if seqlen is None else seqlen
        cut = True if truncation is None else truncation
    if (multimodal or quant_nontext_module) and batch_size != 1:
        gradient_accumulate_steps *= batch_size
        notes.append(f"batch_size {batch_size} becomes 1 with gradient_accumulate_steps {gradient_accumulate_steps}")
        batch_size = 1
    rounded = -(-nsamples // batch_size) * batch_size
    if rounded != nsamples:
        notes.append(f"nsamples {nsamples} becomes {rounded}, a multiple of batch_size {batch_size}")
    return Settings(dataset, multimodal, rounded, resolved, cut, batch_size, gradient_accumulate_steps), tuple(notes)
