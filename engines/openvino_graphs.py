"""The graphs that OpenVINO's converter makes of a model: its language model with the cache as a
state, and the parts of some towers. A part of openvino_convert.py."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as op
from openvino._offline_transformations import apply_make_stateful_transformation
from transformers.cache_utils import Cache, DynamicLayer
from transformers.models.qwen2_vl.modeling_qwen2_vl import rotate_half
from transformers.vision_utils import get_vision_position_ids


class TextPath(torch.nn.Module):
    """The model with its cache as plain tensors, in and out: key and value of each layer. given:
    what it starts from, "input_ids" or "inputs_embeds"."""

    def __init__(self, model: Any, given: str) -> None:
        super().__init__()
        self.model, self.given = model, given

    def forward(
        self,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        *past: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        layers: list[Any] = []
        for keys, values in zip(past[::2], past[1::2], strict=True):
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            # not by `update`: it would append them to an empty vector
            layer.keys, layer.values = keys, values
            layers.append(layer)
        made = self.model(
            **{self.given: tokens},
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=Cache(layers=layers),
            use_cache=True,
        )
        return (made.logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values)))


class MergedPatches(torch.nn.Module):
    """Qwen2-VL's tower behind its patch embedding: (N, width) of all images' patches to (N / 4,
    hidden size).

    attention_mask (1, N, N): 0 within an image, minus infinity elsewhere. rotary_pos_emb (N, head
    width / 2): angles.
    """

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower = tower

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        rotary_pos_emb: torch.Tensor,
    ) -> torch.Tensor:
        angles = torch.cat([rotary_pos_emb, rotary_pos_emb], dim=-1)[:, None]
        x_ND = hidden_states
        for block in self.tower.blocks:
            heads = block.attn.num_heads
            q, k, v = (
                part.unflatten(-1, (heads, -1))
                for part in block.attn.qkv(block.norm1(x_ND)).chunk(3, dim=-1)
            )
            q, k = (part * angles.cos() + rotate_half(part) * angles.sin() for part in (q, k))
            q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
            mixed = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=attention_mask[None]
            )
            x_ND = x_ND + block.attn.proj(mixed[0].transpose(0, 1).flatten(1))
            x_ND = x_ND + block.mlp(block.norm2(x_ND))
        return self.tower.merger(x_ND)


class Projected(torch.nn.Module):
    """A tower for images of one size, with its projector: (1, 3, height, width) to (1, tokens,
    hidden size)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.model.get_image_features(pixel_values=pixel_values).pooler_output[0][None]


@dataclass(frozen=True)
class Part:
    """A module that becomes a graph. inputs: name -> (example, shape, -1 where it may vary).
    wanted: by the model itself, of the examples. output: its name."""

    module: torch.nn.Module
    inputs: dict[str, tuple[torch.Tensor, list[int]]]
    wanted: torch.Tensor
    output: str = "last_hidden_state"


def embeddings(model: Any) -> dict[str, Part]:
    """Token ids to what the language model starts from."""
    ids = torch.arange(5)[None]
    module = model.get_input_embeddings()
    return {
        "openvino_text_embeddings_model": Part(
            module, {"input": (ids, [-1, -1])}, module(ids), "inputs_embeds"
        )
    }


def patch_tower(model: Any) -> dict[str, Part]:
    """Two images of other sizes as the example."""
    tower, config = model.model.visual, model.config.vision_config
    grid = torch.tensor([[1, 4, 6], [1, 2, 4]])
    size = config.in_channels * config.temporal_patch_size * config.patch_size**2
    pixels = torch.randn(int(grid.prod(-1).sum()), size, generator=torch.Generator().manual_seed(0))
    positions = get_vision_position_ids(grid, config.spatial_merge_size, kwargs={})
    angles = (positions[..., None] * tower.rotary_pos_emb.inv_freq).flatten(1)
    image = torch.repeat_interleave(torch.arange(2), grid.prod(-1))
    mask = torch.zeros(1, len(image), len(image)).masked_fill(
        image[:, None] != image, float("-inf")
    )
    patches = tower.patch_embed(pixels)
    merged = {
        "hidden_states": (patches, [-1, patches.shape[1]]),
        "attention_mask": (mask, [1, -1, -1]),
        "rotary_pos_emb": (angles, [-1, angles.shape[1]]),
    }
    wanted = tower(pixels, grid_thw=grid).pooler_output
    return {
        "openvino_vision_embeddings_model": Part(
            tower.patch_embed, {"hidden_states": (pixels, [-1, size])}, patches
        ),
        "openvino_vision_embeddings_merger_model": Part(MergedPatches(tower), merged, wanted),
    }


def pixel_tower(model: Any) -> dict[str, Part]:
    """One image at a time."""
    size, module = model.config.vision_config.image_size, Projected(model)
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    return {
        "openvino_vision_embeddings_model": Part(
            module, {"pixel_values": (pixels, list(pixels.shape))}, module(pixels)
        )
    }


# model_type -> (parts of its tower, axes of a position). engine_openvino.py puts them together
# again.
TRACED = {"qwen2_vl": (patch_tower, 3), "llava": (pixel_tower, 1)}


def convert_part(part: Part) -> ov.Model:
    """The converter's own graph of one part, float32."""
    examples = tuple(example for example, _ in part.inputs.values())
    graph = ov.convert_model(part.module, example_input=examples)
    for port, (name, (_, shape)) in zip(graph.inputs, part.inputs.items(), strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_partial_shape(ov.PartialShape(shape))
    graph.outputs[0].get_tensor().set_names({part.output})
    graph.validate_nodes_and_infer_types()
    return graph


def trace(model: Any, given: str, axes: int) -> ov.Model:
    """The converter's own graph of the language model, float32 weights, stateful. axes: of a
    position."""
    text = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    past = [torch.zeros(1, heads, 3, size) for _ in range(2 * text.num_hidden_layers)]
    ids = torch.arange(5)[None]
    tokens = ids if given == "input_ids" else model.get_input_embeddings()(ids)
    positions = ids + 3 if axes == 1 else (ids + 3).expand(axes, 1, 5)
    example = (tokens, torch.ones(1, 8, dtype=torch.int64), positions, *past)
    graph = ov.convert_model(TextPath(model, given), example_input=example)
    names = [given, "attention_mask", "position_ids", *(f"past.{i}" for i in range(len(past)))]
    shapes = [[-1, -1, *tokens.shape[2:]], [-1, -1], [axes] * (axes > 1) + [-1, -1]]
    for port, name, shape in zip(
        graph.inputs, names, shapes + [[-1, heads, -1, size]] * len(past), strict=True
    ):
        port.get_tensor().set_names({name})
        port.get_node().set_partial_shape(ov.PartialShape(shape))
    for port, name in zip(
        graph.outputs, ["logits", *(f"present.{i}" for i in range(len(past)))], strict=True
    ):
        port.get_tensor().set_names({name})
    graph.validate_nodes_and_infer_types()
    make_stateful(graph, given, len(past), heads, size)
    return graph


def make_stateful(graph: ov.Model, given: str, count: int, heads: int, size: int) -> None:
    """The cache becomes a state, empty at first, reordered by ``beam_idx``."""
    beams = op.parameter([-1], ov.Type.i32, name="beam_idx")
    beams.output(0).get_tensor().set_names({"beam_idx"})
    graph.add_parameters([beams])
    for i in range(count):
        port = graph.input(f"past.{i}")
        users = port.get_target_inputs()
        gathered = op.gather(port.get_node(), beams, op.constant(np.int64(0)))
        for user in users:
            user.replace_source_output(gathered.output(0))
    graph.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(graph, {f"past.{i}": f"present.{i}" for i in range(count)})
    shape = op.shape_of(graph.input(given).get_node(), output_type="i64")
    batch = op.gather(shape, op.constant(np.array([0])), op.constant(np.int64(0)))
    empty = op.concat(
        [batch, *(op.constant(np.array([n], dtype=np.int64)) for n in (heads, 0, size))], 0
    )
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "ReadValue":
            start = op.broadcast(op.constant(np.float32(0)), empty)
            node.set_arguments([start.output(0)])
    graph.validate_nodes_and_infer_types()
