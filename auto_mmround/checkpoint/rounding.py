"""What engines round while they run, in a loaded checkpoint: inputs of layers and of experts, keys
and values."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from auto_mmround.checkpoint.reading import Checkpoint, Decoded
from auto_mmround.errors import UserError
from auto_mmround.export import formats
from auto_mmround.model.experts import separable, with_hooks
from auto_mmround.model.keys import parameter_names
from auto_mmround.model.kv_cache import SCALES, cached_attention, change_cached, fits
from auto_mmround.numerics.activations import e4m3_static, rounded_inputs

Device = str | torch.device
Hook = Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]


def round_inputs(
    model: PreTrainedModel, decoded: Decoded, keys: Iterable[str], device: Device
) -> None:
    """Hooks for layers and experts whose inputs engines quantize. keys: of the decoded tensors as
    the model's class reads them."""
    quantization = decoded.checkpoint.quantization_config
    if quantization is None:
        return
    hook = partial(_hook, decoded.checkpoint, formats.reader(quantization), device)
    for parameter, key in parameter_names(model, keys).items():
        stored = key.removesuffix(".weight")
        if stored in decoded.packed and (own := hook(stored)):
            model.get_submodule(parameter.removesuffix(".weight")).register_forward_pre_hook(own)
    experts = separable(model)
    if decoded.packed.isdisjoint(e.key.removesuffix(".weight") for e in experts.values()):
        return
    found = {name: hook(expert.key.removesuffix(".weight")) for name, expert in experts.items()}
    with_hooks(model, experts, {name: own for name, own in found.items() if own})


def _hook(checkpoint: Checkpoint, scheme_of: Any, device: Device, stored: str) -> Hook | None:
    """Rounds what a layer is given; None for one whose inputs stay. stored: its checkpoint name."""
    scheme = scheme_of(stored)
    if scheme.act_bits >= 16:
        return None
    measured = "input_global_scale" if scheme.data_type == "nvfp4" else "input_scale"
    wholes = [f"{stored}.{measured}"] if scheme.inputs_measured else []
    scales = [tensor.to(device) for _, tensor in checkpoint.tensors(wholes)]
    how = *scheme.inputs, next(iter(scales), None), scheme.act_how

    def hook(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        # some experts get no token
        return (rounded_inputs(given[0], *how), *given[1:]) if given[0].numel() else given

    return hook


def round_cache(
    model: PreTrainedModel, checkpoint: Checkpoint, keys: Iterable[str], device: Device
) -> None:
    """Hooks for attention whose keys and values engines keep in FP8. keys: as above."""
    said = (checkpoint.quantization_config or {}).get("kv_cache_scheme")
    if not said:
        return
    strategy = str(said.get("strategy", "tensor"))
    found, stored = dict(checkpoint.tensors(checkpoint.kv_scales)), parameter_names(model, keys)
    for name, projection in cached_attention(model).items():
        place = stored[f"{name}.{projection}.weight"].rpartition(f".{projection}")[0]
        scales = [found.get(f"{place}.{part}") for part in SCALES]
        if any(scale is None or not fits(strategy, scale) for scale in scales):
            each = " for each head" if strategy == "attn_head" else ""
            text = f"{place} has no k_scale and v_scale of one number{each}"
            raise UserError(f"{checkpoint.folder}: {text}")
        key_scale, value_scale = (scale.float().to(device) for scale in scales)  # type: ignore[union-attr]

        def rounded(
            key: Tensor, value: Tensor, k: Tensor = key_scale, v: Tensor = value_scale
        ) -> tuple[Tensor, Tensor]:
            return e4m3_static(key, k), e4m3_static(value, v)

        change_cached(model.get_submodule(name), rounded)
