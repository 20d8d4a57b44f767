"""OpenVINO's IR of the language model and some towers, weights as u4, i4, u8 or i8 constants, by
its own converter.

The converter needs the openvino package: it runs in an environment of its own, as a subprocess.
Reading the graphs back needs none.
"""

import importlib.util
import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from auto_mmround import strict
from auto_mmround.errors import UserError
from auto_mmround.export.format import Whole, WholeFormat, check_integers
from auto_mmround.export.layout import Layout
from auto_mmround.export.method import Method
from auto_mmround.export.openvino.read import read
from auto_mmround.export.shards import ShardWriter
from auto_mmround.families import FAMILIES, family_of
from auto_mmround.numerics.grids import SCALE_DTYPES, Codes, dequantize
from auto_mmround.programs import answer_of, environment_of, program

log = logging.getLogger(__name__)
CONVERTER = [str(program(name)) for name in ("engine_main", "openvino_convert")]
ENVIRONMENT = Path(".engines/openvino/bin/python")


def converter_python() -> Path:
    """The interpreter that has OpenVINO. Raises UserError if there is none."""
    if ENVIRONMENT.is_file():
        return ENVIRONMENT.absolute()
    if importlib.util.find_spec("openvino") is None:
        raise UserError(
            "format openvino needs OpenVINO's converter: scripts/engines.sh openvino, or pip"
            " install openvino"
        )
    return Path(sys.executable)


def check_model(config: Mapping[str, Any], keys: Iterable[str], source: Path | None) -> None:
    """Raises UserError for a model that is no decoder of text; says which towers stay behind."""
    model_type = config.get("model_type")
    if config.get("is_encoder_decoder") or "num_mel_bins" in config:
        raise UserError(
            f"format openvino holds decoders of text, with or without a tower, not {model_type}"
        )
    if not family_of(str(model_type)).openvino and any(
        key in config for key in ("vision_config", "audio_config")
    ):
        log.warning(
            f"openvino: of {model_type} only the language model is converted; towers are for"
            f" {', '.join(name for name, row in FAMILIES.items() if row.openvino)}"
        )


def write(folder: Path, whole: Whole) -> dict[str, Any]:
    """The graphs; returns the ``quantization_config``. Raises UserError if the converter fails or a
    graph is wrong."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        plain = Path(scratch)
        writer = ShardWriter(plain)  # one tensor in memory at a time
        for key, tensor in _floats(whole):
            writer.add({key: tensor.contiguous()})
        writer.finish()
        (plain / "config.json").write_text(
            strict.dumps(strict.tagged(whole.config)), encoding="utf-8"
        )
        save_file(
            {
                f"{i}.{part}": t
                for i, c in enumerate(whole.codes.values())
                for part, t in _parts(c).items()
            },
            plain / "codes",
        )
        request = {
            "model": str(plain),
            "class": whole.config["architectures"][0],
            "codes": str(plain / "codes"),
            "schemes": [
                {"name": f"{n}.weight", "bits": c.bits, "sym": c.sym}
                for n, c in whole.codes.items()
            ],
            "out": str(folder.absolute()),
        }
        (plain / "request.json").write_text(strict.dumps(request), encoding="utf-8")
        # -P: the script's folder must not be searched before the packages.
        python = converter_python()
        command = [str(python), "-P", *CONVERTER, str(plain / "request.json")]
        done = subprocess.run(
            command, cwd=scratch, env=environment_of(python), capture_output=True, text=True,
            check=False,
        )  # fmt: skip
    answer = answer_of(done.stdout) or {
        "error": (done.stderr.strip().splitlines() or ["no answer"])[-1]
    }
    if not answer.get("ok"):
        raise UserError(
            f"OpenVINO's converter failed on {whole.config['architectures'][0]}: {answer['error']}"
        )
    return _config(whole.layout)


def _floats(whole: Whole) -> Iterator[tuple[str, Tensor]]:
    yield from whole.rest
    yield from ((f"{name}.weight", dequantize(codes)) for name, codes in whole.codes.items())


def _parts(codes: Codes) -> dict[str, Tensor]:
    return {
        "codes": codes.q_OI,
        "scales": codes.scale_OG.float().contiguous(),
        "zeros": codes.zero_OG.contiguous(),
    }


def _config(layout: Layout) -> dict[str, Any]:
    """What names the format, and the recipe's scheme for people: each weight's own is in the
    graphs."""
    default = layout.default
    facts = {"bits": default.bits, "group_size": default.group_size, "sym": default.sym}
    return {
        "quant_method": FORMAT.name,
        **facts,
        "provider": "auto_mmround",
        "auto_mmround": dict(layout.details),
    }


FORMAT = WholeFormat(
    name="openvino",
    summary=(
        "OpenVINO IR, 4 and 8 bits, of the language model and the towers of Qwen2-VL and LLaVA:"
        " OpenVINO"
    ),
    bits=(4, 8),
    check=check_integers((4, 8), (1, 2), SCALE_DTYPES),
    write=write,
    read=read,
    ready=converter_python,
    check_model=check_model,
    method=Method("openvino"),
    engines={"openvino": "openvino"},
)
FORMATS = (FORMAT,)
