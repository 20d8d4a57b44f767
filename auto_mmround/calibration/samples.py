"""Samples to model inputs for a run: which samples of which set, and an honest count of what became
of them."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

from auto_mmround.calibration import roots
from auto_mmround.calibration.datasets import Rows, load_rows
from auto_mmround.calibration.dotted import Collate
from auto_mmround.calibration.inputs import Encoder, ModelInput
from auto_mmround.calibration.processor import chat_owner, get_processor
from auto_mmround.calibration.rows import BadSample, Sample
from auto_mmround.calibration.template import Template
from auto_mmround.errors import UserError
from auto_mmround.modalities import MODALITIES

log = logging.getLogger("auto_mmround")

T = TypeVar("T")


@dataclass(frozen=True)
class SetReport:
    """What one set gave. asked, used: samples; tokens: modality -> number, over the used
    samples."""

    name: str
    asked: int
    used: int
    tokens: Mapping[str, int]

    def text(self) -> str:
        """A few words for the log."""
        return f"{self.used} of {self.name} ({_counted(self.tokens)})"


@dataclass(frozen=True)
class Report:
    """What became of the samples. skipped: reason -> ids. tokens: modality -> number, over the used
    samples. sets: the same for each set of a mixture."""

    asked: int
    used: int
    short: int
    skipped: Mapping[str, tuple[str, ...]]
    tokens: Mapping[str, int]
    notes: tuple[str, ...] = ()
    sets: tuple[SetReport, ...] = ()

    def text(self) -> str:
        """One paragraph for the log."""
        parts = [
            f"calibration: {self.used} of {self.asked} samples, {_counted(self.tokens)} tokens"
        ]
        if len(self.sets) > 1:
            parts.append(", ".join(each.text() for each in self.sets))
        if self.short:
            texts = "1 text is" if self.short == 1 else f"{self.short} texts are"
            parts.append(f"{texts} shorter than seqlen: the set has no longer ones")
        for reason, ids in self.skipped.items():
            named = ", ".join(ids[:3]) + (", .." if len(ids) > 3 else "")
            parts.append(f"skipped as {reason}: {len(ids)} ({named})")
        return "; ".join([*parts, *self.notes])


def _counted(tokens: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in tokens.items()) or "none"


def token_counts(inputs: Iterable[ModelInput]) -> dict[str, int]:
    """Modality -> number of tokens, in the order of MODALITIES."""
    counts = sum(
        (torch.bincount(made.modality_T.long(), minlength=len(MODALITIES)) for made in inputs),
        torch.tensor(0),
    )
    return {
        name: int(count) for name, count in zip(MODALITIES, counts.reshape(-1).tolist()) if count
    }


# Not the user's mistake, so never a reason to stop: such samples are left out and counted.
GENTLE = (
    "too short", "repetitive", "plain text with a media placeholder", "media longer than seqlen",
    "sound longer than the model hears", "media longer than the model's positions",
)  # fmt: skip


class Tally:
    """Counts skipped samples by reason; raises instead where the user asked to stop at bad ones."""

    def __init__(self, stop: bool) -> None:
        self.stop = stop
        self.skipped: dict[str, list[str]] = {}
        self.unread: Counter[str] = Counter()

    def attempt(self, label: str, make: Callable[[Any], T], argument: Any) -> T | None:
        """make(argument), or None for a bad sample, which is counted."""
        try:
            return make(argument)
        except BadSample as error:
            gentle = error.reason in GENTLE
            if self.stop and not gentle:
                raise UserError(f"{error} (on_bad_sample=skip leaves such samples out)") from error
            log.log(logging.DEBUG if gentle else logging.WARNING, "skipped: %s", error)
            self.skipped.setdefault(error.reason, []).append(label)
            return None


def shares(nsamples: int, sets: Sequence[Rows]) -> tuple[list[int], tuple[str, ...]]:
    """How many samples each set gives: its `num`, the rest of nsamples evenly over the others,
    smallest set first."""
    fixed = sum(rows.source.num or 0 for rows in sets)
    given = [rows.source.num or 0 for rows in sets]
    notes: tuple[str, ...] = ()
    if fixed > nsamples:
        ends = [sum(given[: i + 1]) * nsamples // fixed for i in range(len(given))]
        given = [end - start for start, end in zip([0, *ends], ends)]
        notes = (f"num= adds up to {fixed}, more than nsamples {nsamples}: scaled down",)
    left = nsamples - fixed
    free = sorted(
        (i for i, rows in enumerate(sets) if rows.source.num is None), key=lambda i: len(sets[i])
    )
    for done, i in enumerate(free):
        share = max(0, -(-left // (len(free) - done)))
        given[i] = share if sets[i].source.concat else min(share, len(sets[i]))
        left -= given[i]
    return given, notes


def packed(rows: Rows, tokenizer: Any, seqlen: int, wanted: int, order: Iterator[int]) -> Rows:
    """The `concat` option: texts one after the other, EOS between them, cut into samples of exactly
    seqlen tokens."""
    bos, eos = getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None)
    opening = [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
    stream: list[int] = []
    for index in order:
        text = rows.sample(index).text
        if text is None:
            raise UserError(f"dataset {rows.source.name!r}: concat is for plain text rows")
        stream += tokenizer(text, add_special_tokens=False)["input_ids"] + (
            [] if eos is None else [eos]
        )
        if len(stream) >= wanted * (seqlen - len(opening)):
            break
    body = seqlen - len(opening)
    samples = [
        Sample(
            f"{rows.name}#concat{i}",
            input_ids=torch.tensor(opening + stream[i * body : (i + 1) * body]),
        )
        for i in range(min(wanted, len(stream) // body))
    ]
    return Rows(rows.source, samples, name=rows.name)


def pick(
    rows: Rows, wanted: int, encode: Encoder, tally: Tally, seed: int
) -> tuple[list[ModelInput], int]:
    """At most `wanted` inputs of one set, in its order, and how many of them (the last ones) are
    shorter than seqlen.

    A set with more rows than wanted is sampled by seed. Plain text must fill seqlen; shorter ones
    (at least MIN_TOKENS) follow only if too few do. Conversations are taken as long as they are.
    """
    order: list[int] = list(range(len(rows)))
    if len(rows) > wanted:
        order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    if rows.source.concat:
        rows = packed(rows, encode.tokenizer, encode.seqlen, wanted, iter(order))
        order = list(range(len(rows)))
    full: dict[int, ModelInput] = {}
    short: dict[int, ModelInput] = {}
    later: list[tuple[int, Sample]] = []
    for index in order:
        if len(full) == wanted:
            break
        sample = tally.attempt(f"{rows.name}#{index}", rows.sample, index)
        tally.unread.update(() if sample is None else sample.unread)
        # A text can't have more tokens than bytes, bar a few special ones: no need to tokenise it
        # yet.
        if (
            sample is not None
            and sample.text is not None
            and len(sample.text.encode()) + 8 < encode.seqlen
        ):
            later.append((index, sample))
        elif sample is not None:
            made = tally.attempt(sample.id, encode, sample)
            if (
                made is not None
                and not sample.messages
                and len(made.modality_T) < encode.seqlen
                and sample.inputs is None
            ):
                later.append((index, sample))
            elif made is not None:
                full[index] = made
    for index, sample in later:
        if len(full) + len(short) == wanted:
            break
        made = tally.attempt(sample.id, encode.long_enough, sample)
        if made is not None:
            short[index] = made
    return [full[i] for i in sorted(full)] + [short[i] for i in sorted(short)], len(short)


@dataclass(frozen=True)
class Preparers:
    """What turns rows into inputs of one model. processor_name: one of ours, by its name or file.
    positions: tokens that the model has room for; longer samples are cut, and that is counted.
    accept: is shown each input, and raises BadSample for one that the model does not take."""

    tokenizer: Any
    processor: Any = None
    template: Template = field(default_factory=Template)
    config: Any = None
    image_processor: Any = None
    processor_name: str | None = None
    positions: int | None = None
    accept: Callable[[ModelInput], None] = lambda made: None


@dataclass(frozen=True)
class Reading:
    """Which rows are read, and how.

    truncation: conversations are cut to seqlen too (plain text always is). prompt: stop at the
    opening of the last answer. on_bad_sample: "error" raises at the first damaged, missing or
    malformed one, "skip" counts them. collate: the user's own way from a row to model inputs.
    quiet: the report is only returned, not logged.
    """

    nsamples: int = 128
    seqlen: int = 2048
    truncation: bool = True
    seed: int = 42
    extra_data_dir: Any = None
    allow_url: bool = False
    prompt: bool = False
    on_bad_sample: str = "error"
    collate: Collate | None = None
    quiet: bool = False


def build(dataset: Any, preparers: Preparers, reading: Reading) -> tuple[list[ModelInput], Report]:
    """Model inputs for a dataset argument (a spec, rows, or Samples), and a report on the rows.

    Raises UserError for wrong arguments, and if no sample can be used.
    """
    if reading.on_bad_sample not in ("error", "skip"):
        raise UserError(f"on_bad_sample must be error or skip, not {reading.on_bad_sample!r}")
    if reading.nsamples < 1 or reading.seqlen < 1:
        raise UserError(
            f"nsamples ({reading.nsamples}) and seqlen ({reading.seqlen}) must be at least 1"
        )
    encode = _encoder(preparers, reading)
    sets = load_rows(dataset, reading.collate)
    given, notes = shares(reading.nsamples, sets)
    tally = Tally(reading.on_bad_sample == "error")
    inputs: list[ModelInput] = []
    of_sets: list[SetReport] = []
    short = 0
    for rows, wanted in zip(sets, given, strict=True):
        made, few = pick(rows, wanted, encode, tally, reading.seed)
        inputs, short = inputs + made, short + few
        of_sets.append(SetReport(rows.name, wanted, len(made), token_counts(made)))
    asked = reading.nsamples if any(rows.source.num is None for rows in sets) else sum(given)
    skipped = {reason: tuple(ids) for reason, ids in tally.skipped.items()}
    notes += _remarks(encode, inputs, tally)
    report = Report(asked, len(inputs), short, skipped, token_counts(inputs), notes, tuple(of_sets))
    if not inputs:
        name = repr(dataset) if isinstance(dataset, str) else "given"
        raise UserError(f"no usable sample in the dataset {name}; {report.text()}")
    loud = report.used < report.asked or any(made.left for made in inputs)
    level = logging.DEBUG if reading.quiet else logging.WARNING if loud else logging.INFO
    log.log(level, "%s", report.text())
    return inputs, report


def _encoder(of: Preparers, reading: Reading) -> Encoder:
    made = get_processor(of.processor_name, of.template)
    family = made(of.tokenizer, of.processor, of.image_processor, of.config)
    return Encoder(
        of.tokenizer, of.processor, family, of.template, of.config,
        roots.parse_roots(reading.extra_data_dir, reading.allow_url),
        min(reading.seqlen, of.positions or reading.seqlen),
        reading.truncation, reading.prompt, of.positions, of.accept,
    )  # fmt: skip


def _remarks(encode: Encoder, inputs: Sequence[ModelInput], tally: Tally) -> tuple[str, ...]:
    """What the user should know of samples that were not taken as they are."""
    notes: tuple[str, ...] = ()
    chats = any(not bool(made.answer_T.all()) for made in inputs)
    owner = chat_owner(encode.tokenizer, encode.processor)
    if chats and not encode.template.extra_encode and owner is None:
        notes += ("no chat template: the contents of a conversation are joined as they are",)
    left = Counter(name for made in inputs for name in made.left)
    for what, counted in (
        ("left out", left.items()),
        ("columns not read", tally.unread.most_common(12)),
    ):
        if counted:
            notes += (f"{what}: " + ", ".join(f"{name} ({count})" for name, count in counted),)
    return notes
