"""GGUF for llama.cpp: the text model as one file, a vision tower as an `mmproj` file beside it.

Quantized weights go into block types that hold our codes exactly; those that were tuned for another
format besides are fitted to the super-blocks of the K types. Everything else keeps its dtype,
except what llama.cpp wants in float32 (vectors, convolutions, position embeddings). The package
`gguf` writes and reads the files.
"""

import importlib.util
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from auto_mmround.errors import UserError
from auto_mmround.export.format import Whole, WholeFormat, check_integers
from auto_mmround.export.gguf import tokens as gguf_tokens
from auto_mmround.export.gguf.k import SUPER_TYPES, SuperType, onto
from auto_mmround.export.gguf.k import pack as pack_super
from auto_mmround.export.gguf.models import Part, architecture, extra_tensors, text_metadata
from auto_mmround.export.gguf.read import config_of, parts_of, read
from auto_mmround.export.gguf.towers import ROW_END, tower_metadata, tower_of
from auto_mmround.export.gguf.types import BLOCK, TYPES, BlockType, exact_type, pack
from auto_mmround.export.layout import Layout
from auto_mmround.export.method import Method
from auto_mmround.headers import TYPE_NAMES, raw_bytes
from auto_mmround.numerics.grids import Codes
from auto_mmround.recipe.schemes import Scheme

log = logging.getLogger("auto_mmround")
Blocks = BlockType | SuperType
ROWS = ("q_OI", "scale_OG", "zero_OG", "min_OG", "unit_OS2")  # parts of `Codes` that go by outputs
FILE_TYPES = {  # gguf.LlamaFileType, for display only
    "F32": 0, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 11,
    "Q4_K": 14, "Q5_K": 16,
    "Q6_K": 18,
}  # fmt: skip
PLAIN = (torch.float32, torch.float16, torch.bfloat16)  # ggml calls them as safetensors does
_FLOAT32 = ("v.position_embd.weight", "mm.input_projection.weight", "v.class_embd")


def check(ggml: Blocks | None, scheme: Scheme, out_features: int, in_features: int) -> str | None:
    """Why the block type (None: the smallest that is exact) could not hold this weight exactly, or
    None."""
    if importlib.util.find_spec("gguf") is None:
        return 'needs the package gguf: pip install "auto_mmround[gguf]"'
    rules = check_integers(range(2, 9), (1, ggml.columns if ggml else BLOCK))
    if scheme.data_type != "int":
        return rules(scheme, out_features, in_features)
    group = in_features if scheme.group_size == -1 else scheme.group_size
    if ggml is not None and (scheme.bits, scheme.sym, group) != (ggml.bits, ggml.sym, ggml.group):
        symmetry = "" if ggml.sym else " --asym"
        return f"holds one scheme, which is --bits {ggml.bits} --group_size {ggml.group}{symmetry}"
    if ggml is None and exact_type(scheme.bits, scheme.sym) is None:
        return (
            f"has no block type for asymmetric {scheme.bits} bits: use 2 to 5 bits, or symmetric"
            " ones"
        )
    if ggml is None and group % BLOCK:
        return f"stores scales for {BLOCK} columns: group size {group} is no multiple"
    return rules(scheme, out_features, in_features)


def check_model(config: Mapping[str, Any], keys: Iterable[str], source: Path | None) -> None:
    """UserError for a model that llama.cpp, or our tables, could not take; before any work is
    done."""
    made = config_of(config)
    parts = parts_of(made)
    tower = tower_of(made.model_type, made)
    if tower is not None and tower.caution:
        log.warning(f"gguf: {tower.caution}")
    for key in keys:
        _route(parts, key)
    if source is not None:
        gguf_tokens.read_tokenizer(source)


def write(ggml: Blocks | None, folder: Path, whole: Whole) -> dict[str, Any]:
    """The files of a model; returns its ``quantization_config``. The folder holds the tokenizer's
    files already."""
    import gguf

    config = config_of(whole.config)
    text = config.get_text_config()
    parts = parts_of(config)
    label = ggml.name if ggml else _common_type(whole.codes.values())
    paths = {"text": folder / f"model-{label}.gguf", "tower": folder / "mmproj-model.gguf"}
    names = {"text": architecture(text).name, "tower": "clip"}
    writers = {
        part: gguf.GGUFWriter(paths[part], names[part], use_temp_file=True) for part in parts
    }
    rows, moved, row_end = 0, [], _row_end(config, folder)
    for module, codes in whole.codes.items():
        for part, target, piece in _pieces(parts, f"{module}.weight", codes):
            name, blocks, distance = _blocks(piece, ggml)
            writers[part].add_tensor(
                target, blocks.cpu().numpy(), raw_dtype=gguf.GGMLQuantizationType[name]
            )
            moved.append(distance)
    if ggml is not None and any(moved):
        log.warning(
            f"gguf:{ggml.name.lower()}: fitted to super-blocks, weights moved by"
            f" {sum(moved) / len(moved):.1%} of a step (rms)"
        )
    for key, tensor in whole.rest:
        for part, target, plain in _pieces(parts, key, tensor):
            _add_plain(writers[part], target, plain)
            if target == "token_embd.weight":
                rows = len(plain)
                if row_end is not None:
                    _add_plain(writers["tower"], ROW_END, plain[row_end])
    for name, tensor in extra_tensors(text).items():
        _add_plain(writers["text"], name, tensor)
    facts = {"text": _text_facts(config, folder, rows, label)}
    if "tower" in parts:
        facts["tower"] = {
            "general.type": "mmproj",
            **tower_metadata(config.model_type, config, _preprocessor(folder)),
        }
    for part, writer in writers.items():
        for name, value in facts[part].items():
            _add_fact(writer, name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return _quantization_config(whole.layout, label, [paths[part].name for part in parts])


def _route(parts: Mapping[str, Part], key: str) -> tuple[str, str]:
    for name, part in parts.items():
        local = part.local(key)
        if local is not None:
            part.place(local)
            return name, local
    raise UserError(
        f"GGUF export: the tensor {key} belongs to no part of the model that llama.cpp knows"
    )


def _pieces(parts: Mapping[str, Part], key: str, whole: Any) -> Iterator[tuple[str, str, Any]]:
    """(part, name in its file, tensor or codes) of everything that one tensor or quantized weight
    becomes."""
    name, local = _route(parts, key)
    rule = parts[name].place(local)
    if rule is None:
        return
    if isinstance(whole, Codes):
        own = {name: part for name in ROWS if (part := getattr(whole, name)) is not None}
        split = [rule.step.forward(part) for part in own.values()]
        pieces: Sequence[Any] = [
            whole._replace(**dict(zip(own, parts))) for parts in zip(*split, strict=True)
        ]
    else:
        pieces = rule.step.forward(whole)
    for target, piece in zip(rule.targets, pieces, strict=True):
        yield name, target, piece


def _blocks(codes: Codes, ggml: Blocks | None) -> tuple[str, Tensor, float]:
    """(type, blocks, how far the weights moved, rms in steps of the grid: 0 unless they were
    fitted)."""
    if not isinstance(ggml, SuperType):
        chosen = ggml or exact_type(codes.bits, codes.sym)
        assert chosen is not None  # `check` has seen to it
        return chosen.name, pack(codes, chosen), 0.0
    codes, moved = (codes, 0.0) if codes.unit_OS2 is not None else onto(codes, ggml)
    return ggml.name, pack_super(codes, ggml), moved


def _add_plain(writer: Any, name: str, tensor: Tensor) -> None:
    import gguf

    keep = tensor.ndim == 2 and tensor.dtype in PLAIN and name not in _FLOAT32
    tensor = (tensor if keep else tensor.float()).cpu()
    data = raw_bytes(tensor).numpy()
    writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[TYPE_NAMES[tensor.dtype]])


def _add_fact(writer: Any, name: str, value: Any) -> None:
    add = {
        bool: "add_bool",
        int: "add_uint32",
        float: "add_float32",
        str: "add_string",
        list: "add_array",
    }
    getattr(writer, add[type(value)])(name, value)


def _text_facts(config: Any, folder: Path, rows: int, label: str) -> dict[str, Any]:
    text = config.get_text_config()
    tokens = gguf_tokens.metadata(folder, rows)
    for name in ("bos", "eos"):  # what the tokenizer leaves open the model may say
        token = getattr(text, f"{name}_token_id", None)
        if isinstance(token, int) and 0 <= token < rows:
            tokens.setdefault(f"tokenizer.ggml.{name}_token_id", token)
    facts = text_metadata(config, text) | {f"{architecture(text).name}.vocab_size": rows}
    general = {
        "general.type": "model",
        "general.file_type": FILE_TYPES[label],
        "general.quantization_version": 2,
    }
    return general | facts | tokens


def _preprocessor(folder: Path) -> dict[str, Any]:
    for name, key in (
        ("preprocessor_config.json", None),
        ("processor_config.json", "image_processor"),
    ):
        if (folder / name).is_file():
            settings = json.loads((folder / name).read_text(encoding="utf-8"))
            return settings if key is None else settings.get(key, {})
    raise UserError("GGUF export: the model has a tower but no preprocessor_config.json")


def _row_end(config: Any, folder: Path) -> int | None:
    """The id of the token whose embedding the tower needs too; UserError for a tokenizer without
    it."""
    tower = tower_of(config.model_type, config)
    if tower is None or tower.row_end is None:
        return None
    token = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(tower.row_end)
    if token is None:
        raise UserError(
            f"GGUF export: the tokenizer has no {tower.row_end}, which the tower puts behind"
            " each row"
        )
    return token


def _common_type(codes: Iterable[Codes]) -> str:
    sizes: dict[str, int] = {}
    for weight in codes:
        ggml = exact_type(weight.bits, weight.sym)
        if ggml is not None:
            sizes[ggml.name] = sizes.get(ggml.name, 0) + weight.q_OI.numel()
    return max(sizes, key=lambda name: sizes[name], default="F32")


def _quantization_config(layout: Layout, label: str, files: Sequence[str]) -> dict[str, Any]:
    return {
        "quant_method": "gguf",
        "type": label,
        "files": list(files),
        "bits": layout.default.bits,
        "group_size": layout.default.group_size,
        "sym": layout.default.sym,
        "provider": "auto_mmround",
        "auto_mmround": dict(layout.details),
    }


METHOD = Method("gguf")


def _format(ggml: Blocks | None) -> WholeFormat:
    chosen = (
        "the smallest blocks that hold the weights exactly"
        if ggml is None
        else f"{ggml.name} blocks"
    )
    return WholeFormat(
        name="gguf" if ggml is None else f"gguf:{ggml.name.lower()}",
        summary=f"llama.cpp: {chosen}; a vision tower as mmproj",
        bits=(2, 3, 4, 5, 6, 7, 8) if ggml is None else (ggml.bits,),
        check=partial(check, ggml),
        fused_zero=ggml is None or (isinstance(ggml, BlockType) and not ggml.sym),
        write=partial(write, ggml),
        read=read,
        check_model=check_model,
        scale_range=ggml.grid.scale_range if isinstance(ggml, SuperType) else None,
        exact_rest=False,  # Gemma's norms are stored plus one
        method=METHOD,
        engines={"llamacpp": "llamacpp"},
    )


FORMATS = tuple(_format(ggml) for ggml in (None, *TYPES.values(), *SUPER_TYPES.values()))
