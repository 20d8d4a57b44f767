"""Every class of Transformers as a tiny random model.

A configuration is made small by the names of its fields; what resists has a row in `ROWS`.
"""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from sweep_table import KINDS, NEEDED, ROWS, SIZES, TOKENS
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny_models import FAMILIES

MULTIMODAL = (
    "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SPEECH_SEQ_2_SEQ", "CTC", "RNNT", "TDT",
    "TEXT_TO_WAVEFORM", "TEXT_TO_SPECTROGRAM",
)  # fmt: skip
TEXTS = ("SEQ_TO_SEQ_CAUSAL_LM", "CAUSAL_LM")
MOST = 8_000_000  # parameters of what may still be called tiny

SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
MARKS = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 3, "unk": 3, **TOKENS}


class Case(NamedTuple):
    """A class to try. group: multimodal or text."""

    model_type: str
    architecture: str
    group: str


class NotBuiltError(ValueError):
    """No tiny model, or no inputs, could be made."""


def cases() -> list[Case]:
    """Every class of the mappings once, by its first model type."""
    found: dict[str, Case] = {}
    for group, mappings in (("multimodal", MULTIMODAL), ("text", TEXTS)):
        for name in mappings:
            table = getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES")
            for model_type, classes in table.items():
                architecture = classes if isinstance(classes, str) else classes[0]
                found.setdefault(architecture, Case(model_type, architecture, group))
    return list(found.values())


def small(default: Any, rows: dict[str, Any]) -> dict[str, Any]:
    """Settings of a small configuration of the same class as ``default``."""
    made: dict[str, Any] = {}
    free = iter(range(101, 120))
    for field in dataclasses.fields(default):
        name = field.name
        value = vars(default).get(default.attribute_map.get(name, name))
        deeper = {k.partition(".")[2]: v for k, v in rows.items() if k.startswith(f"{name}.")}
        token = re.fullmatch(r"(.+)_token_(?:id|index)", name)
        if name in rows:
            made[name] = rows[name]
        elif dataclasses.is_dataclass(value) and hasattr(value, "model_type"):
            made[name] = small(value, deeper) | {"model_type": value.model_type}
        elif token and (isinstance(value, int | list) or token[1] in TOKENS):
            id_ = MARKS.get(token[1], next(free) if token[1] not in MARKS else 0)
            made[name] = [id_] if isinstance(value, list) else id_
        elif value is None and name in NEEDED:
            made[name] = NEEDED[name]
        elif name in SMALL and isinstance(value, int) and not isinstance(value, bool):
            made[name] = SMALL[name]
        elif (
            name in SMALL
            and isinstance(value, list | tuple)
            and all(isinstance(n, int) for n in value)
        ):
            made[name] = [SMALL[name]] * len(value)
        elif name == "image_grid_pinpoints" and value:
            made[name] = [[16, 32], [32, 16]]
        elif name == "rope_parameters" and isinstance(value, dict):
            made |= _rope(value)
    made |= {name: value for name, value in rows.items() if "." not in name}
    return _layers(default, made, rows)


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    """Plain rotary positions, in three parts where there were three."""
    if "mrope_section" not in value:
        return {}
    plain = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    more = {"mrope_interleaved": True} if value.get("mrope_interleaved") else {}
    whole = {"partial_rotary_factor": 1.0} if "partial_rotary_factor" in value else {}
    return {"rope_parameters": plain | more | whole}


def _layers(default: Any, made: dict[str, Any], rows: dict[str, Any]) -> dict[str, Any]:
    """Each kind of layer once, two layers at least, and lists with an entry a layer as short."""
    deep = next((n for n in ("num_hidden_layers", "n_layer", "num_layers") if n in made), None)
    depth = vars(default).get(deep) if deep else None
    lists = {
        field.name: value
        for field in dataclasses.fields(default)
        if isinstance(value := vars(default).get(field.name), list | tuple)
        and len(value) == depth
        and field.name not in rows
    }
    if not deep or deep in rows or not lists:
        return made
    kinds = list(zip(*(v for k, v in lists.items() if k in KINDS))) or [0] * (depth or 0)
    first = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())
    chosen = sorted({*first, *range(max(0, 2 - len(first) + 1))})[: max(2, len(first))]
    made[deep] = len(chosen)
    return made | {k: [v[i] for i in chosen] for k, v in lists.items()}


def build(case: Case) -> PreTrainedModel:
    """A random model, the same each time. Raises NotBuiltError for one that is not tiny."""
    cls = getattr(transformers, case.architecture)
    row = FAMILIES.get(case.model_type)
    if row and row.architecture == case.architecture:
        return row.build()
    default = (cls.config_class or CONFIG_MAPPING[case.model_type])()
    config = type(default)(**small(default, ROWS.get(default.model_type, {})))
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in cls(config).named_parameters()}
    if sum(sizes.values()) > MOST:
        large = sorted(sizes, key=lambda name: -sizes[name])[:3]
        raise NotBuiltError(f"{sum(sizes.values()):,} parameters, most in {', '.join(large)}")
    torch.manual_seed(0)
    model = cls(config)
    with torch.no_grad():  # as large as trained weights, and no norm or gate at its neutral start
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
            elif parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval().requires_grad_(False)
