"""Is what lies beside the weights in order: tokenizer, processor, chat template, code?"""

import json
import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from auto_mmround.checkpoint.findings import Finding, fault, read_json
from auto_mmround.checkpoint.folder import is_side_file, side_files
from auto_mmround.checkpoint.subject import Subject
from auto_mmround.checkpoint.sums import CONFIG, file_sums, sum_of
from auto_mmround.errors import UserError, several
from auto_mmround.model.loading import NONSENSE
from auto_mmround.untrusted import one_line, read_text
from auto_mmround.verify.together import TOGETHER

log = logging.getLogger("auto_mmround")

TOKENIZER = "tokenizer.json"
TOKENIZERS = (
    TOKENIZER, "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json",
)  # fmt: skip
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
SIDES = (TOKENIZERS, PROCESSORS)
TEMPLATES = ("chat_template.jinja", "chat_template.json")
TEMPLATE_END = ".jinja"
GENERATION = "generation_config.json"
SETTINGS = (GENERATION, *TEMPLATES)  # people may change these on purpose
TEXTS = ("", ".md")  # LICENSE and the like


def check_side_files(s: Subject) -> Iterator[Finding]:
    """Tokenizer, processor, chat template and code are there; every JSON file can be read."""
    there = {str(path.relative_to(s.folder)) for path in s.folder.rglob("*") if path.is_file()}
    wanted, processors = set(s.record.get("files") or ()), set(PROCESSORS)
    if s.source is not None:
        beside = {
            str(p.relative_to(s.source)) for p in s.source.rglob("*") if is_side_file(p, s.source)
        }
        wanted, processors = wanted | beside, processors & beside
    # Transformers 5 saves the image processor in processor_config.json
    for name in sorted(wanted - there):
        yield Finding(s.hygiene, name, "is missing")
    # A run copies what there is, so a folder of ours without any comes from a model without any.
    none_of = {
        names: bool(s.record) and not set(s.record.get("files") or ()) & {*names} for names in SIDES
    }
    if not there & set(TOKENIZERS):
        severity = "warning" if none_of[TOKENIZERS] else "error"
        yield Finding(severity, TOKENIZER, "is missing: the folder holds no tokenizer")
    towers = [key for key in s.config if key in ("vision_config", "audio_config")] or s.config.get(
        "num_mel_bins"
    )
    if towers and processors and not there & set(PROCESSORS):
        # A model's own code may need none (CogVLM2).
        severity = "warning" if s.config.get("auto_map") or none_of[PROCESSORS] else "error"
        text = "is missing: the model takes images or audio, the folder holds no processor"
        yield Finding(severity, PROCESSORS[0], text)
    if "vision_config" in s.config and not there & set(TEMPLATES) and not _has_template(s.folder):
        yield Finding("warning", TEMPLATES[0], "the folder holds no chat template")
    yield from _contents(s, there)


def check_source(folder: Path) -> None:
    """Raises UserError for what is wrong beside the weights of a model's folder, and would be wrong
    in every checkpoint that it is copied to: found before a run, not behind it. Warns of a
    tokenizer that cuts or pads."""
    found: list[Finding] = []
    config = read_json(folder / CONFIG, []) or {}  # loading says more of one that can't be read
    ours = {"source": str(folder)}  # a run's result is judged more strictly
    s = Subject(folder, config, None, None, {}, frozenset(), None, ours, folder)
    for finding in check_tokenizer(s):
        log.warning("%s: %s", finding.where, one_line(finding.message))
    for check in TOGETHER:
        found += check(s)
    found += _contents(s, {str(path.relative_to(folder)) for path in side_files(folder)})
    wrong = [f"{each.where}: {each.message}" for each in found if each.severity == "error"]
    if wrong:
        raise UserError(
            f"{folder}: {one_line(wrong[0])}{several(wrong)}; every checkpoint would have this from"
            " there: mend it, or leave the check of the result out with --no_check"
        )


def _contents(s: Subject, there: Collection[str]) -> Iterator[Finding]:
    """What is wrong in these files, and code that is missing among them."""
    for name in sorted(there):
        findings: list[Finding] = []
        if name.endswith("_config.json") or name == TOKENIZER:
            if name == TOKENIZER:
                content, findings = s.tokenizer
            else:
                content = read_json(s.folder / name, findings) or {}
            yield from findings if name != "quantization_config.json" else ()
            yield from _code(content, name, there)
        if name.endswith(TEMPLATE_END):
            yield from _unreadable(s.folder / name)
        if name == GENERATION and not findings:
            yield from _refused(s.folder)
    yield from _code(s.config, "config.json", there)


def _unreadable(path: Path) -> Iterator[Finding]:
    """A template that is no text: with it no tokenizer of the folder can be read."""
    try:
        read_text(path, "it")
    except UserError as error:
        yield fault(path.name, str(error).removeprefix("it "))


def _refused(folder: Path) -> Iterator[Finding]:
    """Settings of generation that Transformers refuses, and the whole model with them."""
    try:
        GenerationConfig.from_pretrained(folder, local_files_only=True)
    except NONSENSE as error:
        yield fault(GENERATION, f"Transformers refuses it: {one_line(str(error))[:200]}")


def _has_template(folder: Path) -> bool:
    return "chat_template" in (read_json(folder / "tokenizer_config.json", []) or {})


def _code(content: Mapping[str, Any], file: str, there: Collection[str]) -> Iterator[Finding]:
    """Python files named in `auto_map` ("module.Class"; with "repo--" before it the code lies
    elsewhere)."""
    table = content.get("auto_map")
    for value in table.values() if isinstance(table, dict) else ():
        for reference in value if isinstance(value, list) else [value]:
            if (
                isinstance(reference, str)
                and "--" not in reference
                and f"{reference.split('.')[0]}.py" not in there
            ):
                yield fault(
                    f"{reference.split('.')[0]}.py", f"is missing: {file} names it in auto_map"
                )


def check_tokenizer(s: Subject) -> Iterator[Finding]:
    """Neither truncation nor padding of a calibration is left in the tokenizer.

    What the source's own file says is a warning: Transformers and engines set both at each call.
    """
    tokenizer, _ = s.tokenizer
    keys = ("truncation", "padding")
    switched = {key: tokenizer[key] for key in keys if tokenizer.get(key) is not None}
    if not switched:
        return
    path, written = s.folder / TOKENIZER, (s.record.get("sums") or {}).get(TOKENIZER)
    theirs = read_json(s.source / TOKENIZER, []) if s.source is not None else None
    as_written = written is not None and written == sum_of(path, TOKENIZER)
    for key, value in switched.items():
        own = as_written if theirs is None else theirs.get(key) == value
        text = f"{key} is switched on: {json.dumps(value)[:80]}"
        yield Finding("warning" if own else "error", TOKENIZER, text)


def check_written(s: Subject) -> Iterator[Finding]:
    """Every file beside the tensors, and every key of the configuration, is as the run wrote it."""
    written: dict[str, str] = dict(s.record.get("sums") or {})
    now = file_sums(s.folder, s.whole) if written else {}
    for where in sorted(now.keys() | written.keys()):
        path = Path(where.partition(": ")[0])
        of_config = str(path) == CONFIG
        if now.get(where) == written.get(where) or (not of_config and where not in written):
            continue
        if where not in now and not (of_config and s.config):
            continue  # a missing file is found otherwise
        text = "is not what the run wrote (its checksum in run.json differs)"
        if where not in written or where not in now:
            text = f"is {'new' if where not in written else 'gone'} since the run wrote the file"
        free = path.name in SETTINGS or path.suffix in TEXTS
        yield Finding("warning" if free else "error", where, text)
