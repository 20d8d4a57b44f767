"""bench/accelerator.py, the kit for real machines, on the stand-in with tiny sizes."""

import importlib.util
import json
import re
from pathlib import Path

import accelerator
import pytest
import torch
from accelerator import NAME

from auto_mmround.model import devices

pytestmark = accelerator.NEEDED
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def kit():
    spec = importlib.util.spec_from_file_location("kit", ROOT / "bench" / "accelerator.py")
    module = importlib.util.module_from_spec(spec)
    with accelerator.shown(), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "bench")
        spec.loader.exec_module(module)
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
        assert row["better"] and row["rate"] > 0 and row["peak_gb"] > 0
        assert set(row["parts"]) == set(kit.PARTS)
        assert sum(row["parts"].values()) == pytest.approx(row["seconds"], rel=0.5)
    assert set(record["reading"]) == set(kit.FORMATS.split(","))
    assert all(read["right"] for read in record["reading"].values())
    assert "a stand-in" in shown and len(re.findall(r"^\| tiny \|", shown, re.M)) == 4
    assert file.with_suffix(".md").read_text().strip() in shown


def test_what_the_time_does_not_suffice_for_is_left_out(kit, capsys):
    assert kit.main(["--device", NAME, "--tiny", "--parts", "speed", "--minutes", "0"]) == 0
    assert capsys.readouterr().out.count("left out: no time") == 4


def test_operations_are_those_that_torch_counts(kit):
    from torch.utils.flop_counter import FlopCounterMode

    sizes, tokens = kit.SHAPES["tiny"], 16
    model = kit.model_of(sizes, 1, torch.device("cpu"))
    model.set_attn_implementation("eager")  # whose products the counter sees
    layer = model.model.layers[0]
    seen = {}
    layer.register_forward_pre_hook(
        lambda block, args, kwargs: seen.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    model(torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    with FlopCounterMode(display=False) as counter:
        layer(*seen["args"], **seen["kwargs"])
    recipe = kit.Recipe(iters=1, batch_size=1)
    # three passes of the step, and looks at one sample before and after it
    assert kit.operations(sizes, recipe, 1, tokens) == 5 * counter.get_total_flops()
