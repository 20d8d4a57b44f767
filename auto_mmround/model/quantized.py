"""What says that weights are quantized already: the places where a folder tells it, and a model in
memory."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from auto_mmround.errors import UserError
from auto_mmround.untrusted import read_object

# Keys of `config.json`, at any depth: a multimodal model may tell it of its text model alone.
KEYS = ("quantization_config", "compression_config")
MODELOPT = "hf_quant_config.json"  # ModelOpt's own file, beside a config.json that may say nothing
# All but the last multiply what is stored in FP8 by the scale beside it. ModelOpt's file and
# configuration name no other. The last is gpt-oss'.
# key -> who writes it, often unnamed
UNNAMED = {"config_groups": "compressed-tensors", "quant_algo": "modelopt"}
METHODS = ("fp8", "compressed-tensors", "modelopt", "fbgemm_fp8", "quark", "mxfp4")
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
GIVE = "give one with its original weights, or the name of its folder"
Block = tuple[int, int]


def told(folder: Path) -> list[dict[str, Any]]:
    """Every configuration of a quantization in a folder, each with its `quant_method`. Raises
    UserError for one that is no object."""
    configs = list(_told(read_object(folder / "config.json"), folder))
    if (folder / MODELOPT).is_file():
        configs.append({"quant_method": "modelopt"} | read_object(folder / MODELOPT))
    if any(config.get("transform_config") for config in configs):
        raise UserError(
            f"model {folder} is quantized already, its inputs transformed; give the original"
            " weights"
        )
    return configs


def _told(config: Mapping[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
    for key, value in config.items():
        if key in KEYS and value:
            if not isinstance(value, dict):
                raise UserError(
                    f"model {folder} is quantized already ({key} is no object); give the original"
                    " weights"
                )
            unnamed = next(
                (method for mark, method in UNNAMED.items() if mark in value), value.get("mode")
            )  # MLX: mode
            yield {"quant_method": unnamed} | value
        elif isinstance(value, dict):
            yield from _told(value, folder)


def block_sizes(quantization: Mapping[str, Any], folder: Path) -> set[Block]:
    """Rows and columns that share a scale, for every kind of layer that a configuration tells it
    of."""
    sizes = {_pair(quantization.get("weight_block_size"), "weight_block_size", folder)}
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            sizes.add(_pair(weights.get("block_structure"), "block_structure", folder))
            size = weights.get("group_size")
            sizes.add((1, size) if type(size) is int and size > 0 else None)
    return {block for block in sizes if block is not None}


def _pair(value: Any, key: str, folder: Path) -> Block | None:
    if isinstance(value, str) and re.fullmatch(r"\d{1,6}x\d{1,6}", value):
        value = [int(number) for number in value.split("x")]
    if not value:
        return None
    if not (
        isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)
    ):
        raise UserError(f"model {folder}: {key} {str(value)[:80]} is no pair of numbers")
    return value[0], value[1]


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` for decoded weights: without what it tells of a quantization, at any
    depth."""
    return {
        k: plain(v) if isinstance(v, Mapping) else v for k, v in config.items() if k not in KEYS
    }


def forget(config: Any) -> None:
    """Take what it tells of a quantization out of a configuration and its parts."""
    for key in KEYS:
        if key in vars(config):
            delattr(config, key)
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            forget(part)


def check_floating(model: PreTrainedModel) -> None:
    """Raises UserError for a model in memory whose weights are quantized: by Transformers, or cast
    to FP8."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not getattr(quantizer.quantization_config, "dequantize", False):
        method = getattr(quantizer.quantization_config, "quant_method", type(quantizer).__name__)
        raise UserError(
            f"the model was loaded quantized ({getattr(method, 'value', method)}): {GIVE}"
        )
    for name, parameter in model.named_parameters():
        if parameter.dtype not in FLOATS.values() or type(parameter.data) is not Tensor:
            held_as = (
                parameter.dtype if type(parameter.data) is Tensor else type(parameter.data).__name__
            )
            raise UserError(
                f"the model holds {name} as {held_as}, not as plain floating point: {GIVE}"
            )
