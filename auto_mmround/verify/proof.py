"""Does a new checkpoint hold the tuned values? Checks its files, and a reload block by block.

`run.job.run` and `run.job.save` take `prove` and mark a folder that it finds wrong.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig, LoadStateDictInfo
from transformers.pytorch_utils import Conv1D

from auto_mmround.checkpoint.findings import Finding, fault
from auto_mmround.checkpoint.reading import CONTRADICTIONS, Decoded, Shards
from auto_mmround.checkpoint.subject import Subject, not_ignored, read_subject
from auto_mmround.errors import UserError, several
from auto_mmround.export.format import Format, WholeFormat
from auto_mmround.model.keys import renamed_keys
from auto_mmround.model.loading import NONSENSE
from auto_mmround.model.quantized import FLOATS
from auto_mmround.model.restacking import SINGLE, restack, stacking
from auto_mmround.model.streaming import no_progress_bar
from auto_mmround.numerics.grids import dequantize
from auto_mmround.run.given import OF_THE_FILE, head_is_tied
from auto_mmround.run.output import Result
from auto_mmround.strict import tagged
from auto_mmround.untrusted import one_line
from auto_mmround.verify.static import run_checks
from auto_mmround.verify.values import PIECE

GROUP = 2**28  # bytes of tensors outside blocks that are read together
CHANGE = "no checkpoint would hold this model; change its config, or the model"
FREQUENCIES = "original_inv_freq"
# numbers of modules that count in training alone
DROPOUTS = {"dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "layerdrop",
            "attn_dropout", "resid_dropout", "dropout_rate", "drop_prob"}  # fmt: skip

Read = Callable[[Sequence[str]], dict[str, Tensor]]


def prove(folder: Path, fmt: Format, result: Result) -> list[str]:
    """One line for each fault of a folder: first what `static` finds, then what a reload finds.

    result: what the folder was made of. Memory: about one block of the model.
    """
    subject = read_subject(folder, remote_code=result.recipe.trust_remote_code)
    problems = [finding for finding in run_checks(subject) if finding.severity == "error"]
    if not problems:
        try:
            problems = list(_reload(subject, fmt, result))
        except (UserError, OSError, *CONTRADICTIONS) as error:
            problems = [fault("the reload", one_line(str(error))[:400])]
    return [finding.line().removeprefix("error: ") for finding in problems]


def check_rebuilt(model: PreTrainedModel) -> None:
    """Raises UserError, before anything is tuned, for a model in memory that is not what readers
    make of its configuration: no checkpoint of it could be proved."""
    try:
        with torch.device("meta"):
            fresh = type(model)(copy.deepcopy(model.config))
    except NONSENSE:
        return  # the proof says why
    # the plan has a line of its own for weights that are made as a layer runs
    parts = tuple(f"{n}." for n, m in model.named_modules() if is_parametrized(m))
    here, there = (
        {n: t.shape for n, t in m.state_dict().items() if not n.startswith(parts)}
        for m in (model, fresh)
    )
    # what is tied may lie there under one name
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    added = not_ignored(here.keys() - there, model._keys_to_ignore_on_load_unexpected)
    gone = not_ignored(there.keys() - here - tied, model._keys_to_ignore_on_load_missing)
    for text, names in (
        ("make no such tensor of its config.json", added),
        ("make it of its config.json, the model has it not", gone),
        (
            "make it of another shape of its config.json",
            [name for name in here if name in there and here[name] != there[name]],
        ),
    ):
        if names:
            raise UserError(f"model: {min(names)}: readers {text}{several(names)}: {CHANGE}")
    for finding in _other_parts(model, fresh):
        raise UserError(f"model: {finding.where} {finding.message}: {CHANGE}")


def _reload(subject: Subject, fmt: Format, result: Result) -> Iterator[Finding]:
    """Fill the model's class by Transformers' own reader: every parameter must have its tuned
    value."""
    model = _empty(subject.folder, result.names.model)
    given = result.names.model
    tied = head_is_tied(given) if result.names.given else None
    meant = given.config.to_dict() | ({} if tied is None else {"tie_word_embeddings": tied})
    changed = list(_differences(meant, model.config.to_dict()))
    if changed:
        yield fault(f"config.json: {changed[0]}", "is not that of the model" + several(changed))
    yield from _other_parts(given, model)
    decoded = Decoded(subject.folder, model.dtype)
    blocks = [block for stage in result.plan.stages for block in stage.blocks]
    filled = Filled(model, _contents(subject, decoded), blocks)
    expected = Expected(fmt, result)
    differing = []
    with Shards() as shards:
        for names in filled.groups(lambda keys: {key: decoded[key](shards) for key in keys}):
            parameters = dict(model.state_dict(keep_vars=True))
            differing += [name for name in names if not expected.holds(name, parameters[name])]
    for text, some in (
        ("the model has it, no tensor fills it", filled.missing()),
        ("is no parameter of the model", filled.unknown(result.names.unread)),
        ("has another shape in the model", sorted(filled.mismatched)),
        ("reloaded, it is not what was tuned", differing),
    ):
        if some:
            yield fault(some[0], text + several(some))


def _empty(folder: Path, made: PreTrainedModel) -> PreTrainedModel:
    """A model of the folder's configuration without weights. Its classes are in memory: no code
    runs."""
    try:
        config = type(made.config).from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = type(made)(config)
    except NONSENSE as error:
        raise UserError(
            f"no model can be built from its config.json: {one_line(str(error))[:300]}"
        ) from None
    return model.to(made.dtype)  # type: ignore[arg-type]


def _differences(made: Mapping[str, Any], read: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Keys of a configuration that read back with another value, without a loader's notes on
    itself."""
    for key, value in made.items():
        if str(key).startswith("_") or key in OF_THE_FILE:
            continue
        if isinstance(value, Mapping) and isinstance(read.get(key), Mapping):
            yield from _differences(value, read[key], f"{path}{key}.")
        elif tagged(read.get(key)) != tagged(value):
            yield f"{path}{key}"


def _other_parts(made: PreTrainedModel, read: PreTrainedModel) -> Iterator[Finding]:
    """Modules that compute something else than what readers make of the configuration: another
    activation, another epsilon or scaling, other frequencies of positions."""
    there = dict(read.named_modules())
    other = {
        name: found
        for name, module in made.named_modules()
        if name in there and (found := _otherwise(module, there[name]))
    }
    if other:
        name, text = next(iter(other.items()))
        yield fault(name, one_line(text) + several(list(other)))


def _otherwise(made: nn.Module, read: nn.Module) -> str:
    """In which way a module does something else, beside its parameters; "" if in none."""
    if isinstance(made, nn.modules.dropout._DropoutNd):
        return ""
    buffers = any(True for _ in made.buffers(recurse=False))
    one, other = ({} if buffers else _floats(module) for module in (made, read))
    changed = [name for name in one if one[name] != other.get(name)]
    if changed:
        name = changed[0]
        return f"has {name} {one[name]}; readers make {other.get(name)} of its config.json"
    if not any(True for _ in made.children()):
        plain = not any(True for _ in made.parameters())
        if type(made).forward != type(read).forward or (plain and repr(made) != repr(read)):
            return f"is {made}; readers make {read} of its config.json"
    if (moved := _frequencies(made, read)) is not None:
        return f"has another {moved} than what readers make of its config.json"
    return ""


def _floats(module: nn.Module) -> dict[str, float]:
    numbers = {key: value for key, value in vars(module).items() if isinstance(value, float)}
    return {key: value for key, value in numbers.items() if key not in DROPOUTS}


def _frequencies(made: nn.Module, read: nn.Module) -> str | None:
    """A buffer with the frequencies of a rotary embedding, as it was made, that the configuration
    gives otherwise. Some embeddings change the one that they compute with as they run."""
    names = [name for name, _ in made.named_buffers(recurse=False) if name.endswith(FREQUENCIES)]
    if not names or not isinstance(getattr(read, "config", None), PretrainedConfig):
        return None
    try:
        fresh = type(made)(read.config)
    except NONSENSE:  # the class of some code beside a model, which takes more
        return None
    for name in names:
        new, old = getattr(made, name).float().cpu(), getattr(fresh, name).float()
        if new.shape != old.shape or not torch.allclose(new, old, rtol=2**-7):
            return name
    return None


def _contents(subject: Subject, decoded: Decoded) -> dict[str, bool]:
    """Key of a tensor -> whether its weight is packed. Of files of another kind the run's record
    says it. Raises UserError for a tensor that is not in the files."""
    tensors: Iterable[str] = decoded
    packed: Iterable[str] = subject.packed
    if subject.whole:
        tensors, packed = (subject.record.get(key) or () for key in ("tensors", "codes"))
    keys = {**dict.fromkeys(tensors, False), **{f"{module}.weight": True for module in packed}}
    for absent in keys.keys() - decoded.keys():
        raise UserError(f"{absent} is not in the files")
    return keys


class Filled:
    """A model without weights that is filled group by group as Transformers fills it.

    Nothing stays in memory. keys: of the checkpoint -> whether the weight was packed, (out, in).
    blocks: names of modules, each one group.
    """

    def __init__(self, model: PreTrainedModel, keys: Mapping[str, bool], blocks: Collection[str]):
        self._model, self._keys, self._blocks = model, keys, set(blocks)
        self._name = {key: name for key, name, _ in renamed_keys(model, sorted(keys))}
        self._own = dict(model.state_dict(keep_vars=True))
        # tied modules share parameters
        self._same = {name: id(tensor) for name, tensor in self._own.items()}
        self._turned = {
            f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)
        }
        self._stacks = stacking(model, keys) if any(keys.values()) else {}
        self._missing, self._unknown = set(self._own), set[str]()
        self.mismatched: set[str] = set()
        self._loading = LoadStateDictConfig(
            dtype=model.dtype,
            weight_mapping=get_model_conversion_mapping(model),  # type: ignore[arg-type]
        )

    def groups(self, read: Read) -> Iterator[list[str]]:
        """The names of the parameters of each group; they hold their values until the next group
        comes."""
        for keys in self._grouped():
            state = restack(self._model, read(keys), self._stacks)
            for key in state:
                if self._keys.get(key) and self._name[key] in self._turned:
                    state[key] = state[key].t().contiguous()
            with no_progress_bar():
                info, _ = convert_and_load_state_dict_in_model(self._model, state, self._loading)
            self._missing &= info.missing_keys
            self._unknown |= info.unexpected_keys
            self.mismatched |= {key for key, *_ in info.mismatched_keys}
            filled = sorted(self._own.keys() - info.missing_keys - self.mismatched)
            yield filled
            for name in filled:
                self._empty(name)

    def missing(self) -> list[str]:
        """Parameters that no tensor has filled, directly or by a tie."""
        return sorted(self._adjusted().missing_keys)

    def unknown(self, source: Collection[str] = ()) -> list[str]:
        """Tensors that are no parameter, in the model's spelling.

        Tensors of the ``source`` that its class does not read, such as layers that predict further
        tokens, are copied bit for bit and do not count.
        """
        carried = {self._name.get(key, key) for key in source}
        return sorted(self._adjusted().unexpected_keys - carried)

    def _adjusted(self) -> LoadStateDictInfo:
        """Without the names that the model's class ignores."""
        there = {self._same[name] for name in self._own.keys() - self._missing}
        tied = self._model.all_tied_weights_keys
        partners = {**tied, **{origin: name for name, origin in tied.items()}}
        missing = {
            name
            for name in self._missing
            if self._same[name] not in there and partners.get(name, name) in self._missing
        }
        info = LoadStateDictInfo(missing, set(self._unknown), set(), [], {}, set())  # type: ignore[arg-type]
        self._model._adjust_missing_and_unexpected_keys(info)
        return info

    def _grouped(self) -> Iterator[list[str]]:
        """The keys of each block, then the others by size. Keys of one parameter stay together."""
        blocks: dict[str, list[str]] = {}
        others: dict[str, list[str]] = {}
        for key, name in self._name.items():
            parts = name.split(".")
            block = next(
                (b for i in range(len(parts), 0, -1) if (b := ".".join(parts[:i])) in self._blocks),
                None,
            )
            single = SINGLE.fullmatch(key) if name not in self._own else None
            table, unit = (blocks, block) if block else (others, single[1] if single else name)
            table.setdefault(unit, []).append(key)
        yield from blocks.values()
        group: list[str] = []
        size = 0
        for unit, keys in others.items():
            size += self._own[unit].nbytes if unit in self._own else GROUP
            group += keys
            if size >= GROUP:
                yield group
                group, size = [], 0
        if group:
            yield group

    def _empty(self, name: str) -> None:
        path, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(path)
        table = module._parameters if leaf in module._parameters else module._buffers
        table[leaf] = self._own[name]  # type: ignore[assignment]


class Expected:
    """The right values of a model's parameters: codes as tuned, all else as in memory."""

    def __init__(self, fmt: Format, result: Result):
        self._codes = result.codes
        # `static` has compared checksums of the values that such formats hold exactly
        self._same = _alike if isinstance(fmt, WholeFormat) else _same
        self._memory = result.names.model.state_dict()
        # what is written gets the source's dtype, but for what the user's own model holds
        dtypes = result.names.stored.dtypes.values()
        self._written = {FLOATS[dtype] for dtype in dtypes if dtype in FLOATS}
        self._given = result.names.given
        self._turned = {
            n for n, module in result.names.model.named_modules() if isinstance(module, Conv1D)
        }
        self._experts: dict[str, dict[str, object]] = {}
        for name, expert in result.names.experts.items():
            self._experts.setdefault(expert.parameter, {})[name] = expert

    def holds(self, name: str, value: Tensor) -> bool:
        """Whether a parameter has its value, up to a cast between the stored dtype and the dtype in
        memory."""
        module = name.removesuffix(".weight")
        if module in self._codes:
            wanted = dequantize(self._codes[module], value.dtype)
            return self._rounded(
                value, wanted.t() if module in self._turned else wanted.view(value.shape)
            )
        known = self._memory.get(name)
        if known is None or not known.is_meta:
            if known is None or self._same(value, known.cpu()):
                return True
            tuned = name in self._experts or not self._given
            return tuned and self._rounded(value, known.cpu())
        experts = self._experts.get(name, {})
        return all(
            self._rounded(expert.of(value), dequantize(self._codes[each], value.dtype))  # type: ignore[attr-defined]
            for each, expert in experts.items()
            if each in self._codes
        )

    def _rounded(self, value: Tensor, wanted: Tensor) -> bool:
        """Whether they are the same, or once the wanted one was written in the source's dtype."""
        return self._same(value, wanted) or any(
            self._same(value, wanted.to(dtype).to(value.dtype)) for dtype in self._written
        )


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same up to rounding, with the same order of rows."""
    if one.shape != other.shape:
        return False
    pairs = zip(one.reshape(-1).split(PIECE), other.reshape(-1).split(PIECE))
    sizes = [
        ((a.float() - b.float()).square().sum().item(), b.float().square().sum().item())
        for a, b in pairs
    ]
    return sum(apart for apart, _ in sizes) <= 0.25 * sum(size for _, size in sizes)


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal in the dtype of one of them. A NaN equals a NaN: `static` judges NaNs."""
    if one.shape != other.shape:
        return False
    return torch.equal(one, other.to(one.dtype)) or torch.equal(one.to(other.dtype), other)
