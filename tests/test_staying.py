"""What stays in 16 bits: every byte of a model is in one part, and its flag shrinks it."""

import json
from dataclasses import replace

import pytest
from test_carried import saved
from tiny_models import FAMILIES, tiny_tokenizer

from auto_mmround import cli
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs
from auto_mmround.run.staying import staying
from auto_mmround.run.writing_cost import sizes_of

CARRIED = "layers that the class does not load"


def stays(folder, **changes) -> tuple[dict[str, int], dict[str, str | None]]:
    """(bytes by part, flag by part)."""
    recipe = Recipe(model=str(folder), group_size=32, iters=0, device="cpu")
    recipe = replace(recipe, **changes)
    loaded = jobs.load_model(recipe)
    plan = jobs.planned(recipe, loaded)
    rows = staying(loaded, plan, recipe)
    size = loaded.model.dtype.itemsize
    quantized = sum(w.out_features * w.in_features for w in plan.weights if w.scheme)
    kept = sum(row.nbytes for row in rows if row.part != CARRIED)
    assert kept + size * quantized == size * sum(p.numel() for p in loaded.model.parameters())
    assert [row.nbytes for row in rows] == sorted((row.nbytes for row in rows), reverse=True)
    return {row.part: row.nbytes for row in rows}, {row.part: row.flag for row in rows}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    def of(name: str):
        place = tmp_path_factory.getbasetemp() / f"staying-{name}"
        if not place.exists():
            FAMILIES[name].save(place, tiny_tokenizer())
        return place

    return of


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "llama4", "qwen2_vl", "whisper"])
def test_every_parameter_is_in_one_part(folder, name):
    found, flags = stays(folder(name))
    assert found.keys() == flags.keys() and found["embeddings"] > 0
    assert flags["embeddings"] is None


@pytest.mark.parametrize(
    "part, flag, changes",
    [
        ("towers", "--quant_nontext_module", {"quant_nontext_module": True}),
        ("output head", "--quant_lm_head", {"quant_lm_head": True}),
    ],
)
def test_the_flag_of_a_part_shrinks_it(folder, part, flag, changes):
    before, flags = stays(folder("qwen2_vl"))
    assert flags[part] == flag
    after, _ = stays(folder("qwen2_vl"), **changes)
    assert after.get(part, 0) < before[part]
    assert sum(after.values()) < sum(before.values())


def test_layers_that_are_kept_by_name_or_do_not_fit(folder):
    kept, flags = stays(folder("llama"), fp_layers="q_proj,k_proj,v_proj")
    assert "--fp_layers" in flags["layers kept by name"] and kept["layers kept by name"] > 0
    unfit, flags = stays(folder("llama"), group_size=64, format="auto_gptq")
    assert "--group_size" in flags["layers that do not fit"]
    assert unfit["layers that do not fit"] > 0


def test_carried_layers_are_counted_and_shrink_with_quant_mtp(tmp_path):
    model, _ = saved("llama", tmp_path / "model")
    before, flags = stays(model)
    assert flags[CARRIED] == "--quant_mtp" and before[CARRIED] > 0
    after, flags = stays(model, quant_mtp=True)
    assert 0 < after[CARRIED] < before[CARRIED]
    assert flags[CARRIED] is None  # what joins two hidden states stays anyway


def test_the_plan_says_it_as_a_table_and_as_json(folder, capsys):
    command = ["plan", "--model", str(folder("qwen2_vl")), "--group_size", "32", "--iters", "0",
               "--device", "cpu"]  # fmt: skip
    assert cli.main(command) == 0
    table = capsys.readouterr().out
    assert "stays in 16 bits" in table and "--quant_nontext_module" in table
    assert cli.main([*command, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    found, flags = stays(folder("qwen2_vl"))
    assert {row["part"]: row["nbytes"] for row in made["stays"]} == found
    assert {row["part"]: row["flag"] for row in made["stays"]} == flags
    assert made["estimate"]["fits"] and made["layers"] and made["bits_per_weight"] > 4


def test_a_streamed_model_is_as_large_on_the_disk(folder):
    sizes = []
    for stream in (False, True):
        recipe = Recipe(model=str(folder("llama")), group_size=32, iters=0, device="cpu",
                        stream=stream)  # fmt: skip
        sizes.append(sizes_of(jobs.prepare(recipe, jobs.load_model(recipe))))
    assert sizes[0] == sizes[1]
