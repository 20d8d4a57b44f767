"""One checkpoint folder of a run: packed weights, then everything else, `config.json` last."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from auto_mmround import strict
from auto_mmround.errors import UserError
from auto_mmround.export.checkpoint import ShardWriter, begin, commit, write_config, write_side_files, write_whole
from auto_mmround.export.formats import Format, Layout
from auto_mmround.export.layout import Whole
from auto_mmround.model.experts import Expert, separable
from auto_mmround.model.loading import converted_keys, parameter_names
from auto_mmround.model.quantized import plain
from auto_mmround.model.stored import Reader, Stored, stored_tensors
from auto_mmround.numerics.grids import Codes, dequantize
from auto_mmround.recipe.files import to_toml
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run.journal import checksum, codes_record
from auto_mmround.run.plan import Plan


class Names:
    """Parameter names of a model and keys of its checkpoint. Without a source folder: as Transformers would save."""

    def __init__(self, model: PreTrainedModel, source: Path | None):
        self.model = model
        self.stored = Stored({}) if source is None else stored_tensors(source)
        self.files = self.stored.files
        self.keys = parameter_names(model, self.files)
        self.experts = separable(model)
        # The tables of Transformers go one way: what they make of a file's key is sure, what they would save is not.
        converted = converted_keys(model, self.files)
        stored = {(name, _tail(key)): key for key, name in converted.items()}
        self.stacks = {name: key for key, name in converted.items()} | self.keys
        for name, expert in self.experts.items():
            prefix = self._prefix(expert)
            self.keys[f"{name}.weight"] = stored.get((expert.parameter, _tail(expert.tail)), f"{prefix}.{expert.tail}")
        self.parameters = {key: name for name, key in self.keys.items()}

    def _prefix(self, expert: Expert) -> str:
        """The checkpoint's name of the module that holds an expert."""
        if expert.parameter not in self.stacks:
            placeholder = {
                expert.parameter: torch.empty(self.model.get_parameter(expert.parameter).shape, device="meta")
            }
            key = next(iter(revert_weight_conversion(self.model, placeholder)))
            self.stacks[expert.parameter] = key if expert.stacked else ".".join(key.split(".")[:-2])
        return self.stacks[expert.parameter].rpartition(".")[0]

    def key(self, parameter: str) -> str:
        """The checkpoint's key of a parameter."""
        if parameter not in self.keys:
            placeholder = {parameter: torch.empty(0)}
            self.keys[parameter] = next(iter(revert_weight_conversion(self.model, placeholder)))
        return self.keys[parameter]

    def has(self, module: str) -> bool:
        """Whether the checkpoint has a tensor for the module's weight alone, or stacks it."""
        expert = self.experts.get(module)
        return not self.files or self.key(f"{module}.weight") in self.files or bool(expert and expert.stacked)

    def module(self, name: str) -> str:
        """The checkpoint's name of a module that has a weight; fused experts, which are parameters, keep theirs."""
        if f"{name}.weight" not in self.keys and name in self.model.state_dict():
            return self.keys.get(name, name)
        return self.key(f"{name}.weight").removesuffix(".weight")

    def unchanged(self, without: set[str], codes: Mapping[str, Codes]) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor) of everything but the parameters ``without``.

        From the source as stored, bit for bit (FP8 decoded), unless the model in memory holds something else by now, or
        would if its blocks were not streamed: what ``codes`` say, by module name.
        """
        state = self.model.state_dict()
        skip = {self.key(name) for name in without}
        for name, expert in self.experts.items():  # a stack is written expert by expert, as engines read it
            if expert.stacked:
                skip.add(self.stacks[expert.parameter])
                if f"{name}.weight" not in without:
                    current = self._current(f"{name}.weight", state, codes)
                    yield self.key(f"{name}.weight"), self._stored(expert) if current is None else current.contiguous()
        with Reader(self.stored) as reader:
            for _, key in sorted((path, key) for key, path in self.files.items()):
                if key not in skip:
                    current = self._current(self.parameters.get(key, ""), state, codes)
                    yield key, _newest(reader.tensor(key), current)
        if not self.files:
            yield from ((key, tensor) for key, tensor in self._from_memory(without, state) if key not in skip)

    def _current(self, parameter: str, state: Mapping[str, Tensor], codes: Mapping[str, Codes]) -> Tensor | None:
        """What the model holds; None if that is what the source has, or if there is no such parameter."""
        module = parameter.removesuffix(".weight")
        expert = self.experts.get(module)
        tensor = state.get(parameter) if expert is None else expert.of(state[expert.parameter])
        if tensor is None or not tensor.is_meta:
            return None if tensor is None else tensor.cpu()
        if module not in codes:
            return None
        decoded_OI = dequantize(codes[module], tensor.dtype)
        transposed = expert is None and isinstance(self.model.get_submodule(module), Conv1D)
        return decoded_OI.t() if transposed else decoded_OI.view(tensor.shape)

    def _stored(self, expert: Expert) -> Tensor:
        """An expert out of a stack that was never read as a whole."""
        with Reader(self.stored) as reader:
            return expert.of(reader.tensor(self.stacks[expert.parameter])).contiguous()

    def _from_memory(self, without: set[str], state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        seen: set[int] = set()  # tied weights are stored once
        kept = {}
        for name, tensor in state.items():
            if name not in without and tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                kept[name] = tensor.cpu().contiguous()
        yield from revert_weight_conversion(self.model, kept).items()


def _tail(key: str) -> str:
    """`3.gate_proj.weight` of an expert's key."""
    return ".".join(key.split(".")[-3:])


def _newest(stored: Tensor, current: Tensor | None) -> Tensor:
    if current is None:
        return stored
    same = stored.shape == current.shape and torch.equal(stored.to(current.dtype), current)
    return stored if same or stored.shape != current.shape else current.to(stored.dtype)


def check_formats(formats: Sequence[Format], names: Names, source: Path | None) -> None:
    """Ask the formats that write a model as a whole whether they can; UserError with the reason."""
    for fmt in formats:
        if fmt.check_model:
            keys = names.files or [names.key(name) for name in names.model.state_dict()]
            fmt.check_model(_config(names.model, source), keys, source)


def folder_name(model: str, recipe: Recipe, format_name: str | None = None) -> str:
    """`<model>-w4g128-<format>`, with mixed bits w3.5g128; a colon, refused by some file systems, becomes a dash.
    Without a format the name of the folder in which the run keeps what is finished."""
    stem = Path(model.rstrip("/")).name or "model"
    end = f"-{format_name.replace(':', '-')}" if format_name else ".unfinished"
    bits = recipe.bits if recipe.target_bits is None else f"{recipe.target_bits:g}"
    return f"{stem}-w{bits}g{recipe.group_size}{end}"


def check_names(names: Names, plan: Plan) -> None:
    """Raises UserError if the checkpoint lacks a weight that is to be replaced."""
    absent = next((name for name in plan.quantized if not names.has(name)), None)
    if absent is not None:
        raise UserError(f"{absent}: the checkpoint has no tensor {names.key(absent + '.weight')} to replace")


@dataclass(frozen=True)
class Result:
    """What every checkpoint of a run is made of. codes: by module name, in the order they are written.

    record: what the run writes down about itself. tokenizer, processor: saved where there is no source folder.
    """

    names: Names
    plan: Plan
    recipe: Recipe
    source: Path | None
    codes: Mapping[str, Codes]
    record: Mapping[str, Any]
    tokenizer: Any = None
    processor: Any = None


def write_checkpoint(fmt: Format, out: Path, result: Result) -> Path:
    """Packed weights, unchanged tensors, side files, recipe, record and configuration; then the folder gets its name.

    Nothing is visible under it before, and nothing is left where writing fails.
    """
    partial = begin(out, result.recipe.overwrite)
    try:
        _fill(partial, fmt, result)
        commit(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def _fill(folder: Path, fmt: Format, result: Result) -> None:
    names, plan, recipe, source = result.names, result.plan, result.recipe, result.source
    records: dict[str, dict[str, Any]] = {"codes": {}, "tensors": {}}  # what `verify` compares with
    packed = plan.quantized if fmt.parts else {}
    layout = Layout(
        quantized=plan.quantized,
        kept=list(plan.kept),
        blocks=[stage.path for stage in plan.stages],
        checkpoint_name=names.module,
        default=recipe.scheme,
        details=recipe.details,
    )
    config = _config(names.model, source)
    config = fmt.model_config(config, layout) if fmt.model_config else config
    codes = ByKey(result.codes, {names.module(name): name for name in result.codes} if packed else {})
    rest = _recorded(names.unchanged({f"{name}.weight" for name in packed}, result.codes), records["tensors"])
    if fmt.write:
        records["codes"] = {key: codes_record(weight, _exact(fmt, weight)) for key, weight in codes.items()}
    else:
        writer = ShardWriter(folder)
        for key, weight in codes.items():
            records["codes"][key] = codes_record(weight)
            writer.add(fmt.pack(key, weight))
        for key, tensor in rest:
            writer.add({key: tensor})
        writer.finish()
    files = write_side_files(
        source,
        folder,
        tokenizer=result.tokenizer,
        processor=result.processor,
        generation_config=names.model.generation_config,
    )
    (folder / "recipe.toml").write_text(to_toml(recipe))
    if fmt.write:
        fmt.write(folder, Whole(codes, rest, config, layout, source))
    else:
        write_config(folder, config, fmt.config(layout))
    record = {**result.record, "files": sorted(files), **records}
    write_whole(folder / "run.json", (strict.dumps(record, indent=1) + "\n").encode())


def _exact(fmt: Format, weight: Codes) -> bool:
    """Whether the file's values are those of the codes; not where they are fitted to super-blocks once more."""
    return fmt.scale_range is None or weight.unit_OS2 is not None


class ByKey(Mapping[str, Codes]):
    """Codes by the checkpoint's module name; read one by one where they lie on disk."""

    def __init__(self, codes: Mapping[str, Codes], names: Mapping[str, str]):
        self._codes, self._names = codes, names

    def __getitem__(self, key: str) -> Codes:
        return self._codes[self._names[key]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _recorded(tensors: Iterator[tuple[str, Tensor]], record: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in tensors:
        record[key] = checksum(tensor)
        yield key, tensor


def _config(model: PreTrainedModel, source: Path | None) -> dict[str, Any]:
    if source is not None:
        found: dict[str, Any] = json.loads((source / "config.json").read_text())
        return {key: value for key, value in plain(found).items() if key != "transformers_weights"}
    config = plain(json.loads(model.config.to_json_string(use_diff=False)))
    return config | {"architectures": [type(model).__name__]}
