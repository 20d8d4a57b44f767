"""One checkpoint folder of a run: packed blocks as they come, then everything else, `config.json` last."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from auto_mmround.errors import UserError
from auto_mmround.export.checkpoint import ShardWriter, begin, commit, write_config, write_side_files
from auto_mmround.export.formats import Format, Layout
from auto_mmround.export.layout import Whole
from auto_mmround.model.experts import Expert, separable
from auto_mmround.model.loading import converted_keys, parameter_names
from auto_mmround.numerics.grids import Codes
from auto_mmround.recipe.recipe import Recipe, to_toml
from auto_mmround.run.journal import checksum, codes_record
from auto_mmround.run.plan import Plan


class Names:
    """Parameter names of a model and keys of its checkpoint. Without a source folder: as Transformers would save."""

    def __init__(self, model: PreTrainedModel, source: Path | None):
        self.model = model
        self.files: dict[str, Path] = {}
        if source is not None:
            for path in sorted(source.glob("*.safetensors")):
                with safe_open(path, "pt") as file:
                    self.files |= dict.fromkeys(file.keys(), path)
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

    def unchanged(self, without: set[str]) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor) of everything but the parameters ``without``.

        From the source as stored, bit for bit, unless the model in memory holds something else by now.
        """
        state = self.model.state_dict()
        skip = {self.key(name) for name in without}
        for name, expert in self.experts.items():  # a stack is written expert by expert, as engines read it
            if expert.stacked:
                skip.add(self.stacks[expert.parameter])
                if f"{name}.weight" not in without:
                    yield self.key(f"{name}.weight"), expert.of(state[expert.parameter]).cpu().contiguous()
        for path in sorted(set(self.files.values())):
            with safe_open(path, "pt") as file:
                for key in sorted(file.keys()):
                    parameter = self.parameters.get(key)
                    if key in skip:
                        continue
                    stored = file.get_tensor(key)
                    yield key, stored if parameter is None else _newest(stored, state[parameter])
        if not self.files:
            yield from ((key, tensor) for key, tensor in self._from_memory(without, state) if key not in skip)

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


def _newest(stored: Tensor, current: Tensor) -> Tensor:
    current = current.cpu()
    same = stored.shape == current.shape and torch.equal(stored.to(current.dtype), current)
    return stored if same or stored.shape != current.shape else current.to(stored.dtype)


def check_formats(formats: Sequence[Format], names: Names, source: Path | None) -> None:
    """Ask the formats that write a model as a whole whether they can; UserError with the reason."""
    for fmt in formats:
        if fmt.check_model:
            keys = names.files or [names.key(name) for name in names.model.state_dict()]
            fmt.check_model(_config(names.model, source), keys, source)


def folder_name(model: str, recipe: Recipe, format_name: str) -> str:
    """`<model>-w4g128-<format>`, with mixed bits w3.5g128; a colon, refused by some file systems, becomes a dash."""
    stem = Path(model.rstrip("/")).name or "model"
    bits = recipe.bits if recipe.target_bits is None else f"{recipe.target_bits:g}"
    return f"{stem}-w{bits}g{recipe.group_size}-{format_name.replace(':', '-')}"


class Output:
    """Writes one checkpoint; nothing is visible under its final name before `finish`."""

    def __init__(self, fmt: Format, out: Path, names: Names, plan: Plan, overwrite: bool = False):
        self.fmt, self.out, self.names, self.plan = fmt, out, names, plan
        self.made = [folder for folder in out.parents if not folder.exists()]
        self.partial = begin(out, overwrite)
        self.writer = ShardWriter(self.partial)
        absent = [name for name in plan.quantized if not names.has(name)]
        if absent:
            self.discard()
            raise UserError(f"{absent[0]}: the checkpoint has no tensor {names.key(absent[0] + '.weight')} to replace")
        self.codes: dict[str, Codes] = {}  # kept for formats that write the whole model at once
        self.records: dict[str, dict[str, Any]] = {"codes": {}, "tensors": {}}  # what `verify` compares with

    def discard(self) -> None:
        """Remove what was written so far, and the folders above it that were made for it."""
        shutil.rmtree(self.partial, ignore_errors=True)
        for folder in self.made:
            if not any(folder.iterdir()):
                folder.rmdir()

    def add(self, codes: Mapping[str, Codes]) -> None:
        """Pack the weights of a finished block."""
        if not self.fmt.parts:
            return
        decoded = self.fmt.write is not None and self.fmt.exact
        self.records["codes"] |= {self.names.module(n): codes_record(weight, decoded) for n, weight in codes.items()}
        if self.fmt.write:
            self.codes |= {self.names.module(name): weight for name, weight in codes.items()}
            return
        for name, weight in codes.items():
            self.writer.add(self.fmt.pack(self.names.module(name), weight))

    def finish(
        self,
        recipe: Recipe,
        source: Path | None,
        journal: Mapping[str, Any],
        *,
        tokenizer: Any = None,
        processor: Any = None,
    ) -> Path:
        """Unchanged tensors, side files, recipe, journal and configuration; then the folder gets its name."""
        model = self.names.model
        packed = self.plan.quantized if self.fmt.parts else ()
        rest = self._recorded(self.names.unchanged({f"{name}.weight" for name in packed}))
        layout = Layout(
            quantized=self.plan.quantized,
            kept=list(self.plan.kept),
            blocks=[stage.path for stage in self.plan.stages],
            checkpoint_name=self.names.module,
            default=recipe.scheme,
            details={"iters": recipe.steps, "algorithm": recipe.algorithm},
        )
        config = _config(model, source)
        config = self.fmt.model_config(config, layout) if self.fmt.model_config else config
        if not self.fmt.write:
            for key, tensor in rest:
                self.writer.add({key: tensor})
            self.writer.finish()
        files = write_side_files(
            source, self.partial, tokenizer=tokenizer, processor=processor, generation_config=model.generation_config
        )
        (self.partial / "recipe.toml").write_text(to_toml(recipe))
        if self.fmt.write:
            self.fmt.write(self.partial, Whole(self.codes, rest, config, layout, source))
        else:
            write_config(self.partial, config, self.fmt.config(layout))
        record = {**journal, "files": sorted(files), **self.records}
        (self.partial / "run.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        commit(self.partial, self.out)
        return self.out

    def _recorded(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for key, tensor in tensors:
            self.records["tensors"][key] = checksum(tensor)
            yield key, tensor


def _config(model: PreTrainedModel, source: Path | None) -> dict[str, Any]:
    if source is not None:
        return json.loads((source / "config.json").read_text())
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    return config | {"architectures": [type(model).__name__]}
