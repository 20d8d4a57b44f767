"""Parameter names of a model, the keys of its checkpoint, and what a checkpoint holds beside packed
weights."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from auto_mmround.errors import UserError
from auto_mmround.export.format import Format, WholeFormat
from auto_mmround.model.experts import Expert, separable
from auto_mmround.model.keys import converted_keys, parameter_names
from auto_mmround.model.merging import loaded_tensors
from auto_mmround.model.quantized import FLOATS
from auto_mmround.model.restacking import stacking
from auto_mmround.model.stored import Reader, Stored, stored_tensors
from auto_mmround.model.structure import linears
from auto_mmround.numerics.grids import Codes, dequantize
from auto_mmround.run.carried import carried_modules, unread_keys
from auto_mmround.run.given import aliases, config_of, newest, pruned
from auto_mmround.run.plan import Plan


class Names:
    """Parameter names of a model and keys of its checkpoint. Without a source folder: as
    Transformers would save.

    given: the model is the user's own, see `given`.
    """

    def __init__(self, model: PreTrainedModel, source: Path | None, given: bool = False):
        self.model, self.source, self.given = model, source, given
        self.stored = Stored({}) if source is None else stored_tensors(source)
        self.files = self.stored.files
        self.keys = parameter_names(model, self.files)
        self.aliases = aliases(model, self.keys)
        self._covered = {*self.keys, *self.aliases}  # by tensors of the source
        self.experts = separable(model)
        # The tables of Transformers go one way: what they make of a file's key is sure, what they
        # would save is not.
        self.converted = converted_keys(model, self.files)
        self.held = self._held()  # parameter of stacked experts -> the keys that hold it
        self.stacks = {name: keys[0] for name, keys in self.held.items()}
        tails = {(name, _tail(key)): key for key, name in self.converted.items()}
        for name, expert in self.experts.items():
            key = tails.get((expert.parameter, expert.tail), expert.key)
            if expert.stacked and (expert.named or not expert.alone):
                prefix = self.stacks[expert.parameter].rpartition(".")[0]
                key = f"{prefix}.{expert.tail}"
            self.keys[f"{name}.weight"] = key
            if expert.stacked or key in self.files:
                self._covered.add(expert.parameter)
        self.carried = carried_modules(model, self.stored, self.gone)
        self.keys |= {f"{name}.weight": f"{key}.weight" for name, key in self.carried.items()}
        self.parameters = {key: name for name, key in self.keys.items()}
        singles = {
            self.keys[f"{name}.weight"] for name, expert in self.experts.items() if expert.stacked
        }
        # can be written one by one
        self.apart = {parameter for parameter, _ in stacking(model, singles).values()}

    @cached_property
    def gone(self) -> set[str]:
        """Keys of the source that the model in memory has no place for any more."""
        return set() if self.source is None else pruned(self.model, self.stored, self.source)

    @cached_property
    def unread(self) -> list[str]:
        """Keys of the source that the model's class does not read, such as layers that predict
        further tokens."""
        return sorted(unread_keys(self.model, self.stored.files).keys() - self.gone)

    @cached_property
    def made(self) -> list[tuple[list[str], list[str]]]:
        """Parameters that no single tensor of the source holds, and the keys they are saved under,
        by groups: new ones, and those that Transformers splits or fuses."""
        state = self.model.state_dict()
        ignored = self.model._keys_to_ignore_on_load_missing or () if self.files else ()
        groups: dict[str, list[str]] = {}
        for name in state:
            if name not in self._covered and not any(
                re.search(pattern, name) for pattern in ignored
            ):
                # What is fused lies side by side: `attn.q_proj.weight` and `attn.k_proj.weight`.
                groups.setdefault(".".join(name.split(".")[:-2]) if self.files else "", []).append(
                    name
                )
        return self._undone(list(groups.values()))

    def _undone(self, groups: list[list[str]]) -> list[tuple[list[str], list[str]]]:
        """Groups with the keys they are saved under; those that share a key are one."""
        state = self.model.state_dict()
        made: list[tuple[list[str], list[str]]] = []
        for group in groups:
            shapes = {name: torch.empty(state[name].shape, device="meta") for name in group}
            keys = list(revert_weight_conversion(self.model, shapes))
            same = [each for each in made if not set(keys).isdisjoint(each[1])]
            made = [each for each in made if each not in same]
            names = [name for each in same for name in each[0]] + group
            merged = [key for each in same for key in each[1]] + keys
            made.append((names, list(dict.fromkeys(merged))))
        return made

    @cached_property
    def added(self) -> set[str]:
        """The keys of `made`."""
        return {key for _, keys in self.made for key in keys}

    def written(self) -> list[str]:
        """The keys of a checkpoint, packed weights as one key each."""
        apart = {
            name: e for name, e in self.experts.items() if e.stacked and e.parameter in self.apart
        }
        stacked = [self.key(f"{name}.weight") for name in apart]
        stacks = {key for expert in apart.values() for key in self.held[expert.parameter]}
        keys = [*self.files, *sorted(self.added), *stacked]
        return [key for key in dict.fromkeys(keys) if key not in self.gone and key not in stacks]

    def config(self) -> dict[str, Any]:
        """`config.json`, but for what formats add."""
        return config_of(self.model, self.source, self.given)

    def taken_apart(self, quantized: Collection[str]) -> set[str]:
        """Stacks whose experts are written one by one beside these quantized modules. Those with
        biases only if some of their own are: engines read such a family's whole stacks alone."""
        biased = {e.parameter for e in self.experts.values() if e.biases}
        own = {e.parameter for name, e in self.experts.items() if name in quantized}
        return self.apart - (biased - own)

    def _held(self) -> dict[str, tuple[str, ...]]:
        """As the source has them, else as Transformers would save them."""
        held: dict[str, list[str]] = {}
        for key, name in [*self.converted.items(), *((k, n) for n, k in self.keys.items())]:
            held.setdefault(name, []).append(key)
        keys_of = {}
        for name in {expert.parameter for expert in self.experts.values() if expert.stacked}:
            empty = torch.empty(self.model.get_parameter(name).shape, device="meta")
            saved = held.get(name) or revert_weight_conversion(self.model, {name: empty})
            keys_of[name] = tuple(saved)
        return keys_of

    def key(self, parameter: str) -> str:
        """The checkpoint's key of a parameter."""
        if parameter not in self.keys:
            placeholder = {parameter: torch.empty(0)}
            self.keys[parameter] = next(iter(revert_weight_conversion(self.model, placeholder)))
        return self.keys[parameter]

    def has(self, module: str) -> bool:
        """Whether the checkpoint has a tensor for the module's weight alone, or stacks it."""
        expert = self.experts.get(module)
        key = self.key(f"{module}.weight")
        known = not self.files or key in self.files or key in self.added
        return known or bool(expert and expert.stacked)

    def module(self, name: str, apart: Collection[str] | None = None) -> str:
        """The checkpoint's name of a module that has a weight, or of the stack that it lies in;
        fused experts, which are parameters, keep theirs. apart: of `taken_apart`."""
        if f"{name}.weight" not in self.keys and name in self.model.state_dict():
            return self.keys.get(name, name)
        expert = self.experts.get(name)
        written = self.apart if apart is None else apart
        if expert and expert.stacked and expert.parameter not in written:
            return self.stacks[expert.parameter].removesuffix(".weight")
        return self.key(f"{name}.weight").removesuffix(".weight")

    def parts(self, kept: Sequence[str]) -> list[str]:
        """Names in the checkpoint of kept modules that it stores in several tensors, or under a
        name that ends otherwise."""
        several: dict[str, list[str]] = {}
        for key, name in self.converted.items():
            several.setdefault(name.removesuffix(".weight"), []).append(key)
        stored = {
            name: several.get(name) or [self.keys[f"{name}.weight"]]
            for name in kept
            if name in several or f"{name}.weight" in self.keys
        }
        return [
            key.removesuffix(".weight")
            for name, keys in stored.items()
            for key in keys
            if _tail(key.removesuffix(".weight"), 1) != _tail(name, 1)
        ]

    def unchanged(
        self, without: set[str], codes: Mapping[str, Codes], apart: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor) of everything but the parameters ``without``.

        From the source as stored, bit for bit (FP8 decoded), unless the model in memory holds
        something else by now, or would if its blocks were not streamed: what ``codes`` say, by
        module name. apart: a stack of experts is written expert by expert, as engines read it
        beside quantized ones; else as the source has it.
        """
        state = self.model.state_dict()
        skip = {self.key(name) for name in without} | self.gone
        whole: dict[str, dict[str, Expert]] = {}  # experts of stacks that are written as such
        packed = {name.removesuffix(".weight") for name in without}
        written = self.taken_apart(packed) if apart else set()
        for name, expert in self.experts.items():
            if not expert.stacked:
                continue
            skip.update(self.held[expert.parameter])
            if expert.parameter not in written:
                whole.setdefault(expert.parameter, {})[name] = expert
                continue
            if f"{name}.weight" not in without:
                current = self._current(f"{name}.weight", state, codes)
                yield self.key(f"{name}.weight"), self._single(expert, current)
            if bias := expert.bias:
                skip.add(self.key(bias.parameter))
                whole_EO = state[bias.parameter]
                current = None if whole_EO.is_meta else bias.of(whole_EO.cpu())
                yield f"{self.module(name)}.bias", self._single(bias, current)
        with Reader(self.stored) as reader:
            for _, key in sorted((path, key) for key, path in self.files.items()):
                if key not in skip and key not in self.added:
                    name, stored = self.parameters.get(key, ""), reader.tensor(key)
                    current = self._current(name, state, codes)
                    tensor = newest(
                        stored, current, self.given, name.removesuffix(".weight") in codes
                    )
                    # what is tied by now is written once
                    if tensor is stored or name not in self.aliases:
                        yield key, tensor
            for parameter, experts in whole.items():
                yield from self._stack(parameter, experts, reader, state, codes)
            for names, keys in self.made:
                kept = {name: state[name] for name in names if name not in without}
                for key, tensor in self._remade(kept, keys, reader):
                    if key not in skip:
                        yield key, tensor

    def _remade(
        self, kept: dict[str, Tensor], keys: list[str], reader: Reader
    ) -> Iterator[tuple[str, Tensor]]:
        """Tensors of the parameters that the source does not have, or has in other pieces."""
        known = {key: reader.tensor(key) for key in keys if key in self.files}
        if known and (not self.given or any(tensor.is_meta for tensor in kept.values())):
            yield from known.items()  # how Transformers would save it is not sure
            return
        whole = {name: tensor.cpu().contiguous() for name, tensor in kept.items()}
        for key, tensor in revert_weight_conversion(self.model, whole).items():
            current = tensor.contiguous()
            yield key, newest(known[key], current, self.given, False) if key in known else current

    def _current(
        self, parameter: str, state: Mapping[str, Tensor], codes: Mapping[str, Codes]
    ) -> Tensor | None:
        """What the model holds; None if that is what the source has, or if there is no such
        parameter."""
        module = parameter.removesuffix(".weight")
        expert = self.experts.get(module)
        tensor = state.get(parameter) if expert is None else expert.of(state[expert.parameter])
        if tensor is None:
            return dequantize(codes[module]) if module in self.carried and module in codes else None
        if not tensor.is_meta:
            return tensor.cpu()
        if module not in codes:
            return None
        decoded_OI = dequantize(codes[module], tensor.dtype)
        transposed = expert is None and isinstance(self.model.get_submodule(module), Conv1D)
        return decoded_OI.t() if transposed else decoded_OI.view(tensor.shape)

    def _stack(
        self,
        parameter: str,
        experts: Mapping[str, Expert],
        reader: Reader,
        state: Mapping[str, Tensor],
        codes: Mapping[str, Codes],
    ) -> Iterator[tuple[str, Tensor]]:
        """A stack of experts as the source has it, with what the model holds by now."""
        keys = self.held[parameter]
        stored = {key: reader.tensor(key) for key in keys if key in self.files}
        whole = state[parameter]
        if whole.is_meta and stored:  # streamed
            whole = loaded_tensors(self.model, stored)[parameter].clone()
            for name in codes.keys() & experts.keys():
                experts[name].of(whole).copy_(dequantize(codes[name]))
        undone = revert_weight_conversion(self.model, {parameter: whole.cpu()})
        tuned = not codes.keys().isdisjoint(experts)
        for key in keys:
            # what it would be saved as may begin otherwise
            same = (k for k in undone if len(keys) == 1 or _tail(k, 2) == _tail(key, 2))
            current = undone[next(same)].contiguous()
            yield (
                key,
                newest(stored[key], current, self.given, tuned) if key in stored else current,
            )

    def _single(self, expert: Expert, current: Tensor | None) -> Tensor:
        """An expert's tensor, in the source's dtype if that holds it; ``current`` is None where it
        is what the source has."""
        if current is None:
            return self._stored(expert)
        key = self.stacks.get(expert.parameter) or self.key(expert.parameter)
        short = current.to(FLOATS.get(self.stored.dtypes.get(key, ""), current.dtype))
        whole = not self.given or torch.equal(short.to(current.dtype), current)
        return (short if whole else current).contiguous()

    def _stored(self, expert: Expert) -> Tensor:
        """An expert out of a stack that was never read as a whole."""
        key = self.stacks.get(expert.parameter) or self.key(expert.parameter)
        with Reader(self.stored) as reader:
            if key in self.converted:
                whole = loaded_tensors(self.model, {key: reader.tensor(key)})
                return expert.of(whole[expert.parameter]).contiguous()
            if key in self.stored.scales:
                return expert.of(reader.tensor(key)).contiguous()
            own_1OI = reader.plain(key)[expert.index : expert.index + 1]
            return replace(expert, index=0).of(own_1OI).contiguous()


def _tail(key: str, parts: int = 3) -> str:
    """`3.gate_proj.weight` of an expert's key."""
    return ".".join(key.split(".")[-parts:])


def check_formats(formats: Sequence[Format], names: Names, source: Path | None) -> None:
    """Ask the formats that write a model as a whole whether they can; UserError with the reason."""
    turned = [name for name, module in linears(names.model) if isinstance(module, Conv1D)]
    for fmt in formats:
        if isinstance(fmt, WholeFormat):
            fmt.check_model(names.config(), names.written(), source)
            if turned:
                raise UserError(
                    f"format {fmt.name} writes weights as (out, in), and {turned[0]} lies (in,"
                    " out): choose another format"
                )


def check_names(names: Names, plan: Plan) -> None:
    """Raises UserError if the checkpoint lacks a weight that is to be replaced."""
    absent = next((name for name in plan.quantized if not names.has(name)), None)
    if absent is not None:
        raise UserError(
            f"{absent}: the checkpoint has no tensor {names.key(absent + '.weight')} to replace"
        )
    stacked = [
        name
        for name, expert in names.experts.items()
        if expert.stacked and expert.parameter not in names.apart and name in plan.quantized
    ]
    if stacked and any(fmt.packs for fmt in plan.formats):
        stack = names.stacks[names.experts[stacked[0]].parameter]
        held = dict.fromkeys(re.sub(r"\.\d+(\.\w+)?$", "", name) for name in stacked)
        parts = dict.fromkeys(path.rpartition(".")[2] for path in held)
        raise UserError(
            f"{stacked[0]}: no reader takes the experts of {stack} one by one; keep them with "
            f"--fp_layers {','.join(parts)}, or write --format fake"
        )


def check_tuned(names: Names, codes: Mapping[str, Codes]) -> None:
    """Raises UserError if a quantized weight of the model in memory is not what tuning left in
    it."""
    state = names.model.state_dict()
    for module, weight in codes.items():
        expert = names.experts.get(module)
        current = None
        if (f"{module}.weight" if expert is None else expert.parameter) in state:
            current = names._current(f"{module}.weight", state, {})
        if current is None or not _decodes_to(weight, current):
            raise UserError(
                f"{module}: its weight is not what quantize() left in it; change a model before"
                " quantize(), not after"
            )


def _decodes_to(codes: Codes, current: Tensor) -> bool:
    """Whether a weight, (in, out) for some classes, holds what the codes say, maybe cast from a
    shorter dtype."""
    decoded = dequantize(codes)
    for way in (decoded, decoded.t()):
        if way.numel() == current.numel() and way.shape[0] == current.shape[0]:
            shaped = way.reshape(current.shape)
            for dtype in (current.dtype, torch.bfloat16, torch.float16):
                if torch.equal(shaped.to(dtype).to(current.dtype), current):
                    return True
    return False
