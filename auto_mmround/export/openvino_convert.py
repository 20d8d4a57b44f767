"""Turns a float model and the codes of its weights into OpenVINO's IR; run by the OpenVINO environment's interpreter.

    python openvino_convert.py request.json

Standalone on purpose (numpy, torch, safetensors, transformers, openvino). request: {"model": folder of a float
checkpoint, "class": its class in Transformers, "codes": safetensors with "<i>.codes" uint8 (out, in), "<i>.scales"
(out, G), "<i>.zeros" uint8 (out, G), "schemes": [{"bits", "sym"}, ..], "out": .xml to write}. The last line of standard
output is one JSON object, {"ok": true, "weights": n, "difference": ..} or {"ok": false, "error": ".."}.

The IR holds the text path: input_ids, attention_mask, position_ids and beam_idx to logits, its key-value cache a state,
as OpenVINO GenAI and optimum-intel call it. Each weight's constant is found by its exact values.
"""

import hashlib
import json
import sys
import traceback
from typing import Any

import numpy as np
import openvino as ov
import torch
import transformers
from openvino import opset13 as op
from openvino._offline_transformations import apply_make_stateful_transformation
from safetensors.torch import load_file
from transformers.cache_utils import Cache, DynamicLayer

# (bits, sym) -> the element type of the constant; symmetric ones are signed and need no zero point.
TYPES = {(4, True): ov.Type.i4, (4, False): ov.Type.u4, (8, True): ov.Type.i8, (8, False): ov.Type.u8}
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
TOLERANCE = 1e-3  # of the logits' spread, float32 against float32
SMALL = 1024  # constants of fewer elements stay as they are


class TextPath(torch.nn.Module):
    """The model with its cache as plain tensors, in and out: key and value of each layer."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, *past: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        layers: list[Any] = []
        for keys, values in zip(past[::2], past[1::2], strict=True):
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values  # not by `update`: it would append them to an empty vector
            layers.append(layer)
        made = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=Cache(layers=layers),
            use_cache=True,
        )
        return (made.logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values)))


def trace(model: Any) -> ov.Model:
    """The converter's own graph, float32 weights, stateful."""
    text = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    past = [torch.zeros(1, heads, 3, size) for _ in range(2 * text.num_hidden_layers)]
    ids = torch.arange(5)[None]
    example = (ids, torch.ones(1, 8, dtype=torch.int64), ids + 3, *past)
    with torch.no_grad():
        graph = ov.convert_model(TextPath(model), example_input=example)
    names = ["input_ids", "attention_mask", "position_ids", *(f"past.{i}" for i in range(len(past)))]
    shapes = [[-1, -1]] * 3 + [[-1, heads, -1, size]] * len(past)
    for port, name, shape in zip(graph.inputs, names, shapes, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_partial_shape(ov.PartialShape(shape))
    for port, name in zip(graph.outputs, ["logits", *(f"present.{i}" for i in range(len(past)))], strict=True):
        port.get_tensor().set_names({name})
    graph.validate_nodes_and_infer_types()
    make_stateful(graph, len(past), heads, size)
    return graph


def make_stateful(graph: ov.Model, count: int, heads: int, size: int) -> None:
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
    shape_of_ids = op.shape_of(graph.input("input_ids").get_node(), output_type="i64")
    batch = op.gather(shape_of_ids, op.constant(np.array([0])), op.constant(np.int64(0)))
    empty = op.concat([batch, *(op.constant(np.array([n], dtype=np.int64)) for n in (heads, 0, size))], 0)
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "ReadValue":
            start = op.broadcast(op.constant(np.float32(0)), empty)
            node.set_arguments([start.output(0)])
    graph.validate_nodes_and_infer_types()


def place(graph: ov.Model, codes: dict[str, torch.Tensor], schemes: list[dict[str, Any]]) -> int:
    """Each float constant that is one of the weights becomes its codes; returns how many weights were found."""
    wanted = {key_of(decoded(codes, i)): i for i in range(len(schemes))}
    found = set()
    for node in list(graph.get_ordered_ops()):
        if node.get_type_name() != "Constant" or node.get_element_type() != ov.Type.f32 or node.data.size < SMALL:
            continue
        users, index = node.output(0).get_target_inputs(), wanted.get(key_of(node.data))
        if index is not None:
            q_OI, scale_OG, zero_OG = (codes[f"{index}.{part}"].numpy() for part in ("codes", "scales", "zeros"))
            new = compressed(q_OI, scale_OG, zero_OG, TYPES[schemes[index]["bits"], schemes[index]["sym"]])
            found.add(index)
        else:
            new = shortened(node)
        for user in users:
            user.replace_source_output(new)
    graph.validate_nodes_and_infer_types()
    return len(found)


def decoded(codes: dict[str, torch.Tensor], index: int) -> np.ndarray:
    """float32 (out, in), by the formula that made the float checkpoint: scale * (code - zero)."""
    q_OI, scale_OG, zero_OG = (codes[f"{index}.{part}"].float() for part in ("codes", "scales", "zeros"))
    q_OGg = q_OI.unflatten(1, (scale_OG.shape[1], -1))
    return ((q_OGg - zero_OG[..., None]) * scale_OG[..., None]).flatten(1).numpy()


def key_of(values: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    return values.shape, hashlib.sha256(np.ascontiguousarray(values).tobytes()).digest()


def compressed(q_OI: np.ndarray, scale_OG: np.ndarray, zero_OG: np.ndarray, kind: ov.Type) -> ov.Output:
    """Constant -> Convert -> [Subtract] -> Multiply -> Reshape: what the plugins keep packed. Exact in float32."""
    out, groups = scale_OG.shape
    signed = kind in (ov.Type.i4, ov.Type.i8)
    shift = np.uint8(zero_OG.flat[0] if signed else 0)  # symmetric: one zero point, taken off beforehand
    weight = op.convert(constant(q_OI - shift, [out, groups, q_OI.shape[1] // groups], kind), "f32")
    if not signed:
        weight = op.subtract(weight, op.convert(constant(zero_OG, [out, groups, 1], kind), "f32"))
    scale = op.convert(constant(scale_OG, [out, groups, 1], ov.Type(scale_OG.dtype)), "f32")
    return op.reshape(op.multiply(weight, scale), op.constant(np.array(q_OI.shape)), False).output(0)


def constant(values: np.ndarray, shape: list[int], kind: ov.Type) -> ov.Node:
    """A constant that owns its memory. 4 bits: two values a byte, the first in the low half."""
    flat = values.reshape(-1)
    if kind.bitwidth == 4:
        flat = (flat[0::2] & 15) | ((flat[1::2] & 15) << 4)
    tensor = ov.Tensor(kind, ov.Shape(shape))
    tensor.data.reshape(-1).view(flat.dtype)[:] = flat
    return ov.op.Constant(tensor)


def shortened(node: ov.Node) -> ov.Output:
    """A float32 constant as bfloat16 or float16 where that loses nothing, else as it is."""
    values = np.ascontiguousarray(node.data)
    words = values.view(np.uint32)
    if not (words & 0xFFFF).any():
        short = constant((words >> 16).astype(np.uint16), list(values.shape), ov.Type.bf16)
    elif np.array_equal(values.astype(np.float16).astype(np.float32), values):
        short = constant(values.astype(np.float16), list(values.shape), ov.Type.f16)
    else:
        return node.output(0)
    return op.convert(short, "f32").output(0)


def difference(model: Any, path: str) -> float:
    """Largest logit difference to the float model over the logits' spread: a prompt at once, then three single tokens.

    The prompt is longer than a sliding window where that is affordable: a trace that forgot the window is caught.
    """
    text = model.config.get_text_config()
    length = min((getattr(text, "sliding_window", None) or 24) + 8, 1024)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, text.vocab_size, (1, length), generator=generator)
    with torch.inference_mode():
        wanted = model(input_ids=ids, use_cache=False).logits.numpy()
    options = EXACT | {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = ov.Core().compile_model(path, "CPU", options).create_infer_request()
    got, start = [], 0
    for stop in (length - 3, length - 2, length - 1, length):
        inputs = {
            "input_ids": ids[:, start:stop].numpy(),
            "attention_mask": np.ones((1, stop), np.int64),
            "position_ids": np.arange(start, stop)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        got.append(request.infer(inputs)["logits"].copy())
        start = stop
    return float(np.abs(np.concatenate(got, axis=1) - wanted).max() / wanted.std())


def convert(request: dict[str, Any]) -> dict[str, Any]:
    cls = getattr(transformers, request["class"])
    model = cls.from_pretrained(request["model"], dtype=torch.float32).eval()
    graph = trace(model)
    placed, planned = place(graph, load_file(request["codes"]), request["schemes"]), len(request["schemes"])
    if placed != planned:
        return {"ok": False, "error": f"{placed} of {planned} weights were found in the converted graph"}
    ov.save_model(graph, request["out"], compress_to_fp16=False)
    gap = difference(model, request["out"])
    if not gap <= TOLERANCE:
        return {"ok": False, "error": f"the converted graph's logits differ by {gap:.2g} of their spread"}
    return {"ok": True, "weights": placed, "difference": gap}


def report_crash(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Whatever the converter raises is its answer."""
    traceback.print_exception(kind, error, trace)
    print(json.dumps({"ok": False, "error": f"{kind.__name__}: {' '.join(str(error).split())}"[:600]}), flush=True)


def main(path: str) -> int:
    sys.excepthook = report_crash
    with open(path, encoding="utf-8") as file:
        result = convert(json.load(file))
    print(json.dumps(result), flush=True)
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
