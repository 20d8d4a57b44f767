"""Turns a float model and the codes of its weights into OpenVINO's IR.

    python -P engine_main.py openvino_convert.py request.json

The OpenVINO environment's interpreter runs it. It is standalone (numpy, torch, safetensors,
transformers, openvino). request: {"model": folder of a float checkpoint, "class": its class in
Transformers, "codes": safetensors with "<i>.codes" uint8 (out, in), "<i>.scales" (out, G) float32,
"<i>.zeros" uint8 (out, G), "schemes": [{"name", "bits", "sym"}, ..], "out": folder for the graphs}.
The last line of standard output is one JSON object, {"ok": true, "weights": n, "differences":
{part: ..}} or {"ok": false, "error": ".."}.

`openvino_model` goes from input_ids, attention_mask, position_ids and beam_idx to logits, its
key-value cache a state. A model with a tower of `TRACED` (openvino_graphs.py) becomes
`openvino_language_model`, the same from inputs_embeds, `openvino_text_embeddings_model` and the
tower's parts; the files' and the inputs' names are those of optimum-intel and OpenVINO GenAI. Each
weight's constant is found by its exact values, and named as in the checkpoint. What is in no graph
as it is in the checkpoint goes to `openvino_rest.safetensors`, packed weights by codes, scales and
zeros.
"""

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
import transformers
from openvino import opset13 as op
from openvino_graphs import TRACED, Part, convert_part, embeddings, trace
from safetensors.torch import load_file, save_file

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
def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request; the graphs lie in its folder, wrong ones too."""
    cls, out = getattr(transformers, request["class"]), Path(request["out"])
    model = cls.from_pretrained(request["model"], dtype=torch.float32).eval()
    tower, axes = TRACED.get(model.config.model_type, (None, 1))
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
