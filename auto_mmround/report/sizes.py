"""What a checkpoint takes on disk."""

from pathlib import Path
from typing import Any

from auto_mmround.errors import UserError
from auto_mmround.export import formats
from auto_mmround.headers import DAMAGED, Header, read_header
from auto_mmround.model.loading import find_folder
from auto_mmround.untrusted import one_line, read_object, weight_files


def size(count: float | None) -> str:
    """Bytes in a unit that fits."""
    if count is None:
        return "–"
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def sizes(folder: Path, model: str) -> dict[str, Any]:
    """Bytes on disk: all weights, packed ones with their scales, the rest; the source's weights.
    Raises UserError for a damaged file of weights."""
    quantization = read_object(folder / "config.json").get("quantization_config")
    headers = [_header(path) for path in sorted(folder.glob("*.safetensors"))]
    headers_of = {name: header for file in headers for name, header in file.items()}
    fmt = formats.from_config(quantization) if quantization else None
    modules = fmt.packed(headers_of) if fmt else ()
    parts = {f"{module}.{part}" for module in modules for part in (fmt.parts if fmt else ())}
    packed = sum(header.nbytes for name, header in headers_of.items() if name in parts)
    plain = sum(header.nbytes for name, header in headers_of.items() if name not in parts)
    weights = sum(
        path.stat().st_size
        for pattern in ("*.safetensors", "*.gguf", "openvino_*.bin")
        for path in folder.glob(pattern)
    )
    try:
        source = find_folder(model, offline=True)
        before = sum(path.stat().st_size for path in weight_files(source)) or None
    except UserError:
        before = None
    return {"weights": weights, "packed": packed, "plain": plain, "source": before}


def _header(path: Path) -> dict[str, Header]:
    try:
        return read_header(path)
    except DAMAGED as error:
        raise UserError(
            f"{path} is damaged ({one_line(str(error))[:200]}): write it anew"
        ) from None
