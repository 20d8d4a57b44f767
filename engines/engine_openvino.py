"""Loads one IR folder in OpenVINO's CPU plugin and answers with logits.

The engine's interpreter runs it. It is standalone like `engine_transformers.py`, with the same
request and answer. It takes texts, and images if the folder holds a tower. "dtype" float32 switches
off the plugin's own rounding: bfloat16 kernels, and activations of packed weights in 8 bits (2 % of
a matrix product). "new_tokens": number of greedy tokens for each input, with the cache, as
"<i>.tokens". With "ends", ids of tokens that end an answer, there is one input, and only its
greedy tokens are said one by one, as fast as the plugin can.
"""

# What `scripts/engines.sh` installs; torch and transformers are the main environment's.
# packages: openvino==2026.4.1 openvino-telemetry==2025.2.0
# tried by: import openvino

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from engine_main import aloud
from safetensors.numpy import load_file, save_file

EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}
PACKED = ("u4", "i4", "u8", "i8")
DERIVED = ("attention_mask", "mm_token_type_ids", "position_ids")  # of a single unpadded input
TOWER = "openvino_vision_embeddings_model.xml"
MERGER = "openvino_vision_embeddings_merger_model.xml"


class Graphs:
    """The compiled graphs of a folder by file name, and its config.json."""

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        paths = sorted(folder.glob("openvino_*model.xml"))
        self.compiled = {path.name: ov.Core().compile_model(path, "CPU", options) for path in paths}
        rest = load_file(folder / "openvino_rest.safetensors")
        self.left_out = sum(name.endswith("/codes") for name in rest)
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = [
            name
            for name in ("openvino_model.xml", "openvino_language_model.xml")
            if name in self.compiled
        ]
        self.language = self.compiled[names[0]]

    def run(self, name: str, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """The only output of one of the smaller graphs."""
        return next(
            iter(self.compiled[name].create_infer_request().infer(dict(inputs)).values())
        ).copy()

    def tokens(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """The language model's input for (1, T) ids."""
        text = "openvino_text_embeddings_model.xml"
        if text not in self.compiled:
            return {"input_ids": ids.astype(np.int64)}
        return {"inputs_embeds": self.run(text, {"input": ids.astype(np.int64)})}

    def images(self, given: Mapping[str, np.ndarray]) -> np.ndarray:
        """(tokens of all images, hidden size)"""
        pixels = given["pixel_values"].astype(np.float32)
        if MERGER not in self.compiled:
            return np.concatenate(
                [self.run(TOWER, {"pixel_values": one[None]})[0] for one in pixels]
            )
        merged = {"hidden_states": self.run(TOWER, {"hidden_states": pixels})}
        merged |= patch_places(given["image_grid_thw"], self.config["vision_config"])
        return self.run(MERGER, merged)


def patch_places(grid_thw: np.ndarray, vision: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Qwen2-VL's angles of every patch, and the mask that separates frames and images.

    Patches come in squares of merge x merge. Angles: position / 10000^(2 i / (head width / 2)),
    rows before columns.
    """
    merge = vision["spatial_merge_size"]
    half = vision["embed_dim"] // vision["num_heads"] // 2
    frequencies = 10000.0 ** -(np.arange(0, half, 2, dtype=np.float32) / half)
    angles, frames = [], []
    for t, h, w in grid_thw.tolist():
        places = np.moveaxis(np.mgrid[:h, :w], 0, -1).reshape(
            h // merge, merge, w // merge, merge, 2
        )
        places = np.tile(places.transpose(0, 2, 1, 3, 4).reshape(-1, 2), (t, 1))
        angles.append((places[..., None] * frequencies).reshape(len(places), -1))
        frames += [h * w] * t
    frame = np.repeat(np.arange(len(frames)), frames)
    mask = np.where(frame[:, None] == frame, 0, -np.inf)[None]
    return {
        "rotary_pos_emb": np.concatenate(angles).astype(np.float32),
        "attention_mask": mask.astype(np.float32),
    }


def positions_of(
    ids: np.ndarray, place: int, grid_thw: np.ndarray | None, merge: int
) -> np.ndarray:
    """Qwen2-VL's positions (3, 1, T).

    Text counts on in all axes. An image has frame, row and column, from the end of the text before
    it. place: the id of a merged patch.
    """
    rows: list[np.ndarray] = []
    start, grids = 0, iter(grid_thw.tolist() if grid_thw is not None else ())
    for is_image, run in groupby((ids[0] == place).tolist()):
        left = len(list(run))
        while is_image and left:
            t, h, w = next(grids)
            rows.append(np.mgrid[:t, : h // merge, : w // merge].reshape(3, -1) + start)
            left, start = left - rows[-1].shape[1], start + max(h, w) // merge
        if left:
            rows.append(np.tile(np.arange(left), (3, 1)) + start)
            start += left
    return np.concatenate(rows, axis=1)[:, None]


def linear_classes(graphs: Graphs) -> tuple[dict[str, int], int]:
    """(weight type -> number of matrix products with a constant, number of packed weights).

    They are counted in the plugin's own graphs. Weights beside the graphs, which the model leaves
    out of them, count too.
    """
    kinds: Counter[str] = Counter()
    for compiled in graphs.compiled.values():
        for node in compiled.get_runtime_model().get_ordered_ops():
            if node.get_rt_info()["layerType"].astype(str) == "FullyConnected":
                kinds[node.input(1).get_element_type().get_type_name()] += 1
    return dict(sorted(kinds.items())), sum(kinds[kind] for kind in PACKED) + graphs.left_out


class Text:
    """One text, given piece by piece; the request's state is the cache."""

    def __init__(self, graphs: Graphs) -> None:
        self.graphs, self.request = graphs, graphs.language.create_infer_request()
        self.axes = len(graphs.language.input("position_ids").get_partial_shape())
        self.length = self.next = 0

    def feed(
        self, tokens: Mapping[str, np.ndarray], position_ids: np.ndarray | None = None
    ) -> np.ndarray:
        """Logits (1, T, vocabulary) float32 for T results of `Graphs.tokens`.

        position_ids: None counts on.
        """
        count = next(iter(tokens.values())).shape[1]
        if position_ids is None:
            position_ids = np.arange(self.next, self.next + count)[None]
            position_ids = position_ids if self.axes == 2 else np.tile(position_ids, (3, 1, 1))
        self.length, self.next = self.length + count, int(position_ids.max()) + 1
        made = self.request.infer({
            **tokens,
            "attention_mask": np.ones((1, self.length), np.int64),
            "position_ids": position_ids.astype(np.int64),
            "beam_idx": np.zeros(1, np.int32),
        })  # fmt: skip
        return made["logits"].astype(np.float32)


def begun(graphs: Graphs, kwargs: dict[str, np.ndarray]) -> tuple[Text, np.ndarray]:
    """(a text that was given one unpadded input, its logits (1, T, vocabulary)).

    Raises ValueError for inputs that the folder's graphs don't take.
    """
    media = {"pixel_values", "image_grid_thw"} if TOWER in graphs.compiled else set()
    unknown = kwargs.keys() - {"input_ids", *DERIVED, *media}
    if unknown or not kwargs.get("attention_mask", np.ones(1)).all():
        raise ValueError(
            "only unpadded inputs of the folder's graphs are supported, not"
            f" {sorted(unknown) or 'padding'}"
        )
    text, ids, positions = Text(graphs), kwargs["input_ids"], None
    tokens = graphs.tokens(ids)
    if "pixel_values" in kwargs:
        place = graphs.config.get("image_token_id", graphs.config.get("image_token_index"))
        tokens["inputs_embeds"][ids == place] = graphs.images(kwargs)
        if text.axes == 3:
            merge = graphs.config["vision_config"]["spatial_merge_size"]
            positions = positions_of(ids, place, kwargs["image_grid_thw"], merge)
    return text, text.feed(tokens, positions)


def greedy(text: Text, logits: np.ndarray, most: int) -> Iterator[int]:
    """The most likely tokens, one by one. Raises ValueError for logits that are not finite."""
    for left in reversed(range(most)):
        if not np.isfinite(logits[:, -1]).all():
            raise ValueError("logits are not finite")
        best = logits[:, -1:].argmax(-1)
        yield int(best[0, 0])
        if left:
            logits = text.feed(text.graphs.tokens(best))


def run_input(
    graphs: Graphs, kwargs: dict[str, np.ndarray], new_tokens: int
) -> dict[str, np.ndarray]:
    """One unpadded input, then some greedy tokens."""
    text, logits = begun(graphs, kwargs)
    tokens = list(greedy(text, logits, new_tokens))
    return {"logits": logits} | ({"tokens": np.array([tokens])} if tokens else {})


def spoken(graphs: Graphs, kwargs: dict[str, np.ndarray], most: int) -> Iterator[int]:
    """The greedy tokens after one input."""
    yield from greedy(*begun(graphs, kwargs), most)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    exact = EXACT | {"INFERENCE_NUM_THREADS": 2} if request["dtype"] == "float32" else {}
    graphs = Graphs(Path(request["model"]), exact)
    samples: dict[str, dict[str, np.ndarray]] = {}
    for key, array in load_file(request["inputs"]).items():
        index, _, kwarg = key.partition(".")
        samples.setdefault(index, {})[kwarg] = array
    engine = f"openvino {ov.__version__}"
    if "ends" in request:
        tokens = spoken(graphs, samples["0"], request["new_tokens"])
        return {"engine": engine} | aloud(tokens, request["ends"])
    classes, quantized = linear_classes(graphs)
    output: dict[str, np.ndarray] = {}
    for index, kwargs in samples.items():
        made = run_input(graphs, kwargs, request.get("new_tokens", 0))
        output |= {f"{index}.{what}": array for what, array in made.items()}
    save_file(output, request["output"])
    broken = [name for name, array in output.items() if not np.isfinite(array).all()]
    facts = {"engine": engine, "classes": classes, "quantized": quantized}
    return (
        facts
        | {"ok": not broken}
        | ({"error": f"logits are not finite: {broken[:3]}"} if broken else {})
    )
