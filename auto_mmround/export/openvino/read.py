"""Weights out of OpenVINO's IR, without OpenVINO: the constants that `openvino_convert.py` named.

An IR is an .xml with a layer a constant (element type, shape, offset and size) and a .bin with
their values.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from auto_mmround.errors import UserError
from auto_mmround.untrusted import one_line, read_text

LANGUAGE = ("openvino_model", "openvino_language_model")
TOWER = ("openvino_vision_embeddings_model", "openvino_vision_embeddings_merger_model")
GRAPHS = (*LANGUAGE, "openvino_text_embeddings_model", *TOWER)
REST = "openvino_rest.safetensors"
DTYPES = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i8": torch.int8,
    "u8": torch.uint8,
}
FOUR_BITS = ("i4", "u4")
# Constants of a checkpoint's tensors are called MARK + key; those of a packed weight MARK + key +
# "/" + part.
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


def read(folder: Path, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint key, tensor) of all graphs of a folder, packed weights decoded.

    dtype: None keeps stored ones and decodes to float32. Raises UserError for a damaged or missing
    file, and where two graphs hold different values of one weight.
    """
    seen: dict[str, Path] = {}
    if not any((folder / f"{name}.xml").is_file() for name in LANGUAGE):
        raise UserError(f"{folder} has no {LANGUAGE[0]}.xml: copy the folder again")
    for path in [folder / f"{name}.xml" for name in GRAPHS if (folder / f"{name}.xml").is_file()]:
        try:
            constants = Constants(path)
            for key in constants.names():
                tensor = constants.tensor(key)
                if key in seen and not torch.equal(tensor, Constants(seen[key]).tensor(key)):
                    raise ValueError(f"{key} has other values than in {seen[key].name}")
                if key not in seen:
                    yield key, tensor if dtype is None else tensor.to(dtype)
                seen[key] = path
        except DAMAGED as error:
            raise UserError(
                f"{path} cannot be read ({one_line(str(error))[:200]}): the file is damaged"
            ) from error
    try:
        rest = load_file(folder / REST)
        for key in sorted({name.partition("/")[0] for name in rest}):
            tensor = (
                rest[key] if key in rest else decoded(*(rest[f"{key}/{part}"] for part in PARTS))
            )
            yield key, tensor if dtype is None else tensor.to(dtype)
    except DAMAGED as error:
        raise UserError(f"{folder / REST} cannot be read ({one_line(str(error))[:200]})") from error


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
        kind, shape, offset, size = self._found[name]
        data = self._values[offset : offset + size]
        if kind in FOUR_BITS:
            pairs = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            # the first value in the low half
            values = torch.stack([pairs & 15, pairs >> 4], dim=-1)
            return (values.int() - 16 * (values > 7) if kind == "i4" else values).reshape(shape)
        return torch.frombuffer(bytearray(data), dtype=DTYPES[kind]).reshape(shape)
