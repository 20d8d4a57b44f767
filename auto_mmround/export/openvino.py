"""OpenVINO's IR of the text path, weights as u4, i4, u8 or i8 constants, made by OpenVINO's own converter.

The converter needs the openvino package: it runs in an environment of its own, as a subprocess.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from safetensors.torch import save_file
from torch import Tensor

from auto_mmround.errors import UserError
from auto_mmround.export.layout import Format, Whole, check_int
from auto_mmround.numerics.grids import SCALE_DTYPES, Codes, dequantize
from auto_mmround.recipe.schemes import Scheme

CONVERTER = Path(__file__).with_name("openvino_convert.py")
GRAPH = "openvino_model.xml"
ENVIRONMENT = Path(".engines/openvino/bin/python")


def converter_python() -> Path:
    """The interpreter that has OpenVINO. Raises UserError if there is none."""
    if ENVIRONMENT.is_file():
        return ENVIRONMENT.absolute()
    if importlib.util.find_spec("openvino") is None:
        raise UserError(
            "format openvino needs OpenVINO's converter: scripts/engines.sh openvino, or pip install openvino"
        )
    return Path(sys.executable)


def check(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    """Why the IR could not hold this weight, or None."""
    return check_int(scheme, out_features, in_features, FORMAT.bits, (1, 2), SCALE_DTYPES)


def write(folder: Path, whole: Whole) -> None:
    """openvino_model.xml and .bin, then config.json. Raises UserError if the converter fails or its graph is wrong."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        plain = Path(scratch)
        save_file(
            {key: tensor.contiguous().clone() for key, tensor in _floats(whole)},
            plain / "model.safetensors",
            metadata={"format": "pt"},
        )
        (plain / "config.json").write_text(json.dumps(dict(whole.config)), encoding="utf-8")
        save_file(
            {f"{i}.{part}": t for i, c in enumerate(whole.codes.values()) for part, t in _parts(c).items()},
            plain / "codes",
        )
        request = {
            "model": str(plain),
            "class": whole.config["architectures"][0],
            "codes": str(plain / "codes"),
            "schemes": [{"bits": codes.bits, "sym": codes.sym} for codes in whole.codes.values()],
            "out": str((folder / GRAPH).absolute()),
        }
        (plain / "request.json").write_text(json.dumps(request), encoding="utf-8")
        # -P: the script's folder must not be searched for modules, this file would pass for the package.
        command = [str(converter_python()), "-P", str(CONVERTER), str(plain / "request.json")]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
    answer = _last_json(done.stdout) or {"error": (done.stderr.strip().splitlines() or ["no answer"])[-1]}
    if not answer.get("ok"):
        raise UserError(f"OpenVINO's converter failed on {whole.config['architectures'][0]}: {answer['error']}")
    (folder / "config.json").write_text(json.dumps(dict(whole.config), indent=2) + "\n", encoding="utf-8")


def _floats(whole: Whole) -> list[tuple[str, Tensor]]:
    return [*whole.rest, *((f"{name}.weight", dequantize(codes)) for name, codes in whole.codes.items())]


def _parts(codes: Codes) -> dict[str, Tensor]:
    return {"codes": codes.q_OI, "scales": codes.scale_OG.contiguous(), "zeros": codes.zero_OG.contiguous()}


def _last_json(text: str) -> dict[str, Any] | None:
    lines = text.strip().splitlines()
    try:
        return json.loads(lines[-1]) if lines else None
    except ValueError:
        return None


def _not_packed(*_: Any) -> NoReturn:
    raise UserError("an OpenVINO folder holds a graph, not packed tensors: read it with OpenVINO")


FORMAT = Format(
    name="openvino",
    summary="OpenVINO IR of the text path, 4 and 8 bits: OpenVINO",
    bits=(4, 8),
    check=check,
    pack=_not_packed,
    unpack=_not_packed,
    config=_not_packed,
    write=write,
    ready=converter_python,
)
