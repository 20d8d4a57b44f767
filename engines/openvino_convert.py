"""Turns a float model and the codes of its weights into OpenVINO's IR.

    python openvino_convert.py request.json

The OpenVINO environment's interpreter runs it. It is standalone (numpy, torch, safetensors,
transformers, openvino). request: {"model": folder of a float checkpoint, "class": its class in
Transformers, "codes": safetensors with "<i>.codes" uint8 (out, in), "<i>.scales" (out, G) float32,
"<i>.zeros" uint8 (out, G), "schemes": [{"name", "bits", "sym"}, ..], "out": folder for the graphs}.
The last line of standard output is one JSON object, {"ok": true, "weights": n, "differences":
{part: ..}} or {"ok": false, "error": ".."}.

`openvino_model` takes input_ids, attention_mask, position_ids and beam_idx and gives logits; its
key-value cache is a state. A model with a tower of `TOWERS` becomes `openvino_language_model`,
which takes inputs_embeds instead, `openvino_text_embeddings_model` and the tower's parts. Names of
files and inputs are as in optimum-intel and OpenVINO GenAI. Each weight's constant is found by its
exact values, and gets the checkpoint's name. Tensors that no graph holds unchanged go to
`openvino_rest.safetensors`, packed weights as codes, scales and zeros.
"""

import hashlib
import json
import sys
import traceback
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
import transformers
from openvino import opset13 as op
from openvino._offline_transformations import apply_make_stateful_transformation
from safetensors.torch import load_file, save_file
from transformers.cache_utils import Cache, DynamicLayer
from transformers.models.qwen2_vl.modeling_qwen2_vl import rotate_half
from transformers.vision_utils import get_vision_position_ids

# (bits, sym) -> the element type of the constant; symmetric ones are signed and need no zero point.
TYPES = {
    (4, True): ov.Type.i4,
    (4, False): ov.Type.u4,
    (8, True): ov.Type.i8,
    (8, False): ov.Type.u8,
}
EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}
TOLERANCE = 1e-3  # of the logits' spread, float32 against float32
SMALL = 1024  # float constants of fewer elements stay float32
GRAPH, LANGUAGE = "openvino_model", "openvino_language_model"
MARK = "checkpoint/"  # before the names of constants that are tensors of the checkpoint


class TextPath(torch.nn.Module):
    """The model with its cache as plain tensors, in and out: key and value of each layer.

    given: its first input, "input_ids" or "inputs_embeds".
    """

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
    """Qwen2-VL's tower after its patch embedding: all images' patches.

    (N, width) to (N / 4, hidden size). attention_mask (1, N, N): 0 within an image, minus infinity
    elsewhere. rotary_pos_emb (N, head width / 2): angles.
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
    """A tower for images of one size, with its projector.

    (1, 3, height, width) to (1, tokens, hidden size).
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.model.get_image_features(pixel_values=pixel_values).pooler_output[0][None]


@dataclass(frozen=True)
class Part:
    """A module that becomes a graph.

    inputs: name -> (example, shape, -1 where it may vary). wanted: the model's own results for the
    examples. output: its name.
    """

    module: torch.nn.Module
    inputs: dict[str, tuple[torch.Tensor, list[int]]]
    wanted: torch.Tensor
    output: str = "last_hidden_state"


def embeddings(model: Any) -> dict[str, Part]:
    """Token ids to the language model's inputs."""
    ids = torch.arange(5)[None]
    module = model.get_input_embeddings()
    return {
        "openvino_text_embeddings_model": Part(
            module, {"input": (ids, [-1, -1])}, module(ids), "inputs_embeds"
        )
    }


def patch_tower(model: Any) -> dict[str, Part]:
    """The tower of Qwen2-VL; two images of different sizes are the example."""
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
    """The tower of LLaVA: one image at a time."""
    size, module = model.config.vision_config.image_size, Projected(model)
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    return {
        "openvino_vision_embeddings_model": Part(
            module, {"pixel_values": (pixels, list(pixels.shape))}, module(pixels)
        )
    }


# model_type -> (parts of its tower, axes of a position). engine_openvino.py puts them together
# again.
TOWERS = {"qwen2_vl": (patch_tower, 3), "llava": (pixel_tower, 1)}


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
    """The converter's own graph of the language model, float32 weights, with state.

    axes: of a position.
    """
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


class Weights:
    """Tensors by their values, for constants: packed weights, then the checkpoint's others.

    found: packed weights that have been placed. named: tensors whose name a constant has, with all
    their values.
    """

    def __init__(
        self,
        codes: dict[str, torch.Tensor],
        schemes: list[dict[str, Any]],
        state: dict[str, torch.Tensor],
    ):
        self.codes, self.schemes = codes, schemes
        self.packed = {key_of(decoded(codes, i)): i for i in range(len(schemes))}
        self.plain: dict[Any, list[str]] = defaultdict(list)
        for name, tensor in state.items():
            self.plain[key_of(tensor.float().numpy())].append(name)
        self.found: set[int] = set()
        self.named: set[str] = set()

    def place(self, graph: ov.Model) -> None:
        """Each float constant of a quantized weight becomes its codes; others are named and
        shortened."""
        for node in list(graph.get_ordered_ops()):
            if node.get_type_name() != "Constant" or node.get_element_type() != ov.Type.f32:
                continue
            users, values = node.output(0).get_target_inputs(), np.ascontiguousarray(node.data)
            if (index := self.packed.get(key_of(values))) is not None:
                self.found.add(index)
                new = self.compressed(index)
            else:
                new = self.plainly(node, values)
            for user in users:
                user.replace_source_output(new)
        graph.validate_nodes_and_infer_types()

    def plainly(self, node: ov.Node, values: np.ndarray) -> ov.Output:
        """Give a constant the checkpoint's name.

        A second constant with the same values gets the next name with these values.
        """
        names = self.plain.get(key_of(values.reshape(shape_in_checkpoint(values.shape))), [])
        left = [name for name in names if name not in self.named] or names[:1]
        self.named |= set(left[:1])
        short = shortened(values)
        for name in left[:1]:
            (short or node).set_friendly_name(MARK + name)
        return node.output(0) if short is None else op.convert(short, "f32").output(0)

    def parts(self, index: int) -> dict[str, torch.Tensor]:
        """A packed weight for the rest: (out, G, columns), (out, G, 1), (out, G, 1)."""
        q_OI, scale_OG, zero_OG = (
            self.codes[f"{index}.{part}"] for part in ("codes", "scales", "zeros")
        )
        q_OGg = q_OI.unflatten(1, (scale_OG.shape[1], -1))
        found = {"codes": q_OGg, "scales": scale_OG[..., None], "zeros": zero_OG[..., None]}
        return {
            f"{self.schemes[index]['name']}/{part}": tensor.contiguous()
            for part, tensor in found.items()
        }

    def compressed(self, index: int) -> ov.Output:
        """Constant -> Convert -> [Subtract] -> Multiply -> Reshape: plugins keep this packed.

        Exact in float32.
        """
        q_OI, scale_OG, zero_OG = (
            self.codes[f"{index}.{part}"].numpy() for part in ("codes", "scales", "zeros")
        )
        scheme = self.schemes[index]
        kind, (out, groups) = TYPES[scheme["bits"], scheme["sym"]], scale_OG.shape
        # symmetric: one zero point, taken off beforehand
        shift = np.uint8(zero_OG.flat[0] if scheme["sym"] else 0)
        parts = {"codes": constant(q_OI - shift, [out, groups, q_OI.shape[1] // groups], kind)}
        weight = op.convert(parts["codes"], "f32")
        if not scheme["sym"]:
            parts["zeros"] = constant(zero_OG, [out, groups, 1], kind)
            weight = op.subtract(weight, op.convert(parts["zeros"], "f32"))
        scale_OG1 = np.ascontiguousarray(scale_OG[..., None])
        parts["scales"] = shortened(scale_OG1) or constant(scale_OG1, [out, groups, 1], ov.Type.f32)
        for part, node in parts.items():
            node.set_friendly_name(f"{MARK}{scheme['name']}/{part}")
        weight = op.multiply(weight, op.convert(parts["scales"], "f32"))
        return op.reshape(weight, op.constant(np.array(q_OI.shape)), False).output(0)


def shape_in_checkpoint(shape: Any) -> tuple[int, ...]:
    """The shape in the checkpoint of a constant that may have more axes in a graph: a vector has
    one."""
    wide = [n for n in shape if n != 1]
    return tuple(wide) if len(wide) == 1 else tuple(shape)


def decoded(codes: dict[str, torch.Tensor], index: int) -> np.ndarray:
    """float32 (out, in) by the formula of the float checkpoint: scale * (code - zero)."""
    q_OI, scale_OG, zero_OG = (
        codes[f"{index}.{part}"].float() for part in ("codes", "scales", "zeros")
    )
    q_OGg = q_OI.unflatten(1, (scale_OG.shape[1], -1))
    return ((q_OGg - zero_OG[..., None]) * scale_OG[..., None]).flatten(1).numpy()


def key_of(values: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    return values.shape, hashlib.sha256(np.ascontiguousarray(values).tobytes()).digest()


def constant(values: np.ndarray, shape: list[int], kind: ov.Type) -> ov.Node:
    """A constant that owns its memory. 4 bits: two values in a byte, the first in the low half."""
    flat = values.reshape(-1)
    if kind.bitwidth == 4:
        flat = (flat[0::2] & 15) | ((flat[1::2] & 15) << 4)
    tensor = ov.Tensor(kind, ov.Shape(shape))
    tensor.data.reshape(-1).view(flat.dtype)[:] = flat
    return ov.op.Constant(tensor)


def shortened(values: np.ndarray) -> ov.Node | None:
    """A float32 array as a bfloat16 or float16 constant.

    None if that loses something, and for small arrays.
    """
    words, shape = values.view(np.uint32), list(values.shape)
    if values.size < SMALL:
        return None
    if not (words & 0xFFFF).any():
        return constant((words >> 16).astype(np.uint16), shape, ov.Type.bf16)
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    return (
        constant(half, shape, ov.Type.f16)
        if np.array_equal(half.astype(np.float32), values)
        else None
    )


def used(model: Any, parts: dict[str, Part], keys: Collection[Any]) -> bool:
    """Whether anything depends on these weights. They stay NaN.

    The last layer of LLaVA's tower has no effect.
    """
    for parameter in model.parameters():
        if key_of(parameter.numpy()) in keys:
            parameter.fill_(float("nan"))
    made = [
        part.module(*(example for example, _ in part.inputs.values())) for part in parts.values()
    ]
    made.append(model(input_ids=torch.arange(5)[None]).logits)
    return not all(bool(torch.isfinite(each).all()) for each in made)


def differences(
    model: Any, folder: Path, parts: dict[str, Part], given: str, axes: int
) -> dict[str, float]:
    """Largest difference of every graph to the float model, over the standard deviation of its
    results."""
    core, options = ov.Core(), EXACT | {"INFERENCE_NUM_THREADS": torch.get_num_threads()}

    def compiled(name: str) -> Any:
        return core.compile_model(
            str(folder / f"{name}.xml"), "CPU", options
        ).create_infer_request()

    found = {}
    for name, part in parts.items():
        made = compiled(name).infer(
            {key: example.numpy() for key, (example, _) in part.inputs.items()}
        )[part.output]
        found[name] = float(np.abs(made - part.wanted.numpy()).max() / part.wanted.std())
    name = GRAPH if given == "input_ids" else LANGUAGE
    pieces = list(prompt(model, given, axes))
    wanted, request = pieces[0].pop("logits"), compiled(name)
    got = np.concatenate([request.infer(piece)["logits"].copy() for piece in pieces], axis=1)
    return found | {name: float(np.abs(got - wanted).max() / wanted.std())}


def prompt(model: Any, given: str, axes: int) -> Iterator[dict[str, np.ndarray]]:
    """Inputs of a prompt at once and of three single tokens; the first also holds all "logits".

    It is longer than a sliding window if that is affordable: so a trace without the window is
    found. Axes of a position differ, as after an image.
    """
    text = model.config.get_text_config()
    length = min((getattr(text, "sliding_window", None) or 24) + 8, 1024)
    ids = torch.randint(0, text.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(length)[None]
    if axes > 1:
        positions = torch.stack([positions + (positions > 4) * axis for axis in range(axes)])
    tokens = ids if given == "input_ids" else model.get_input_embeddings()(ids)
    logits = model(**{given: tokens}, position_ids=positions, use_cache=False).logits.numpy()
    start, more = 0, {"logits": logits}
    for stop in (length - 3, length - 2, length - 1, length):
        inputs = {
            given: tokens[:, start:stop].numpy(),
            "attention_mask": np.ones((1, stop), np.int64),
            "position_ids": positions[..., start:stop].numpy(),
            "beam_idx": np.zeros(1, np.int32),
        }
        yield inputs | more
        start, more = stop, {}


def shards(folder: str) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of the checkpoint, mapped from its files one after the other."""
    return (load_file(path) for path in sorted(Path(folder).glob("*.safetensors")))


@torch.no_grad()
def convert(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request. The graphs lie in its folder, also wrong ones."""
    cls, out = getattr(transformers, request["class"]), Path(request["out"])
    model = cls.from_pretrained(request["model"], dtype=torch.float32).eval()
    tower, axes = TOWERS.get(model.config.model_type, (None, 1))
    given = "inputs_embeds" if tower else "input_ids"
    parts = embeddings(model) | tower(model) if tower else {}
    quantized = {scheme["name"] for scheme in request["schemes"]}
    plain = {
        name: t
        for file in shards(request["model"])
        for name, t in file.items()
        if name not in quantized
    }
    weights = Weights(load_file(request["codes"]), request["schemes"], plain)
    graphs = {name: convert_part(part) for name, part in parts.items()}
    graphs[LANGUAGE if tower else GRAPH] = trace(model, given, axes)
    for name, graph in graphs.items():
        weights.place(graph)
        ov.save_model(graph, out / f"{name}.xml", compress_to_fp16=False)
    absent = {key: index for key, index in weights.packed.items() if index not in weights.found}
    placed, planned = len(weights.found), len(request["schemes"])
    if placed + len(absent) != planned or (absent and used(model, parts, absent)):
        return {
            "ok": False,
            "error": f"{placed} of {planned} weights were found in the converted graphs",
        }
    rest = {name: tensor for name, tensor in plain.items() if name not in weights.named}
    for index in absent.values():
        rest |= weights.parts(index)
    save_file(rest, out / "openvino_rest.safetensors", {"format": "pt"})
    gaps = differences(model, out, parts, given, axes)
    worst = max(gaps, key=lambda name: gaps[name])
    if not all(gap <= TOLERANCE for gap in gaps.values()):
        return {
            "ok": False,
            "error": f"{worst} gives results that differ by {gaps[worst]:.2g} of their spread",
        }
    return {"ok": True, "weights": placed, "differences": gaps}


def report_crash(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """An error of the converter is its answer."""
    traceback.print_exception(kind, error, trace)
    print(
        json.dumps(
            {"ok": False, "error": f"{kind.__name__}: {' '.join(str(error).split())}"[:600]}
        ),
        flush=True,
    )


def main(path: str) -> int:
    sys.excepthook = report_crash
    with open(path, encoding="utf-8") as file:
        result = convert(json.load(file))
    print(json.dumps(result), flush=True)
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
