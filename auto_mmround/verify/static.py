"""Is a checkpoint folder right? A table of small checks without any engine, each with its findings.

An error: some reader would fail, or read wrong values without a warning. A warning: something can't
be checked, or may be a habit of the tool that wrote the files.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch

from auto_mmround.checkpoint.findings import Finding, fault, read_json
from auto_mmround.checkpoint.subject import Subject, read_subject
from auto_mmround.errors import several
from auto_mmround.export.format import PackedFormat
from auto_mmround.export.formats import PATTERN_SECONDS, entries, resolve
from auto_mmround.export.method import Overrides, Spelling, searched
from auto_mmround.families import vllm_module, vllm_rename
from auto_mmround.headers import TYPE_NAMES, Header
from auto_mmround.numerics.grids import SCALE_DTYPES, Codes
from auto_mmround.recipe.schemes import Scheme
from auto_mmround.run.plan import FUSED
from auto_mmround.untrusted import TooLong, time_limit
from auto_mmround.verify.kv_cache import check_kv_cache
from auto_mmround.verify.side_files import check_side_files, check_tokenizer, check_written
from auto_mmround.verify.together import TOGETHER
from auto_mmround.verify.values import check_codes, check_decoded, check_plain_values


def check_tensors(s: Subject) -> Iterator[Finding]:
    """Every tensor of the model is there, and no other."""
    if s.quantization is not None and s.fmt is None:
        return
    if s.skeleton is not None:
        unread = s.record.get("unread") or ()  # the class did not read them in the source either
        for text, group in (
            ("no tensor fills it", s.skeleton.missing),
            (
                "the model has none such",
                [name for name in s.skeleton.unknown if name not in unread],
            ),
        ):
            if group:
                yield fault(group[0], text + several(group))
        plain = set(s.plain())
        for name, shape in s.skeleton.shapes.items():
            if name in plain and s.tensors[name].shape != shape:
                yield fault(name, f"has shape {s.tensors[name].shape}, the model's is {shape}")
    if s.record.get("tensors") and not s.whole:
        plain, written = set(s.plain()), set(s.record["tensors"])
        for text, some in (
            ("is gone", sorted(written - plain)),
            ("was not written", sorted(plain - written)),
        ):
            if some:
                yield fault(some[0], f"{text} according to run.json" + several(some))
    if s.source is not None and not s.whole:
        apart = s.skeleton.apart if s.skeleton is not None else ()
        absent = [
            name
            for name, key in s.originals(s.weights()).items()
            if name not in s.tensors
            and name.removesuffix(".weight") not in s.packed
            and key not in apart
        ]
        if absent:
            yield fault(absent[0], "is in the source, not here" + several(absent))


def check_packed_modules(s: Subject) -> Iterator[Finding]:
    """The packed weights are those that the run wrote."""
    if s.fmt is None or s.whole:  # a plain checkpoint holds the tuned values as ordinary weights
        return
    written = set(s.record.get("codes") or s.packed)
    for text, some in (
        ("its packed weight is gone", written - s.packed),
        ("was not packed", s.packed - written),
    ):
        if some:
            yield fault(min(some), f"{text} according to run.json" + several(sorted(some)))


def check_layout(s: Subject) -> Iterator[Finding]:
    """Parts, dtypes and shapes of every packed weight are what its scheme and its layer ask for."""
    expected: dict[tuple[Scheme, int, int], dict[str, Header]] = {}
    for module in sorted(s.packed):
        layer = s.skeleton.linears.get(module) if s.skeleton else None
        wanted = s.schemes.get(module)
        if layer is None or wanted is None or s.fmt is None:
            continue
        key = (wanted, layer.out_features, layer.in_features)
        if key not in expected:
            # a name may stand for several layouts
            variants = (s.fmt, resolve(s.fmt.name, {wanted}))
            fmt = next((each for each in variants if each.check(*key) is None), None)
            if fmt is None:
                yield fault(module, f"{s.fmt.name} {s.fmt.check(*key)}")
            expected[key] = _expected_parts(fmt, *key) if isinstance(fmt, PackedFormat) else {}
        yield from _compare_parts(s, module, expected[key])


def _expected_parts(
    fmt: PackedFormat, wanted: Scheme, out_features: int, in_features: int
) -> dict[str, Header]:
    """What our own packer makes of a weight of zeros; nothing for floats, whose unpacking tells
    enough."""
    if wanted.data_type != "int":
        return {}
    group = in_features if wanted.group_size == -1 else wanted.group_size
    groups = (out_features, -(-in_features // group))
    codes = Codes(
        torch.zeros(out_features, in_features, dtype=torch.uint8),
        torch.ones(groups, dtype=SCALE_DTYPES[wanted.scale_dtype]),
        torch.full(groups, 2 ** (wanted.bits - 1), dtype=torch.uint8),
        wanted.bits,
        group,
        wanted.sym,
    )
    return {
        name: Header("", TYPE_NAMES[t.dtype], tuple(t.shape))
        for name, t in fmt.pack("", codes).items()
    }


def _alike(s: Subject) -> set[str]:
    """Dtypes that count as equal: MLX takes any float; other tools' scales may be either half."""
    if isinstance(s.fmt, PackedFormat) and s.fmt.any_float:
        return {"F16", "BF16", "F32"}
    if s.record:
        return set()
    return {"F16", "BF16"}


def _compare_parts(s: Subject, module: str, expected: Mapping[str, Header]) -> Iterator[Finding]:
    for part, wanted in expected.items():
        name = module + part
        stored = s.tensors.get(name)
        if stored is None:
            if part != ".g_idx" or s.record:  # other tools leave it out if it has no effect
                yield fault(name, "is missing")
        elif stored.shape != wanted.shape:
            yield fault(
                name, f"has shape {stored.shape}; bits and group size ask for {wanted.shape}"
            )
        elif stored.dtype != wanted.dtype and not {stored.dtype, wanted.dtype} <= _alike(s):
            yield fault(name, f"is stored as {stored.dtype}, the layout asks for {wanted.dtype}")


def check_names(s: Subject) -> Iterator[Finding]:
    """Transformers and vLLM, each by its own rules, quantize exactly the packed layers, each as
    packed."""
    if s.quantization is None or s.fmt is None or s.skeleton is None:
        return
    model_type = str(s.config.get("model_type"))
    spellings = {
        "Transformers": {layer.name: stored for stored, layer in s.skeleton.linears.items()},
        "vLLM": {vllm_module(model_type, stored): stored for stored in s.skeleton.linears},
    }
    for engine, spelled in spellings.items():
        reader = s.fmt.method.readers.get(engine) if s.fmt.method else None
        if reader is None:
            continue
        spelling = Spelling(
            s.quantization,
            list(spelled),
            next((name for name, stored in spelled.items() if stored == s.skeleton.head), None),
            frozenset(name for name, stored in spelled.items() if stored in s.packed),
            frozenset(n for n, stored in spelled.items() if s.skeleton.linears[stored].turned)
            if engine == "Transformers"
            else frozenset(),  # vLLM has classes of its own
            (lambda name: vllm_rename(model_type, name)) if engine == "vLLM" else str,
        )
        try:
            with time_limit(PATTERN_SECONDS):
                answer = reader(spelling)
        except (TooLong, re.error) as error:
            text = (
                f"its patterns can't be matched as {engine} does: {error or 'they take too long'}"
            )
            yield fault("quantization_config", text)
            continue
        if answer is not None:
            yield from _compare_names(s, engine, spelled, answer)


def _compare_names(
    s: Subject, engine: str, spelled: Mapping[str, str], answer: Mapping[str, Overrides]
) -> Iterator[Finding]:
    assert s.skeleton is not None and s.quantization is not None
    plain = [name for name, stored in spelled.items() if stored in s.packed and name not in answer]
    turned = [name for name in plain if s.skeleton.linears[spelled[name]].turned]
    # a run may have been meant for other engines
    for severity, some in (
        ("error", [name for name in plain if name not in turned]),
        ("warning", turned),
    ):
        if some:
            text = (
                f"is packed, but {engine} names it {some[0]} and by quantization_config makes it a"
                f" plain layer of random weights{several(some)}"
            )
            yield Finding(severity, spelled[some[0]], text)
    made = [
        n
        for n, key in spelled.items()
        if n in answer and key not in s.packed and not s.skeleton.linears[key].tied
    ]
    if made:
        text = (
            f"is a plain weight, but {engine} names it {made[0]} and by quantization_config"
            " quantizes it"
        )
        yield fault(spelled[made[0]], text + several(made))
    other = []
    for name, options in answer.items():
        packed = s.schemes.get(spelled[name])
        base = {"bits": s.quantization.get("bits"), "group_size": s.quantization.get("group_size")}
        if (
            packed
            and base["bits"]
            and any({**base, **options}[key] != getattr(packed, key) for key in base)
        ):
            other.append(name)
    if other:
        text = f"{engine} would read it with another scheme than it is packed with"
        yield Finding("warning", spelled[other[0]], text + several(other))


def check_entries(s: Subject) -> Iterator[Finding]:
    """Every name and pattern of the configuration fits a layer."""
    if s.quantization is None or s.skeleton is None:
        return
    model_type = str(s.config.get("model_type"))
    known = (
        {n for stored, layer in s.skeleton.linears.items() for n in (stored, layer.name)}
        | s.skeleton.mixtures
        | s.skeleton.unread
    )
    known |= {vllm_module(model_type, name) for name in known}
    try:
        with time_limit(PATTERN_SECONDS):
            idle = [entry for entry in entries(s.quantization) if not names_something(entry, known)]
    except TooLong:
        yield fault("quantization_config", "its patterns take too long to match")
        return
    for entry in idle:
        yield Finding(
            s.hygiene, f"quantization_config: {entry}", "fits no layer of the model in any spelling"
        )


def names_something(entry: str, names: Iterable[str]) -> bool:
    """Whether some reader could match an entry with one of the names, as a part or as a pattern."""
    if entry == "Linear":
        return True
    for mark in ("re:", "+:", "-:"):
        entry = entry.removeprefix(mark)
    return any(entry in name or searched(entry, name) for name in names)


def check_copies(s: Subject) -> Iterator[Finding]:
    """config.json and quantization_config.json agree."""
    path = s.folder / "quantization_config.json"
    if s.quantization is not None and path.is_file():
        findings: list[Finding] = []
        other = read_json(path, findings)
        yield from findings
        if other is not None and other != s.quantization:
            yield Finding(s.hygiene, path.name, "differs from quantization_config in config.json")


def check_computed(s: Subject) -> Iterator[Finding]:
    """The configuration asks engines for nothing that our reader does not compute."""
    method = s.fmt.method if s.fmt else None
    unread = method.unread(s.quantization, True) if method and s.quantization else None
    if unread:
        yield Finding("warning", "quantization_config", f"is not checked: {unread}")


def check_fused(s: Subject) -> Iterator[Finding]:
    """Layers that engines load as one matrix are packed alike."""
    groups: dict[tuple[str, int], dict[str, Scheme | None]] = {}
    for name in s.skeleton.linears if s.skeleton and s.fmt else ():
        parent, _, leaf = name.rpartition(".")
        for i, group in enumerate(FUSED):
            if leaf in group:
                groups.setdefault((parent, i), {})[leaf] = s.schemes.get(name)
    for (parent, _), schemes in groups.items():
        if len(set(schemes.values())) > 1:
            odd = [leaf for leaf, one in schemes.items() if list(schemes.values()).count(one) == 1]
            text = (
                f"engines load {', '.join(sorted(schemes))} as one matrix, but they are not packed"
                " alike"
            )
            yield fault(f"{parent}.{(odd or sorted(schemes))[0]}", text)


CHECKS: tuple[Callable[[Subject], Iterator[Finding]], ...] = (
    check_tensors,
    check_packed_modules,
    check_layout,
    check_copies,
    check_entries,
    check_names,
    check_fused,
    check_computed,
    check_side_files,
    check_tokenizer,
    *TOGETHER,
    check_plain_values,
    check_codes,
    check_decoded,
    check_kv_cache,
    check_written,  # last: what a change does says more than that there is one
)


def run_checks(subject: Subject) -> list[Finding]:
    """Findings of reading the folder, then of each check in the table."""
    findings = [*subject.findings, *(finding for run in CHECKS for finding in run(subject))]
    return list(dict.fromkeys(findings))


def check(folder: Path, source: Path | None = None, remote_code: bool = False) -> list[Finding]:
    """All findings on a checkpoint folder.

    source: the folder of the model before quantization, compared if given. remote_code: the model's
    own code may run, to show its layers. Raises UserError for a missing folder.
    """
    return run_checks(read_subject(folder, source, remote_code))
