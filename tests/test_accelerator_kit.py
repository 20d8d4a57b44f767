"""bench/accelerator.py, the kit for real machines, on the stand-in with tiny sizes."""

import json
import re

import accelerator
import pytest
import torch
from accelerator import NAME
from benches import bench

from auto_mmround.model import devices

pytestmark = accelerator.NEEDED


@pytest.fixture(scope="module")
def kit():
    with accelerator.shown(), pytest.MonkeyPatch.context() as patch:
        module = bench("accelerator")
        patch.setitem(devices.TABLE, NAME, accelerator.ROW)
        patch.setattr(module.importlib.util, "find_spec", lambda name: None)  # no auto-round there
        yield module


def test_the_kit_measures_by_part_and_reads_back(kit, tmp_path, capsys):
    words = ["--device", NAME, "--tiny", "--parts", "speed", "reading", "--keep", str(tmp_path)]
    assert kit.main(words) == 0
    (file,) = tmp_path.glob("*.json")
    record, shown = json.loads(file.read_text()), capsys.readouterr().out
    assert len(record["speed"]) == len(kit.TINY) == 4
    for row in record["speed"]:
        assert row["better"] and row["rate"] > 0 and row["loop_rate"] > 0 and row["peak_gb"] > 0
        assert set(row["parts"]) == set(kit.PARTS)
        assert sum(row["parts"].values()) == pytest.approx(row["seconds"], rel=0.5)
    assert set(record["reading"]) == set(kit.FORMATS.split(","))
    assert all(read["right"] for read in record["reading"].values())
    assert "a stand-in" in shown and len(re.findall(r"^\| tiny \|", shown, re.M)) == 4
    assert file.with_suffix(".md").read_text().strip() in shown


def test_what_the_time_does_not_suffice_for_is_left_out(kit, capsys):
    assert kit.main(["--device", NAME, "--tiny", "--parts", "speed", "--minutes", "0"]) == 0
    assert capsys.readouterr().out.count("left out: no time") == 4


@pytest.mark.parametrize("preset", ["light", "default"])
@pytest.mark.parametrize("layers", [1, 3])
def test_operations_are_those_that_torch_counts(kit, preset, layers):
    """By part of a whole run."""
    operations = bench("operations")
    sizes, tokens, samples, device = kit.SHAPES["tiny"], 16, 16, torch.device("cpu")
    recipe = kit.Recipe(preset=preset, nsamples=samples, seqlen=tokens, group_size=32, device="cpu")
    model = kit.model_of(sizes, layers, device)
    model.set_attn_implementation("eager")  # whose products the counter sees
    plan, inputs = kit.make_plan(model, recipe), kit.inputs_of(kit.rows_of(300, samples, tokens))
    session = kit.Session(model, recipe, plan, inputs)
    with operations.counting() as counted:
        kit.pipeline.quantize(model, recipe, plan, inputs, kit.Finished())
    seen = {part: each["operations"] for part, each in counted.by_part.items()}
    found = kit.operations(sizes, recipe, tokens, session, layers)
    assert found["passes"] == seen["teacher, student"]
    assert found["moments"] == seen["moments"]
    one = found["passes"] / (samples * (2 * layers - 1))
    at_nearest = one * 2 * layers  # of two held-out samples, outside the steps
    assert found["steps"] + at_nearest == seen["steps"] + seen["held out"]


def test_the_peak_is_that_of_the_card(kit):
    assert kit.peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert kit.peak_of("NVIDIA A100-SXM4-80GB") == 312e12
    assert kit.peak_of("a stand-in") is None
