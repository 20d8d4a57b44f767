"""Weights out of OpenVINO's IR, without OpenVINO: the constants that `openvino_convert.py` named.

An IR is an .xml with a layer a constant (element type, shape, offset and size) and a .bin with
their values.
"""

import mmap
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from auto_mmround.errors import UserError
from auto_mmround.lazy import Lazy
from auto_mmround.untrusted import read_text, readable

LANGUAGE = ("openvino_model", "openvino_language_model")
TOWER = ("openvino_vision_embeddings_model", "openvino_vision_embeddings_merger_model")
GRAPHS = (*LANGUAGE, "openvino_text_embeddings_model", *TOWER)
REST = "openvino_rest.safetensors"
ELEMENTS = {
    "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "i8": torch.int8,
    "u8": torch.uint8,
}  # fmt: skip
FOUR_BITS = ("i4", "u4")
# The constant of a tensor is called MARK + key. A packed weight has one for each part, called
# MARK + key + "/" + part.
MARK, PARTS = "checkpoint/", ("codes", "scales", "zeros")
DAMAGED = (
    ValueError,
    LookupError,
    RuntimeError,
    TypeError,
    OSError,
    ElementTree.ParseError,
    SafetensorError,
)


def read(folder: Path) -> Mapping[str, Tensor]:
    """Checkpoint key -> tensor of all graphs of a folder, as stored, packed weights in float32.

    Raises UserError for a damaged or missing file; so does asking for a tensor of which two graphs
    hold different values.
    """
    holders: dict[str, list[tuple[Path, Constants]]] = {}
    if not any((folder / f"{name}.xml").is_file() for name in LANGUAGE):
        raise UserError(f"{folder} has no {LANGUAGE[0]}.xml: copy the folder again")
    for path in [folder / f"{name}.xml" for name in GRAPHS if (folder / f"{name}.xml").is_file()]:
        with readable(path, DAMAGED):
            constants = Constants(path)
            for key in constants.names():
                holders.setdefault(key, []).append((path, constants))
    makers = {key: partial(_equal, key, graphs) for key, graphs in holders.items()}
    with readable(folder / REST, DAMAGED):
        rest = load_file(folder / REST)
        names = sorted({name.partition("/")[0] for name in rest})
    more = {key: partial(_rest, folder / REST, rest, key) for key in names}
    return Lazy({**makers, **more}, lambda make: make())


def _equal(key: str, graphs: Sequence[tuple[Path, "Constants"]]) -> Tensor:
    """A tensor that all these graphs hold."""
    (first, constants), *others = graphs
    with readable(first, DAMAGED):
        tensor = constants.tensor(key)
    for path, other in others:
        with readable(path, DAMAGED):
            if not torch.equal(tensor, other.tensor(key)):
                raise ValueError(f"{key} has other values than in {first.name}")
    return tensor


def _rest(path: Path, rest: Mapping[str, Tensor], key: str) -> Tensor:
    with readable(path, DAMAGED):
        return rest[key] if key in rest else decoded(*(rest[f"{key}/{part}"] for part in PARTS))


def decoded(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """float32 (out, in) of codes (out, G, columns), scales and zeros (out, G, 1)."""
    return ((codes.float() - (0 if zeros is None else zeros.float())) * scales.float()).flatten(1)


class Constants:
    """The named constants of one graph. Raises what `DAMAGED` lists for files that are no IR."""

    def __init__(self, path: Path) -> None:
        self._found: dict[str, tuple[str, list[int], int, int]] = {}
        for layer in ElementTree.fromstring(read_text(path, path.name)).iter("layer"):
            data, name = layer.find("data"), layer.get("name", "")
            if data is not None and layer.get("type") == "Const" and name.startswith(MARK):
                shape = [int(n) for n in data.get("shape", "").split(",") if n.strip()]
                span = int(data.attrib["offset"]), int(data.attrib["size"])
                self._found.setdefault(
                    name.removeprefix(MARK), (data.attrib["element_type"], shape, *span)
                )
        with path.with_suffix(".bin").open("rb") as file:
            self._values = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def names(self) -> list[str]:
        """Checkpoint keys."""
        return sorted({name.partition("/")[0] for name in self._found})

    def tensor(self, key: str) -> Tensor:
        """A weight, decoded to float32 (out, in), or another tensor as it is stored."""
        if key in self._found:
            values = self._constant(key)
            wide = [n for n in values.shape if n != 1]
            # a graph may give a vector more axes
            return values.flatten() if len(wide) == 1 else values
        codes, scales = (self._constant(f"{key}/{part}") for part in PARTS[:2])
        return decoded(
            codes, scales, self._constant(f"{key}/zeros") if f"{key}/zeros" in self._found else None
        )

    def _constant(self, name: str) -> Tensor:
        element_type, shape, offset, size = self._found[name]
        data = self._values[offset : offset + size]
        if element_type in FOUR_BITS:
            pairs = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            # the first value in the low half
            values = torch.stack([pairs & 15, pairs >> 4], dim=-1)
            return (values.int() - 16 * (values > 7) if element_type == "i4" else values).reshape(
                shape
            )
        return torch.frombuffer(bytearray(data), dtype=ELEMENTS[element_type]).reshape(shape)
