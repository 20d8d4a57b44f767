"""What configurations and records say is what was done, in JSON that every parser reads."""

import json
import math
from dataclasses import fields, replace

import pytest
import torch
from tiny_models import FAMILIES, tiny_texts, tiny_tokenizer

from auto_mmround import AutoRoundMLLM, strict
from auto_mmround.calibration.inputs import ModelInput, padded
from auto_mmround.report import report

ROWS = tiny_texts(16, 32)


def strictly(text):
    def refuse(word):
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


def autoround(model, **options):
    given = {"dataset": ROWS, "nsamples": 16, "seqlen": 32, "group_size": 32} | options
    return AutoRoundMLLM(model, tiny_tokenizer(), **given)


def test_layers_without_gradient_are_solved_like_others(tmp_path):
    model = FAMILIES["llama"].build()
    last = model.model.layers[1]
    for layer in (last.self_attn.o_proj, last.mlp.down_proj):
        layer.weight.data.zero_()
    run = autoround(model, iters=2)
    run.quantize()
    for block in run.reports:
        figures = [
            block.nearest,
            block.start,
            block.end,
            *(v for f in block.layers.values() for v in f.values()),
        ]
        assert all(math.isfinite(figure) for figure in figures), block
    moved = run.reports[1].layers["model.layers.1.mlp.up_proj"]
    assert moved["start"] != moved["nearest"]  # it has moments, so it was solved
    run.save_quantized(tmp_path / "out")
    strictly((tmp_path / "out" / "run.json").read_text())


def test_no_number_makes_json_that_is_none(tmp_path):
    run = autoround(FAMILIES["llama"].build(), iters=1)
    run.quantize()
    _, finished = run._done
    for name, block in finished.reports.items():
        layers = {layer: dict.fromkeys(found, math.nan) for layer, found in block.layers.items()}
        finished.reports[name] = replace(block, nearest=math.inf, end=math.nan, layers=layers)
    run.save_quantized(tmp_path / "out")  # writes the report too
    found = strictly((tmp_path / "out" / "run.json").read_text())
    assert found["blocks"][0]["end"] is None and found["blocks"][0]["start"] is not None
    strictly((tmp_path / "out" / "report.json").read_text())
    assert report.collect(tmp_path / "out")["damage"] is None


def test_infinity_in_a_configuration_is_written_as_transformers_does():
    written = strict.dumps(strict.tagged({"time_step_limit": (0.0, math.inf)}))
    assert strictly(written) == {"time_step_limit": [0.0, {"__float__": "Infinity"}]}


def test_padding_keeps_every_field_of_a_sample():
    ids = torch.arange(20)[None]
    given = {"input_features": torch.zeros(1, 8, 32), "decoder_input_ids": ids}
    modality_T, tower_F = (
        torch.zeros(20, dtype=torch.int8),
        torch.tensor([3] * 8 + [4] * 8, dtype=torch.int8),
    )
    sample = ModelInput("a", given, modality_T, torch.ones(20, dtype=torch.bool), tower_F)
    found = padded(sample, 32)
    assert (
        found.tower_F is tower_F
        and found.id == "a"
        and len(found.modality_T) == len(found.answer_T) == 32
    )
    assert {field.name for field in fields(ModelInput)} == {
        "id",
        "kwargs",
        "modality_T",
        "answer_T",
        "tower_F",
        "left",
    }


@pytest.mark.parametrize("kind, bits, size", [("fp8", 8, -1), ("nvfp4", 4, 16), ("int", 4, 32)])
def test_layer_config_names_the_data_type(kind, bits, size):
    grid = {"data_type": kind, "bits": bits, "group_size": size}
    run = AutoRoundMLLM(
        FAMILIES["llama"].build(), tiny_tokenizer(), iters=0, format="compressed_tensors", **grid
    )
    run.quantize()
    assert {found["data_type"] for found in run.layer_config.values() if found["bits"] < 16} == {
        kind
    }


@pytest.mark.parametrize(
    "options, stated",
    [
        (
            {"iters": 1, "dampening": 0.07},
            {"damp_percent": 0.07, "static_groups": True, "true_sequential": False},
        ),
        (
            {"algorithm": "gptq", "true_sequential": True},
            {"damp_percent": 0.05, "true_sequential": True},
        ),
        ({"iters": 0}, {"damp_percent": None, "static_groups": False, "true_sequential": False}),
    ],
)
def test_gptq_configurations_state_what_was_used(tmp_path, options, stated):
    run = autoround(FAMILIES["llama"].build(), format="auto_gptq", **options)
    run.quantize()
    out = run.save_quantized(tmp_path / "out", format="auto_gptq")[0]
    found = json.loads((out / "config.json").read_text())["quantization_config"]
    assert {key: found.get(key) for key in stated} == stated
