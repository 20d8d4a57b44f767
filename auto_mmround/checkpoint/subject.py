"""A checkpoint folder as the static check sees it: headers, configuration, and its model.

Reading never raises for a fault of the folder. It notes a finding and goes on.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from auto_mmround.checkpoint.findings import Finding, fault, read_json
from auto_mmround.checkpoint.reading import CONTRADICTIONS, Shards
from auto_mmround.errors import UserError, several
from auto_mmround.export import formats
from auto_mmround.export.format import Format, WholeFormat
from auto_mmround.headers import DAMAGED, Header, read_header
from auto_mmround.model.experts import separable
from auto_mmround.model.keys import filled_parameters, further_layers, loaded_names
from auto_mmround.model.kv_cache import SCALES
from auto_mmround.model.loading import Impossible, read_config, skeleton
from auto_mmround.model.restacking import stacking
from auto_mmround.model.speaking import speaking
from auto_mmround.model.stored import Stored, stored_tensors
from auto_mmround.model.structure import find_experts, linears
from auto_mmround.recipe.schemes import Scheme
from auto_mmround.untrusted import INDEX, index_problem, no_metadata

CODES_RECORD = {"bits", "group_size", "sym", "q", "scale", "zero"}


@dataclass(frozen=True)
class Linear:
    """A linear layer: Transformers' name and its features. tied: its weight is another module's.
    turned: plain files hold its weight as (in, out), as GPT-2's Conv1D does."""

    name: str
    out_features: int
    in_features: int
    tied: bool
    turned: bool = False


@dataclass(frozen=True)
class Skeleton:
    """The tensors that the configured model needs, by checkpoint names.

    missing: parameters that no tensor fills. unknown: tensors that fill none. shapes: of tensors
    that are one whole parameter. linears: module -> layer. head: the output head. respelled:
    tensors of the source -> their names here, if the tool that wrote the folder changed them. tied:
    tensors that the configuration ties to another one in the folder. mixtures: experts and routers,
    which are no linear layers in Transformers, in every spelling. unread: modules of tensors that
    the class does not load, such as layers that predict further tokens. apart: stacks of the source
    whose experts lie here one by one.
    """

    shapes: Mapping[str, tuple[int, ...]]
    linears: Mapping[str, Linear]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    head: str | None
    respelled: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    mixtures: frozenset[str] = frozenset()
    unread: frozenset[str] = frozenset()
    apart: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Subject:
    """All facts on a folder but the values.

    tensors: by name; if several files hold a name, the first counts. packed: modules with a packed
    weight, by checkpoint name. fmt: None for a plain or unreadable format. record: `run.json`,
    empty for other tools' files. source: the folder of the model before quantization. schemes:
    of packed modules, if the configuration has one. findings: of the reading itself. kv_scales:
    tensors that are scales of keys and values, in a format that has a place for them; not among
    ``tensors``.
    """

    folder: Path
    config: Mapping[str, Any]
    quantization: Mapping[str, Any] | None
    fmt: Format | None
    tensors: Mapping[str, Header]
    packed: frozenset[str]
    skeleton: Skeleton | None
    record: Mapping[str, Any]
    source: Path | None
    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    kv_scales: Mapping[str, Header] = field(default_factory=dict)

    @cached_property
    def tokenizer(self) -> tuple[dict[str, Any], list[Finding]]:
        """`tokenizer.json`, empty without one, and what is wrong in reading it. It takes a second
        where the vocabulary is large, and several checks read it."""
        findings: list[Finding] = []
        return read_json(self.folder / "tokenizer.json", findings) or {}, findings

    @property
    def whole(self) -> bool:
        """Whether the weights lie in files of another kind, which only the format reads."""
        return isinstance(self.fmt, WholeFormat)

    @property
    def hygiene(self) -> str:
        """The severity of a fault in our own files that may be a habit of another tool."""
        return "error" if self.record else "warning"

    def parts(self, module: str) -> dict[str, Header]:
        """The tensors of a packed module."""
        names = [f"{module}.{part}" for part in self.fmt.parts] if self.fmt else []
        return {name: self.tensors[name] for name in names if name in self.tensors}

    def plain(self) -> list[str]:
        """Names of the tensors that belong to no packed module."""
        taken = {name for module in self.packed for name in self.parts(module)}
        return [name for name in self.tensors if name not in taken]

    def weights(self) -> Stored:
        """The tensors of the source; none without a source."""
        return stored_tensors(self.source) if self.source is not None else Stored({})

    def originals(self, weights: Stored) -> dict[str, str]:
        """Tensor by its name here -> its name in the source."""
        names = self.skeleton.respelled if self.skeleton is not None else {}
        return {names.get(key, key): key for key in weights.files}

    def read(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor), one in memory at a time."""
        headers = {**self.tensors, **self.kv_scales}
        with Shards() as shards:
            for name in names:
                yield name, shards.tensor(self.folder / headers[name].file, name)


def read_subject(folder: Path, source: Path | None = None, remote_code: bool = False) -> Subject:
    """All facts on a folder but the values. Raises UserError only for a missing folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    findings: list[Finding] = []
    config = read_json(folder / "config.json", findings) or {}
    index = read_json(folder / INDEX, findings) if (folder / INDEX).is_file() else None
    weight_map = index.get("weight_map", {}) if index is not None else None
    if weight_map is not None and (wrong := index_problem(weight_map)):
        findings.append(fault(INDEX, wrong))
        weight_map = None
    elif index is not None and (wrong := no_metadata(index)):
        findings.append(fault(INDEX, wrong))
    quantization = config.get("quantization_config")
    fmt = _format(quantization, findings)
    if formats.problem(quantization):
        quantization = None  # a finding of its own by now; nothing else may lean on it
    whole = isinstance(fmt, WholeFormat)
    tensors = {} if whole else _headers(folder, weight_map, findings)
    here = fmt is not None and fmt.kv_cache
    kv_scales = {n: h for n, h in tensors.items() if here and n.rpartition(".")[2] in SCALES}
    tensors = {name: header for name, header in tensors.items() if name not in kv_scales}
    packed = fmt.packed(tensors) if fmt else frozenset()
    record = _record(folder / "run.json", findings)
    parts = {f"{module}.{part}" for module in packed for part in (fmt.parts if fmt else ())}
    keys = {name for name in tensors if name not in parts} | {
        f"{module}.weight" for module in packed
    }
    original = stored_tensors(source).files if source is not None else ()
    packs = fmt is not None and fmt.packs
    made, decoded = None, _decoded(fmt, folder) if isinstance(fmt, WholeFormat) else keys
    if config and decoded is not None:
        keys = decoded
        made = _skeleton(folder, keys, original, findings, remote_code, packs)
    schemes = _schemes(quantization, packed, findings) if fmt and quantization else {}
    return Subject(
        folder, config, quantization, fmt, tensors, packed, made, record, source, schemes, findings,
        kv_scales,
    )  # fmt: skip


def _decoded(fmt: WholeFormat, folder: Path) -> set[str] | None:
    """The tensors that a format finds in files of its own; None where they can't be read, which the
    check of their values tells."""
    try:
        return set(fmt.read(folder))
    except (UserError, OSError, *CONTRADICTIONS):
        return None


def _schemes(
    quantization: Mapping[str, Any], packed: frozenset[str], findings: list[Finding]
) -> dict[str, Scheme]:
    """The schemes of packed modules. One warning names modules without a readable one, and why."""
    try:
        schemes = formats.schemes_of(quantization, packed)
    except UserError as error:
        findings.append(fault("quantization_config", str(error)))
        return {}
    unread = sorted(packed - schemes.keys())
    if unread:
        try:
            formats.scheme_of(quantization, unread[0])
        except (UserError, KeyError) as error:
            text = f"is not checked{several(unread)}: {error}"
            findings.append(Finding("warning", unread[0], text))
    return schemes


def _record(path: Path, findings: list[Finding]) -> dict[str, Any]:
    """`run.json`, if it has the form that a run writes; else empty."""
    record = (read_json(path, findings) if path.is_file() else None) or {}
    sums = [*_values(record.get("tensors")), *_values(record.get("sums"))]
    codes = _values(record.get("codes"))
    texts = all(isinstance(each, str) for each in (*(record.get("files") or ()), *sums))
    if texts and all(isinstance(c, dict) and c.keys() >= CODES_RECORD for c in codes):
        return record
    findings.append(fault(path.name, "has not the form that a run writes"))
    return {}


def _values(table: Any) -> list[Any]:
    """The values of a table; anything else becomes a value that no check accepts."""
    return list(table.values()) if isinstance(table, dict) else [None] if table else []


def _headers(
    folder: Path, weight_map: Mapping[str, str] | None, findings: list[Finding]
) -> dict[str, Header]:
    """Every tensor of every weight file, with what is wrong between files and index."""
    tensors: dict[str, Header] = {}
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    wanted = sorted(set(weight_map.values())) if weight_map is not None else ["model.safetensors"]
    for file in [*wanted, *files]:
        if file in wanted and file not in files:
            where = INDEX if weight_map is not None else file
            findings.append(fault(where, f"names {file}, which is not in the folder"))
            files.append(file)
    for file in files:
        if file not in wanted:
            findings.append(fault(file, f"holds weights that {INDEX} does not name"))
        if (folder / file).is_file():
            _add_file(folder / file, tensors, findings)
    for name, file in (weight_map or {}).items():
        if (folder / file).is_file() and (name not in tensors or tensors[name].file != file):
            findings.append(fault(name, f"{INDEX} says it lies in {file}, where it is not"))
    unnamed = [name for name in tensors if weight_map is not None and name not in weight_map]
    findings += [
        fault(n, f"lies in {tensors[n].file}, but {INDEX} does not name it") for n in unnamed
    ]
    return tensors


def _add_file(path: Path, tensors: dict[str, Header], findings: list[Finding]) -> None:
    try:
        headers = read_header(path)
    except DAMAGED as error:
        findings.append(fault(path.name, f"is damaged or cut off ({error})"))
        return
    findings += [
        fault(name, f"lies in {tensors[name].file} and in {path.name}")
        for name in headers
        if name in tensors
    ]
    tensors |= {name: header for name, header in headers.items() if name not in tensors}


def _format(quantization: Mapping[str, Any] | None, findings: list[Finding]) -> Format | None:
    if quantization is None:
        return None
    if wrong := formats.problem(quantization):
        findings.append(fault("config.json", wrong))
        return None
    method = next((fmt.method for fmt in formats.of_method(quantization)), None)
    missing = [key for key in (method.required if method else ()) if key not in quantization]
    findings += [fault(f"quantization_config.{key}", "is missing") for key in missing]
    try:
        return None if missing else formats.from_config(quantization)
    except UserError as error:
        findings.append(fault("quantization_config", str(error)))
        return None


def _skeleton(
    folder: Path,
    keys: set[str],
    original: Iterable[str],
    findings: list[Finding],
    remote_code: bool,
    packs: bool,
) -> Skeleton | None:
    """The configuration's model without weights (on the meta device), and how keys fill it.

    original: the keys of the source. packs: the format packs weights, so engines take experts one
    by one.
    """
    model = _built(folder, remote_code, findings)
    if model is None:
        return None
    names = loaded_names(model, sorted(keys))
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stacks = stacking(model, keys) if packs else {}
    members = {member for _, experts in stacks.values() for member in experts}
    restored = {name for name, _ in stacks.values()}
    filled = filled_parameters(model, keys) | restored
    tied = model.all_tied_weights_keys
    partners = {**tied, **{origin: name for name, origin in tied.items()}}
    missing = [n for n in own if n not in filled and not (n in partners and partners[n] in filled)]
    parts = {key for key, (_, entire) in names.items() if not entire}
    lost = [key for key, (name, _) in names.items() if name is None]
    unread = further_layers(model, sorted(keys))
    unknown = [key for key in lost if key not in members | parts and key not in unread]
    idle = [key for key in lost if key not in members]
    spelled = {name: key for key, (name, _) in names.items() if name is not None}
    layers, head = _linears(model, spelled, set(tied))
    whole, before = _whole(names), loaded_names(model, original)
    keys_here = {name: key for key, name in whole.items()}
    return Skeleton(
        shapes={key: own[name] for key, name in whole.items()},
        linears=layers,
        missing=not_ignored(missing, model._keys_to_ignore_on_load_missing),
        unknown=not_ignored(unknown, model._keys_to_ignore_on_load_unexpected),
        head=head,
        unread=frozenset(key.removesuffix(".weight") for key in idle),
        respelled=_followed(_whole(before), keys_here),
        tied={keys_here[n]: key for n, key in _followed(tied, keys_here).items() if n in keys_here},
        mixtures=_mixtures(model, spelled, members | parts),
        apart=frozenset(key for key, (name, _) in before.items() if name in restored),
    )


def _followed(names: Mapping[str, str], keys: Mapping[str, str]) -> dict[str, str]:
    """One mapping after the other, where both go on."""
    return {key: keys[name] for key, name in names.items() if name in keys}


def _whole(names: Mapping[str, tuple[str | None, bool]]) -> dict[str, str]:
    """Key -> parameter, of the keys that are one whole parameter."""
    return {key: name for key, (name, entire) in names.items() if entire and name is not None}


def _built(folder: Path, remote_code: bool, findings: list[Finding]) -> PreTrainedModel | None:
    try:
        return skeleton(read_config(folder, remote_code), folder, remote_code)
    except UserError as error:
        text = (
            "the model can't be built, so names and shapes are not checked"
            f" ({' '.join(str(error).split())[:200]})"
        )
        severity = "error" if isinstance(error, Impossible) else "warning"
        findings.append(Finding(severity, "config.json", text))
        return None


def _mixtures(
    model: PreTrainedModel, spelled: Mapping[str, str], parts: Iterable[str]
) -> frozenset[str]:
    """Names of routers and experts.

    spelled: parameter -> key. parts: keys that are a part of a parameter.
    """
    experts = find_experts(model)
    names = [*experts.fused, *(f"{name}.weight" for name in (*experts.routers, *separable(model)))]
    spellings = [*names, *(spelled[name] for name in names if name in spelled), *parts]
    return frozenset(name.removesuffix(".weight") for name in spellings)


def _linears(
    model: PreTrainedModel, spelled: Mapping[str, str], tied: set[str]
) -> tuple[dict[str, Linear], str | None]:
    """Layers by checkpoint name. A tied head has no tensor and keeps Transformers' name."""
    layers, head = {}, None
    for name, module in linears(model):
        weight = module.get_parameter("weight")
        turned = isinstance(module, Conv1D)
        out_features, in_features = weight.T.shape if turned else weight.shape
        stored = spelled.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")
        is_tied = f"{name}.weight" in tied and f"{name}.weight" not in spelled
        layers[stored] = Linear(name, out_features, in_features, is_tied, turned)
        if module is speaking(model).get_output_embeddings():
            head = stored
    return layers, head


def not_ignored(names: Iterable[str], patterns: Any) -> tuple[str, ...]:
    """Those that none of a class's patterns takes."""
    return tuple(
        name for name in names if not any(re.search(pattern, name) for pattern in patterns or ())
    )
