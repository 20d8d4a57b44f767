"""Samples that a model's class does not take: one line with the sample's name, or left out."""

import pytest
import torch
from tiny_models import FAMILIES, IMAGE, ids, tiny_tokenizer

from auto_mmround import AutoRoundMLLM
from auto_mmround.calibration.inputs import ModelInput
from auto_mmround.cli import main
from auto_mmround.errors import UserError
from auto_mmround.evaluate.metrics import measure
from auto_mmround.model.chains import first_tensor
from auto_mmround.model.passes import NotTaken, run_model
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs

GOOD = FAMILIES["qwen2_vl"].media["image"](0)


def without(*keys, **more):
    return {key: value for key, value in GOOD.items() if key not in keys} | more


def placed(count):
    """The picture of GOOD with `count` places for its four features."""
    row = ids(*[IMAGE] * count)
    return GOOD | row | {"mm_token_type_ids": (row["input_ids"] == IMAGE).long()}


PIXELS = GOOD["pixel_values"]
# name -> the row, what the line says
UNFIT = {
    "few places": (placed(2), "fails on it.*input_ids 1x14.*own processor"),
    "many places": (placed(9), "fails on it"),
    "no pixels": (without("pixel_values"), "no features that .* reads .*; it reads pixel_values"),
    "a misspelt key": (without("pixel_values", pixel_valus=PIXELS), "pixel_valus.*it reads pixel"),
    "no grid": (without("image_grid_thw"), "fails on it .*AttributeError"),
    "patches of another size": (GOOD | {"pixel_values": PIXELS[:, :50]}, "fails on it"),
    "no numbers": (GOOD | {"pixel_values": PIXELS * float("nan")}, "pixel_values holds NaN"),
    "a short mask": (GOOD | {"attention_mask": torch.ones(1, 5).long()}, "attention_mask .*1, 5"),
    "kinds of other tokens": (
        GOOD | {"mm_token_type_ids": torch.ones(1, 5).long()}, "mm_token_type_ids .*1, 5",
    ),
}  # fmt: skip


def recipe(tmp_path, **options):
    FAMILIES["qwen2_vl"].save(tmp_path / "model", tiny_tokenizer())
    return Recipe(
        model=str(tmp_path / "model"), output_dir=str(tmp_path / "out"), group_size=32, iters=1,
        nsamples=2, seqlen=64, amp=False, device="cpu", **options,
    )  # fmt: skip


def prepared(made, rows):
    return jobs.prepare(made, jobs.load_model(made), dataset=rows)


@pytest.mark.parametrize("name", UNFIT)
def test_what_the_model_does_not_take_is_one_line(name, tmp_path):
    row, words = UNFIT[name]
    with pytest.raises(UserError, match=f"^sample row#0: .*{words}") as found:
        prepared(recipe(tmp_path), [row, GOOD])
    assert "\n" not in str(found.value)
    assert "on_bad_sample=skip" in str(found.value)


@pytest.mark.parametrize("name", UNFIT)
def test_or_it_is_left_out(name, tmp_path):
    job = prepared(recipe(tmp_path, on_bad_sample="skip"), [GOOD, UNFIT[name][0], GOOD])
    assert [made.id for made in job.inputs] == ["row#0", "row#2"]
    assert [*job.calibration["skipped"].values()] == [("row#1",)]
    assert jobs.run(job)[0].is_dir()


def test_a_later_sample_is_named_by_the_run(tmp_path):
    """Only the first of each kind is tried beforehand: the run itself meets the others."""
    job = prepared(recipe(tmp_path), [GOOD, placed(2)])
    with pytest.raises(UserError, match=r"^sample row#1: .*fails on it"):
        jobs.run(job)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*-auto_round"))


@pytest.mark.parametrize("rows", ([placed(2), GOOD], [GOOD, placed(2)]))
def test_for_the_api(rows):
    model = FAMILIES["qwen2_vl"].build()
    before = model.lm_head.weight.clone()
    job = AutoRoundMLLM(
        model, tiny_tokenizer(), bits=4, group_size=32, dataset=rows, iters=1, nsamples=2,
        seqlen=64, device="cpu", amp=False,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"^sample row#[01]: .*fails on it"):
        job.quantize()
    assert torch.equal(model.lm_head.weight, before)


def test_for_the_command_line(tmp_path, capsys, monkeypatch):
    FAMILIES["qwen2_vl"].save(tmp_path / "model", tiny_tokenizer())
    torch.save([GOOD, placed(2)], tmp_path / "rows.bin")
    (tmp_path / "unfit_rows.py").write_text(
        f"import torch\nrows = torch.load({str(tmp_path / 'rows.bin')!r}, weights_only=True)\n"
    )
    monkeypatch.chdir(tmp_path)
    flags = ["--group_size", "32", "--iters", "1", "--device", "cpu", "--seqlen", "64"]
    words = ["--model", "model", "--dataset", "unfit_rows:rows", "--output_dir", "out", *flags]
    for command in (words, ["plan", *words]):
        assert main(command) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if "fails on it" in x]
        assert "unfit_rows:rows#1" in line


def test_evaluation_names_it_too():
    model, row = FAMILIES["qwen2_vl"].build(), placed(2)
    kinds = torch.zeros(row["input_ids"].shape[1], dtype=torch.int8)
    sample = ModelInput("set#4", row, kinds, kinds == 0)
    with pytest.raises(UserError, match=r"^sample set#4: Qwen2VL.* fails on it"):
        measure([model], [sample])


def test_rows_of_plain_lists_are_one_sample(tmp_path):
    flat = {key: value[0].tolist() for key, value in GOOD.items() if "mask" in key or "ids" in key}
    job = prepared(recipe(tmp_path), [GOOD | flat])
    assert job.inputs[0].kwargs["attention_mask"].shape == GOOD["attention_mask"].shape


def test_an_error_of_our_own_goes_on():
    """What hooks of ours raise is no sample's fault."""
    model, inputs = FAMILIES["llama"].build(), FAMILIES["llama"].samples()[0]
    for hook, expected in ((lambda *_: first_tensor(None), TypeError), (missing_key, NotTaken)):
        handle = model.model.layers[1].register_forward_hook(hook)
        with pytest.raises(expected):
            run_model(model, inputs)
        handle.remove()


def missing_key(*_):
    raise KeyError("a hook that is part of the model")


BROKEN = """
from auto_mmround.calibration.processor import register_processor
from auto_mmround.processors.basic import Basic

@register_processor("broken")
class Broken(Basic):
    def encode(self, sample, template, *, prompt=False):
        return {}["pixels"]
"""


def test_a_processor_that_fails_is_one_line(tmp_path):
    chats = [{"messages": [{"role": "user", "content": f"w{i} w5"}]} for i in range(2)]
    (tmp_path / "broken.py").write_text(BROKEN)
    made = recipe(tmp_path, processor=str(tmp_path / "broken.py"))
    with pytest.raises(
        UserError, match=r"row#0: the processor fails on it \(broken.py line \d+\): KeyE"
    ):
        prepared(made, chats)
