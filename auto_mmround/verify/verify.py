"""Does a checkpoint hold the tuned values, and do engines agree? Findings, and one verdict per
engine."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor

from auto_mmround.checkpoint.findings import Finding
from auto_mmround.checkpoint.loader import from_quantized
from auto_mmround.checkpoint.subject import Subject, read_subject
from auto_mmround.errors import UserError
from auto_mmround.export import formats
from auto_mmround.readers import ENGINES
from auto_mmround.verify import engines
from auto_mmround.verify.agreement import Reference, judge, make_reference, rounds_inputs
from auto_mmround.verify.engines import EngineResult, ask, interpreter, reads
from auto_mmround.verify.limits import refusal
from auto_mmround.verify.llamacpp import ask_llamacpp
from auto_mmround.verify.probes import make_probes
from auto_mmround.verify.static import run_checks

NEW_TOKENS = 8


@dataclass(frozen=True)
class Verdict:
    """The verdict of one engine on one folder.

    status: "right", "wrong" or "not run". reason: why it is wrong or did not run. version: of the
    engine's packages. layers: quantized layers in the engine, None if it does not tell. planned:
    the right number of them. gap: largest logit difference to the decoded weights, relative to the
    logits' standard deviation. tokens: (greedy tokens that agree up to a near tie, of how many),
    from engines that generate.
    """

    folder: Path
    format: str
    engine: str
    status: str
    reason: str | None = None
    version: str = ""
    layers: int | None = None
    planned: int = 0
    max_difference: float = float("nan")
    gap: float = float("nan")
    tokens: tuple[int, int] | None = None

    @property
    def error(self) -> str | None:
        """Why the engine did not prove the checkpoint; None if it did."""
        return None if self.status == "right" else self.reason

    def line(self) -> str:
        """One line for people."""
        who = self.version or self.engine
        if self.status != "right":
            mark = "WRONG" if self.status == "wrong" else self.status
            return f"{mark} {self.folder.name}: {who}: {self.reason}"
        layers = (
            "" if self.layers is None else f"{self.layers} of {self.planned} quantized layers, "
        )
        tokens = (
            f", {self.tokens[0]} of {self.tokens[1]} tokens equal up to near ties"
            if self.tokens
            else ""
        )
        return (
            f"right {self.folder.name}: {who}, {layers}largest logit difference"
            f" {self.max_difference:.2g} ({self.gap:.2g} of their spread){tokens}"
        )


@dataclass(frozen=True)
class Verification:
    """All findings on one folder. notes: questions that could not be asked, and why."""

    folder: Path
    format: str
    findings: tuple[Finding, ...]
    verdicts: tuple[Verdict, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def right(self) -> bool:
        """No error in the files, and no engine that disagrees."""
        errors = any(finding.severity == "error" for finding in self.findings)
        return not errors and all(verdict.status != "wrong" for verdict in self.verdicts)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without missing figures."""
        verdicts = [
            {k: v for k, v in asdict(each).items() if k != "folder" and v == v}
            for each in self.verdicts
        ]
        facts = {"folder": str(self.folder), "format": self.format, "right": self.right}
        return facts | {
            "static": [asdict(f) for f in self.findings],
            "engines": verdicts,
            "notes": list(self.notes),
        }


def verify(
    folder: Path,
    chosen: Sequence[str] | None = None,
    *,
    source: Path | None = None,
    remote_code: bool = False,
    root: Path | None = None,
    timeout: float = 600,
    stream: bool | None = None,
) -> Verification:
    """The static check, then every engine that reads the format, or the ``chosen`` ones.

    chosen: an empty list asks no engine. source: the folder of the model before quantization. root:
    where `.engines` lies. stream: decode blocks when their turn comes; None: of models that take
    most of the free memory. If the static check finds errors, only chosen engines are asked. Raises
    UserError for a missing folder, and for a chosen engine that is unknown, not installed, or does
    not read the format.
    """
    root = engines.root() if root is None else root
    subject = read_subject(folder, source, remote_code)
    name = (
        subject.fmt.name if subject.fmt else "fake" if subject.quantization is None else "unknown"
    )
    for engine in chosen or ():
        require(engine, name, root)
    verification = Verification(folder, name, tuple(run_checks(subject)))
    wanted = (
        [engine for engine in ENGINES if name in reads(engine)] if chosen is None else list(chosen)
    )
    if chosen is None and not verification.right:
        return replace(verification, notes=("no engine is asked about files that are wrong",))
    reasons = {
        engine: None if chosen else _reason_not_to_ask(engine, subject, root) for engine in wanted
    }
    verdicts = {
        engine: Verdict(folder, name, engine, "not run", reason)
        for engine, reason in reasons.items()
    }
    asked = [engine for engine, reason in reasons.items() if reason is None]
    notes: list[str] = []
    if asked:
        how = {"remote_code": remote_code, "stream": stream}
        try:
            given, notes = _ask_all(asked, subject, name, root, timeout, how)
            verdicts |= given
        except UserError as error:
            if verification.right:  # else the findings say what is wrong
                raise
            verdicts |= {e: Verdict(folder, name, e, "not run", str(error)) for e in asked}
    return replace(verification, verdicts=tuple(verdicts.values()), notes=tuple(notes))


def _ask_all(
    asked: Sequence[str],
    subject: Subject,
    name: str,
    root: Path,
    timeout: float,
    options: Mapping[str, Any],
) -> tuple[dict[str, Verdict], list[str]]:
    """A verdict of each engine, and what could not be asked. options: of `from_quantized`."""
    folder, verdicts = subject.folder, dict[str, Verdict]()
    exact = from_quantized(folder, dtype="float32", **options)
    with tempfile.TemporaryDirectory() as made:
        probes, notes = make_probes(exact, Path(made))
    planned = len(subject.packed or subject.record.get("codes") or ())
    inputs = [probe.kwargs for probe in probes]
    references = {
        False: make_reference(
            folder, exact.model, inputs, blocks=exact.holder.blocks, options=options
        )
    }
    if rounds_inputs(subject.quantization) and any(
        ENGINES[engine].rounds_inputs for engine in asked
    ):
        rounding = from_quantized(folder, dtype="float32", activations=True, **options)
        references[True] = make_reference(
            folder, rounding.model, inputs, True, rounding.holder.blocks, options
        )
    for engine in asked:
        reference = references.get(ENGINES[engine].rounds_inputs, references[False])
        kinds = ENGINES[engine].takes(folder)
        taken = [i for i, probe in enumerate(probes) if probe.kind in kinds]
        if not taken:
            refused = " or ".join(dict.fromkeys(probe.kind for probe in probes))
            reason = f"{engine} is asked nothing: it takes no {refused}"
            verdicts[engine] = Verdict(folder, name, engine, "not run", reason)
            continue
        part = replace(
            reference,
            inputs=[reference.inputs[i] for i in taken],
            logits=[reference.logits[i] for i in taken],
        )
        media = [probes[i].media for i in taken] if ENGINES[engine].own_media else None
        verdicts[engine] = _verdict(
            engine, name, part, planned, root, timeout, media, exact.tokenizer
        )
    return verdicts, notes


def _verdict(
    engine: str,
    name: str,
    reference: Reference,
    planned: int,
    root: Path,
    timeout: float,
    media: Sequence[Mapping[str, Tensor]] | None = None,
    tokenizer: Any = None,
) -> Verdict:
    """media: one mapping for each input, for an engine that processes media itself."""
    python = interpreter(name, root, engine)
    adapter = ADAPTERS.get(engine, partial(_ask_with_tensors, engine))
    result = adapter(reference, media, tokenizer, python=python, timeout=timeout)
    facts = judge(result, reference, planned)
    return Verdict(reference.folder, name, engine, planned=planned, version=result.engine, **facts)


def _ask_with_tensors(
    engine: str,
    reference: Reference,
    media: Sequence[Mapping[str, Tensor]] | None,
    tokenizer: Any,
    *,
    python: Path,
    timeout: float,
) -> EngineResult:
    """Tensors of every input to the engine's program. With ``media`` it gets these and the ids
    alone."""
    class_name = type(reference.model).__name__
    cls = class_name if hasattr(transformers, class_name) else "AutoModelForImageTextToText"
    asked = {
        "dtype": ENGINES[engine].dtype,
        "class": cls,
        "new_tokens": NEW_TOKENS,
        "activations": False,
    }
    inputs = reference.inputs
    if media is not None:
        ids = ("input_ids", "decoder_input_ids")
        inputs = [
            {**{k: kwargs[k] for k in ids if k in kwargs}, **own}
            for kwargs, own in zip(inputs, media)
        ]
    return ask(engine, reference.folder, inputs, asked, python=python, timeout=timeout)


# Engines that are asked in another way than `_ask_with_tensors`.
ADAPTERS = {"llamacpp": ask_llamacpp}


def require(engine: str, name: str, root: Path) -> None:
    """Raises UserError for an engine that is unknown, not installed, or does not read a format."""
    require_reads(engine, name)
    if problem := engines.not_installed(interpreter(name, root, engine)):
        raise UserError(problem)


def require_reads(engine: str, name: str) -> None:
    """Raises UserError for an engine that is unknown or does not read a format."""
    if engine not in ENGINES:
        raise UserError(f"unknown engine {engine!r}: there are {', '.join(ENGINES)}")
    if name not in reads(engine):
        raise UserError(
            f"{engine} does not read the format {name}; it reads {', '.join(reads(engine))}"
        )


def _reason_not_to_ask(engine: str, subject: Subject, root: Path) -> str | None:
    """Why an engine can't be asked about this folder; None if it can."""
    schemes = frozenset(subject.schemes.values())
    fmt, name = subject.fmt, "fake"
    if fmt is not None:  # where a configuration does not tell formats apart, schemes do
        name = fmt.choose(schemes).name if fmt.choose and not fmt.told else fmt.name
    if fmt is not None and subject.quantization is not None:
        unread = formats.unread(subject.quantization, ENGINES[engine].rounds_inputs)
        if unread is not None:
            return f"{engine} would be asked for what our reader does not compute: {unread}"
    return refusal(engine, name, schemes) or engines.not_installed(interpreter(name, root, engine))
