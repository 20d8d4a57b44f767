"""What the data ask of the run: which set, how long, how many at once. The rules of the original,
made explicit."""

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from auto_mmround.calibration.datasets import READY, STREAM_ROWS, Rows, load_rows
from auto_mmround.calibration.named import DEMO, DEMO_KINDS, LOCAL, NAMED, SHORT, STAND_IN
from auto_mmround.calibration.sources import parse_spec
from auto_mmround.calibration.template import Template
from auto_mmround.errors import UserError

TEXT_SEQLEN, MEDIA_SEQLEN = 2048, 512
# A model that sees images sees the frames of a video.
SEEN_AS = {"video": "image"}
# kinds of media in a set of samples
Media = frozenset[str]


@dataclass(frozen=True)
class Asked:
    """What the user wrote; None where the data decide."""

    nsamples: int = 128
    batch_size: int = 8
    gradient_accumulate_steps: int = 1
    seqlen: int | None = None
    truncation: bool | None = None


@dataclass(frozen=True)
class Reads:
    """What the model can read and must see.

    text_only: it takes plain text without media. towers: some are quantized. needs: kinds of media
    that the towers, or a model that can't take plain text, must meet; some: one of them is enough.
    takes: kinds that the model can read at all; None where nobody knows. positions: tokens that it
    has room for.
    """

    text_only: bool
    towers: bool = False
    needs: Sequence[str] = ("image",)
    takes: Sequence[str] | None = None
    positions: int | None = None
    some: bool = False


@dataclass(frozen=True)
class Settings:
    """Resolved values. usual: notes on values that nobody asked for."""

    dataset: Any
    nsamples: int
    seqlen: int
    truncation: bool
    batch_size: int
    gradient_accumulate_steps: int
    usual: tuple[str, ...] = field(default=(), compare=False)


def media_kinds(
    dataset: Any, load: Callable[[Any], list[Rows]] = load_rows, by_name: bool = True
) -> list[Media]:
    """For each set of a dataset argument the kinds of its media: known sets by name, all others by
    their content."""
    if not isinstance(dataset, str) or not by_name:
        return [rows.kinds() for rows in load(dataset)]
    answers = []
    for source in parse_spec(dataset):
        name = SHORT.get(source.name, source.name)
        if source.name in DEMO:
            answers.append(frozenset(DEMO_KINDS[source.name]))
        elif name in NAMED and not Path(source.name).exists():
            answers.append(frozenset(NAMED[name].kinds))
        else:
            answers += [rows.kinds() for rows in load(source.spec())]
    return answers


def choose(
    dataset: Any,
    template: Template,
    model: Reads,
    asked: Asked = Asked(),
    *,
    by_name: bool = True,
    load: Callable[[Any], list[Rows]] = load_rows,
) -> tuple[Settings, tuple[str, ...]]:
    """The settings and one note, for the log, on each thing that is not as it was asked.

    dataset: as given, or None for the template's own. load: reads a set whose kind its name doesn't
    tell; by_name: a known name may tell it. Raises UserError as `load_rows` does, and when what the
    model needs or takes can't be met.
    """
    notes: list[str] = []
    if dataset is None:
        dataset = template.default_dataset
    elif isinstance(dataset, Path):
        dataset = str(dataset)
    elif not isinstance(dataset, Sized):
        dataset = list(islice(dataset, STREAM_ROWS))  # it can be read only once
    dataset, media = _fitting(dataset, media_kinds(dataset, load, by_name), model, notes)
    multimodal = any(media)
    usual: list[str] = []
    seqlen, truncation = _lengths(multimodal, model, asked, notes, usual)
    batch, steps = asked.batch_size, asked.gradient_accumulate_steps
    if (multimodal or model.towers) and batch != 1:
        steps *= batch
        usual.append(
            f"batch_size {batch} becomes 1 with gradient_accumulate_steps {steps}: samples with"
            " media differ in length"
        )
        batch = 1
    nsamples = -(-asked.nsamples // batch) * batch
    if nsamples != asked.nsamples:
        notes.append(
            f"nsamples {asked.nsamples} becomes {nsamples}, a multiple of batch_size {batch}"
        )
    settings = Settings(dataset, nsamples, seqlen, truncation, batch, steps, tuple(usual))
    return settings, (*notes, *usual)


def _lengths(
    multimodal: bool, model: Reads, asked: Asked, notes: list[str], usual: list[str]
) -> tuple[int, bool]:
    """Tokens of a sample, and whether longer ones are cut."""
    seqlen = asked.seqlen
    if seqlen is None:
        seqlen = MEDIA_SEQLEN if multimodal else TEXT_SEQLEN
    truncation = not multimodal and asked.truncation is not False
    if multimodal and asked.truncation:
        notes.append("truncation is off: the dataset has media")
    if multimodal and asked.seqlen is None:
        usual.append(f"seqlen is {MEDIA_SEQLEN}: the dataset has media")
    if model.positions is not None and seqlen > model.positions:
        (usual if asked.seqlen is None else notes).append(
            f"seqlen {seqlen} becomes {model.positions}: the model has positions for no more tokens"
        )
        seqlen = model.positions
    return seqlen, truncation


def _fitting(
    dataset: Any, media: list[Media], model: Reads, notes: list[str]
) -> tuple[Any, list[Media]]:
    """The dataset, another one where it lacks what is demanded, and the media of each of its sets.
    Raises UserError if that can't be met."""
    demanded = model.towers or not model.text_only
    if demanded and not any(media):
        if model.towers:
            why = "non-text modules are quantized"
        else:
            why = "this model can't take plain text"
        if isinstance(dataset, str):
            # Only text sets are replaced: the embedded one by its sister, so that it stays offline.
            offline = tuple(model.needs) == ("image",) and all(
                source.name in DEMO for source in parse_spec(dataset)
            )
            wanted = "demo-llava" if offline else ",".join(STAND_IN[kind] for kind in model.needs)
            notes.append(f"{why}: the dataset {dataset} has no media and is replaced by {wanted}")
            dataset, media = wanted, [frozenset(model.needs)]
        else:
            notes.append(f"{why}, but the given samples carry no media")
    elif isinstance(dataset, str):
        dataset, media = _usable(dataset, media, model, notes)
    _check_kinds(dataset, media, model, demanded)
    return dataset, media


def _usable(
    dataset: str, media: list[Media], model: Reads, notes: list[str]
) -> tuple[str, list[Media]]:
    """Without the sets of a mixture that the model can't read at all, where others are left."""
    readable = [
        (model.text_only if not kinds else _foreign(kinds, model.takes) != kinds) for kinds in media
    ]
    if all(readable) or not any(readable):
        return dataset, media
    sets = list(zip(parse_spec(dataset), media, strict=True))
    if any(not kinds for (_, kinds), fits in zip(sets, readable, strict=True) if not fits):
        notes.append("this model can't take plain text: only the sets with media are used")
    for (source, kinds), fits in zip(sets, readable, strict=True):
        if kinds and not fits:
            notes.append(
                f"this model takes no {' or '.join(sorted(kinds))}: the set {source.name} is"
                " left out"
            )
    kept = [each for each, fits in zip(sets, readable, strict=True) if fits]
    return ",".join(source.spec() for source, _ in kept), [kinds for _, kinds in kept]


def _foreign(kinds: Media, takes: Sequence[str] | None) -> Media:
    """The kinds that the model can't read."""
    if takes is None:
        return frozenset()
    return frozenset(
        kind for kind in kinds if kind != READY and SEEN_AS.get(kind, kind) not in takes
    )


def _check_kinds(dataset: Any, media: Sequence[Media], model: Reads, demanded: bool) -> None:
    """Raises UserError for a set with media that the model can't read, and where a tower would see
    no sample. With `some` it is enough that one tower sees samples."""
    needs, takes = (model.needs if demanded else ()), model.takes
    present: Media = frozenset().union(*media)
    name = f"the dataset {dataset}" if isinstance(dataset, str) else "the given dataset"
    if foreign := _foreign(present, takes):
        able = " and ".join(kind for kind in takes or ())
        wanted = next(
            (LOCAL[kind] for kind in takes or () if kind in LOCAL), "a text set, such as demo-text"
        )
        raise UserError(
            f"{name} has {' and '.join(sorted(foreign))} samples, but this model takes {able}: use"
            f" {wanted}"
        )
    seen = {SEEN_AS.get(kind, kind) for kind in present}
    missing = [kind for kind in needs if kind not in seen]
    if present and READY not in seen and missing and not (model.some and len(missing) < len(needs)):
        kinds = " and ".join(missing)
        raise UserError(
            f"{name} has no {kinds} samples, and what is to be quantized reads {kinds}: add some,"
            f" such as {STAND_IN[missing[0]]}, or choose the stages with to_quant_block_names"
        )
