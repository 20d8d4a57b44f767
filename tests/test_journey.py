"""The whole way on the bundled model: plan, calibrate, tune two steps, export, read back,
measure."""

import json
from pathlib import Path

import pytest
import torch

from auto_mmround import AutoRoundMLLM
from auto_mmround.checkpoint.loader import from_quantized, load_any
from auto_mmround.errors import UserError
from auto_mmround.evaluate.held_out import held_out
from auto_mmround.evaluate.metrics import measure
from auto_mmround.export.formats import FORMATS
from auto_mmround.model import head
from auto_mmround.model.loading import DEMO
from auto_mmround.recipe.files import read
from auto_mmround.recipe.recipe import Recipe, from_mapping
from auto_mmround.run import job as jobs
from auto_mmround.run.plan import make_plan

FAST = Recipe(model="demo", dataset="demo", iters=2, nsamples=8, seqlen=64, device="cpu")


def run(out, **changes):
    from dataclasses import replace

    recipe = replace(FAST, output_dir=str(out), **changes)
    job = jobs.prepare(recipe, jobs.load_model(recipe))
    return job, jobs.run(job)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return run(
        tmp_path_factory.mktemp("out"), format="auto_round,auto_round:auto_awq,auto_gptq,auto_awq"
    )


def test_every_format_holds_the_tuned_weights_to_the_bit(exported):
    job, folders = exported
    assert [folder.name for folder in folders] == [
        f"demo-w4g128-{name}"
        for name in ("auto_round", "auto_round-auto_awq", "auto_gptq", "auto_awq")
    ]
    tuned = job.loaded.model.state_dict()
    for folder in folders:
        decoded = from_quantized(folder).model.state_dict()
        assert decoded.keys() == tuned.keys()
        assert all(torch.equal(decoded[name], tuned[name]) for name in tuned)


def test_everything_else_is_where_engines_look_for_it(exported):
    _, folders = exported
    source = {path.name for path in DEMO.iterdir() if path.suffix != ".safetensors"}
    for folder in folders:
        names = {path.name for path in folder.iterdir()}
        assert source | {"model.safetensors", "recipe.toml", "run.json"} <= names
        for name in source - {"config.json"}:
            assert (folder / name).read_bytes() == (DEMO / name).read_bytes()
        assert not any(name.endswith(".partial") for name in names)
        config = json.loads((folder / "config.json").read_text())
        assert config["quantization_config"]["bits"] == 4
        assert config["architectures"] == ["Qwen2VLForConditionalGeneration"]


def test_the_stored_recipe_reproduces_the_run(exported, tmp_path):
    _, folders = exported
    recipe = from_mapping(read(folders[2] / "recipe.toml") | {"output_dir": str(tmp_path)})
    again = jobs.run(jobs.prepare(recipe, jobs.load_model(recipe)))
    for one, two in zip(folders, again):
        first, second = files(one), files(two)
        assert first.keys() == second.keys()
        for name in first.keys() - {"run.json", "recipe.toml"}:
            assert first[name] == second[name], name
        records = [json.loads(f["run.json"]) for f in (first, second)]
        for record in records:
            assert record.pop("measured")["seconds"] > 0
            # the stored recipe has the adjusted values, so nothing is left to say
            record.pop("notes")
        assert records[0] == records[1]


def test_record_counts(exported):
    job, folders = exported
    record = json.loads((folders[0] / "run.json").read_text())
    assert record["quantized"] == len(job.plan.quantized) == 35
    assert len(record["blocks"]) == 5 and sum(block["weights"] for block in record["blocks"]) == 35
    assert all(block["end"] <= block["start"] for block in record["blocks"])
    assert (
        record["calibration"]["used"] == 8
        and record["kept"]["lm_head"] == "tied to the input embedding"
    )


def test_measuring_against_itself_and_a_coarse_copy(demo, tmp_path, monkeypatch):
    inputs = held_out(demo, "demo", limit=3)
    _, folders = run(tmp_path, bits=2, iters=0, format="auto_gptq")
    coarse = load_any(str(folders[0]))
    same, worse = measure([demo.model, coarse.model], inputs, reference=demo.model)
    assert same.kl == {"text": 0.0, "image": 0.0} and same.agreement == {"text": 1.0, "image": 1.0}
    assert worse.kl["text"] > 0.01 and worse.perplexity > same.perplexity
    assert same.positions == worse.positions and same.answers == 3
    monkeypatch.setattr(head, "LOGITS", 3 * demo.model.config.text_config.vocab_size)
    assert measure([demo.model, coarse.model], inputs, reference=demo.model) == [same, worse]
    config = json.loads((folders[0] / "config.json").read_text())
    (folders[0] / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    for dtype in (None, "float16"):  # which is slow on a processor
        assert load_any(str(folders[0]), dtype=dtype).model.dtype == torch.float32


def test_towers_on_request_and_recapture(tmp_path):
    job, folders = run(tmp_path, quant_nontext_module=True, dataset="demo-llava")
    assert [stage.name for stage in job.plan.stages] == ["vision", "text"]
    record = json.loads((folders[0] / "run.json").read_text())
    assert {block["stage"] for block in record["blocks"]} == {"vision", "text"}
    assert from_quantized(folders[0]).model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "changes, error",
    [
        ({"bits": 3, "format": "auto_awq"}, "auto_awq"),
        ({"group_size": 100}, "group size 100"),
        ({"fp_layers": "q_prj"}, "q_proj"),
        ({"fp_layers": "re:.*nothing"}, "matches no linear layer"),
        ({"layer_config": {"q_proj": {"bits": 8}}}, "one matrix"),
        ({"layer_config": {"o_proj": {"bit": 8}}}, "unknown key"),
        ({"layer_config": {"o_proj": {"bits": 12}}}, "2 to 8"),
        ({"layer_config": {"visual": {"bits": 8}}}, "towers are quantized with"),
        ({"layer_config": {"lm_head": {"bits": 8}}}, "with --untie_lm_head"),
        ({"to_quant_block_names": "audio"}, "matches no list"),
        ({"quant_lm_head": True}, "shares its weight"),
        ({"format": " , "}, "format is empty"),
        ({"template": "qwen3"}, "qwen2_vl"),
        ({"dataset": "no/such.json"}, "no/such.json"),
        ({"extra_data_dir": "/no/such/folder"}, "/no/such/folder"),
    ],
)
def test_wrong_wishes_are_one_line_and_leave_nothing(tmp_path, changes, error):
    out = tmp_path / "out"
    with pytest.raises(UserError) as caught:
        run(out, **changes)
    assert error in str(caught.value) and "\n" not in str(caught.value) and not out.exists()


def test_a_crash_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    def die(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("auto_mmround.run.output.write_config", die)
    with pytest.raises(OSError, match="disk full"):
        run(tmp_path / "out")
    # of the finished blocks
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["demo-w4g128.unfinished"]


def test_existing_output_is_kept_unless_asked(exported, tmp_path):
    folder = tmp_path / "demo-w4g128-auto_round"
    folder.mkdir()
    (folder / "precious.txt").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        run(tmp_path)
    assert (folder / "precious.txt").read_text() == "x" and len(list(tmp_path.iterdir())) == 1


def test_solving_for_the_teachers_outputs(tmp_path):
    codes = {}
    for retarget in (False, True):
        _, (folder,) = run(tmp_path / str(retarget), algorithm="gptq", retarget=retarget)
        codes[retarget] = json.loads((folder / "run.json").read_text())["codes"]
    assert codes[True] != codes[False]


def test_plan_overrides_and_fused_groups(demo):
    layers = {"re:.*mlp": {"bits": 8}, "layers.0": {"bits": 16}, "o_proj": {"group_size": 64}}
    plan = make_plan(demo.model, Recipe(layer_config=layers, format="auto_round"))
    scheme = plan.quantized["model.language_model.layers.1.mlp.down_proj"]
    assert (scheme.bits, scheme.group_size) == (8, 128)
    assert plan.quantized["model.language_model.layers.1.self_attn.o_proj"].group_size == 64
    assert not any(name.startswith("model.language_model.layers.0.") for name in plan.quantized)
    assert (
        plan.kept["model.language_model.layers.0.mlp.up_proj"] == "kept by layer_config 'layers.0'"
    )
    asym = make_plan(demo.model, Recipe(sym=False, format="auto_gptq"))
    assert (
        {scheme.min_zero for scheme in asym.quantized.values()}
        == {FORMATS["auto_gptq"].min_zero}
        == {1}
    )


def test_api_as_in_the_original_readme(demo, tmp_path):
    from transformers import AutoProcessor, AutoTokenizer, Qwen2VLForConditionalGeneration

    model_name, dataset = str(DEMO), str(DEMO.parent / "calibration" / "text.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    tokenizer.processor = AutoProcessor.from_pretrained(model_name)
    model = Qwen2VLForConditionalGeneration.from_pretrained(model_name, dtype="auto")
    autoround = AutoRoundMLLM(
        model,
        tokenizer,
        bits=4,
        group_size=128,
        dataset=dataset,
        iters=1,
        nsamples=8,
        seqlen=64,
        device="cpu",
    )
    with pytest.raises(UserError, match="quantize"):
        autoround.save_quantized(tmp_path)
    quantized, layers = autoround.quantize()
    assert quantized is model and layers["lm_head"]["bits"] == 16
    assert layers["model.language_model.layers.0.mlp.up_proj"] == {
        "bits": 4, "group_size": 128, "sym": True, "data_type": "int",
    }  # fmt: skip
    folders = autoround.save_quantized(tmp_path / "one", format="auto_round", inplace=True)
    assert folders == [tmp_path / "one"]
    several = autoround.save_quantized(tmp_path / "many", format="auto_gptq,auto_awq")
    assert [folder.parent.name for folder in several] == ["many", "many"]
    state = from_quantized(folders[0]).model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_two_objects_do_not_interfere(tmp_path):
    one = AutoRoundMLLM("demo", bits=4, iters=0, device="cpu")
    two = AutoRoundMLLM("demo", bits=2, iters=0, device="cpu")
    one.quantize(), two.quantize()
    bits = [{c["bits"] for c in each.layer_config.values()} for each in (one, two)]
    assert bits == [{4, 16}, {2, 16}]


def test_api_refuses_unknown_options():
    with pytest.raises(UserError, match="did you mean group_size"):
        AutoRoundMLLM("demo", group_sise=64)


def test_rows_in_memory_and_models_from_nowhere(demo, tmp_path):
    from transformers import AutoConfig, Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration(AutoConfig.from_pretrained(DEMO)).bfloat16()
    rows = ["In the beginning was the word, and many words came after it. " * 20] * 8
    autoround = AutoRoundMLLM(
        model,
        demo.tokenizer,
        demo.processor,
        dataset=rows,
        iters=1,
        nsamples=8,
        seqlen=48,
        device="cpu",
    )
    autoround.quantize()
    (folder,) = autoround.save_quantized(tmp_path / "new")
    state = from_quantized(folder).model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert (folder / "tokenizer.json").is_file() and (folder / "preprocessor_config.json").is_file()
