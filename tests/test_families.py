"""Every family through the whole journey: plan, calibrate, tune two steps, export twice, read back,
compare."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import mixtures
import numpy as np
import pytest
import torch
import transformers
from asking import run_transformers
from tiny_models import FAMILIES, Tiny, conversation, tiny_tokenizer
from transformers import WhisperFeatureExtractor, WhisperProcessor

from auto_mmround import cli
from auto_mmround.calibration.ready import with_decoder_ids
from auto_mmround.checkpoint.loader import from_quantized
from auto_mmround.checkpoint.reading import read_checkpoint
from auto_mmround.families import FAMILIES as KNOWN
from auto_mmround.model.capture import capture, recapture
from auto_mmround.model.chains import difference
from auto_mmround.model.experts import separated
from auto_mmround.model.speaking import speaking
from auto_mmround.model.structure import find_stages, linears
from auto_mmround.numerics.rounding import Rounding
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs
from auto_mmround.run.plan import grid_of, make_plan
from auto_mmround.verify.engines import interpreter
from auto_mmround.verify.proof import prove

pytestmark = pytest.mark.usefixtures("fast_disk")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def journey(family: Tiny, tokenizer, folder: Path) -> tuple[jobs.Job, list[Path]]:
    family.save(folder / "model", tokenizer)
    recipe = Recipe(
        model=str(folder / "model"), output_dir=str(folder / "out"), format="auto_round,auto_gptq",
        bits=4,
        group_size=32, iters=2, nsamples=16, seqlen=12, quant_nontext_module=True, amp=False,
        device="cpu",
        trust_remote_code=bool(family.standin),
    )  # fmt: skip
    job = jobs.prepare(recipe, jobs.load_model(recipe), dataset=family.samples())
    return job, jobs.run(job, prove=prove)


def test_the_table_says_what_is_tested():
    assert (
        list(KNOWN) == [name for name in KNOWN if name in FAMILIES]
        and len(KNOWN) == len(FAMILIES) >= 24
    )
    for name, family in FAMILIES.items():
        row = KNOWN[name]
        assert dict.fromkeys(row.stages) == dict.fromkeys(family.stages), name
        assert row.calibrates == (*["text"] * family.plain, *family.media), name


def logits(model, job) -> list[torch.Tensor]:
    part = speaking(model)
    return [part(**sample.kwargs, use_cache=False).logits for sample in job.inputs]


@pytest.mark.parametrize("name", FAMILIES)
def test_journey(name, tokenizer, tmp_path):
    family = FAMILIES[name]
    job, folders = journey(family, tokenizer, tmp_path)
    assert tuple(stage.name for stage in job.plan.stages) == family.stages
    assert job.plan.quantized and len(job.inputs) == len(family.samples())
    record = json.loads((folders[0] / "run.json").read_text())
    assert len(record["blocks"]) == sum(stage.depth for stage in job.plan.stages)
    assert all(block["end"] <= block["start"] for block in record["blocks"])
    tuned = job.loaded.model
    untouched, expected = logits(family.build(), job), logits(tuned, job)
    assert not any(torch.equal(one, two) for one, two in zip(untouched, expected, strict=True))
    for folder in folders:
        model = from_quantized(folder, remote_code=bool(family.standin)).model
        state = model.state_dict()
        for key, tensor in tuned.state_dict().items():
            assert torch.equal(state[key], tensor), (folder.name, key)
        for ours, wanted in zip(logits(model, job), expected, strict=True):
            assert torch.equal(ours, wanted)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.standin])
def test_the_student_sees_what_the_changed_model_sees(name):
    """Blocks change one after the other, as quantizing does; the chain must end where the changed
    model ends, to the
    bit: samples run alone, since several together are summed in another order."""
    family = FAMILIES[name]
    model, inputs = family.build(), family.samples()
    for stage in find_stages(model):
        chain = capture(model, [stage], inputs)[stage.path]
        for index, path in enumerate(stage.blocks):
            block = model.get_submodule(path)
            for _, layer in linears(block):
                layer.weight.data *= 1.1
            chain = chain.advanced([block], index, 1)
            if chain.live and index + 1 < stage.depth:
                chain = recapture(model, chain, index + 1, inputs)
        fresh = capture(model, [stage], inputs)[stage.path]
        blocks = [model.get_submodule(path) for path in stage.blocks]
        for i, hidden in enumerate(chain.hidden):
            assert torch.equal(hidden, fresh.run_group(blocks, 0, [i]))


MIXTURES = {
    "qwen3_moe": ("model.layers.0.mlp", "gate"),
    "kimi_k25": ("model.language_model.layers.1.mlp", "gate"),
    "qwen3_vl_moe": ("model.language_model.layers.1.mlp", "gate"),
    "llama4": ("language_model.model.layers.1.feed_forward", "router"),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_and_routers_are_in_the_plan(name):
    layer, router = MIXTURES[name]
    plan = make_plan(FAMILIES[name].build(), Recipe(group_size=32, quant_nontext_module=True))
    assert plan.kept[f"{layer}.{router}"] == "router"
    assert {
        f"{layer}.experts.{i}.{part}_proj" for i in range(4) for part in ("gate", "up", "down")
    } <= set(plan.quantized)
    stored = plan.kept.get("model.vision_tower.layers.0.attn.q_proj")
    assert stored == ("the checkpoint stores it in another form" if name == "kimi_k25" else None)


def test_experts_that_are_not_understood_stay_with_a_reason():
    model = mixtures.build("longcat_flash")  # its stacks have several sizes
    plan = make_plan(model, Recipe(group_size=32))
    assert (
        plan.kept["model.layers.0.mlp.experts.gate_up_proj"] == "fused experts: not quantized yet"
    )
    assert plan.kept["model.layers.0.mlp.router.classifier"] == "router"


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_one_by_one_are_the_same_model(name):
    family = FAMILIES[name]
    model, inputs = family.build(), family.samples()[0]
    before, state = model(**inputs).logits, set(model.state_dict())
    with separated(model):
        torch.testing.assert_close(model(**inputs).logits, before)
        for path, layer in linears(model):
            if ".experts." in path:
                layer.weight.data *= 1.5  # a view: the stacked parameter changes
    assert set(model.state_dict()) == state
    assert difference(model(**inputs).logits, before) > 0.01


def test_a_kept_expert_of_a_stack_is_written_alone(tokenizer, tmp_path):
    layer, _ = MIXTURES["llama4"]
    FAMILIES["llama4"].save(tmp_path / "model", tokenizer)
    recipe = Recipe(
        model=str(tmp_path / "model"), output_dir=str(tmp_path), group_size=32, algorithm="rtn",
        device="cpu",
        fp_layers=f"{layer}.experts.2",
    )  # fmt: skip
    job = jobs.prepare(recipe, jobs.load_model(recipe))
    (folder,) = jobs.run(job)
    names = read_checkpoint(folder).files
    assert (
        f"{layer}.experts.2.up_proj.weight" in names
        and f"{layer}.experts.1.up_proj.qweight" in names
    )
    assert not any("gate_up_proj" in name for name in names)
    decoded, tuned = from_quantized(folder).model.state_dict(), job.loaded.model.state_dict()
    assert all(torch.equal(decoded[name], tuned[name]) for name in tuned)


def test_experts_without_a_token_get_the_searched_scale(tokenizer, tmp_path):
    wide = replace(
        FAMILIES["qwen3_moe"], config=FAMILIES["qwen3_moe"].config | dict(num_experts=32)
    )
    met: dict[str, set[int]] = {}
    model = wide.build()
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            met[name] = set()
            module.register_forward_hook(
                lambda m, a, output, seen=met[name]: seen.update(output[-1].flatten().tolist())
            )
    job, folders = journey(wide, tokenizer, tmp_path)
    logits(model, job)
    reports = json.loads((folders[0] / "run.json").read_text())["blocks"]
    gate = "model.layers.0.mlp.gate"  # the inputs of the second layer are the student's
    assert 0 < len(met[gate]) < 32 and reports[0]["unreached"] == 3 * (32 - len(met[gate]))
    missed = next(i for i in range(32) if i not in met[gate])
    name = f"model.layers.0.mlp.experts.{missed}.down_proj"
    w_OI = model.model.layers[0].mlp.experts.down_proj[missed]
    nearest = Rounding(w_OI, 32, grid_of(job.plan.quantized[name])).weight()
    ours = job.loaded.model.model.layers[0].mlp.experts.down_proj[missed]
    assert 0 < (ours - w_OI).norm() < (nearest - w_OI).norm()


def test_text_alone_leaves_experts_without_a_token(tokenizer, tmp_path):
    """CogVLM2's vision experts see no text token: they keep a finite, rounded weight and the run
    goes on."""
    family = FAMILIES["cogvlm2"]
    family.save(tmp_path / "model", tokenizer)
    rows = [
        {"text": " ".join(f"w{3 + (7 * i + seed) % 100}" for i in range(40))} for seed in range(4)
    ]
    recipe = Recipe(
        model=str(tmp_path / "model"), output_dir=str(tmp_path / "out"), group_size=32, iters=2,
        nsamples=4, seqlen=32,
        amp=False, device="cpu", trust_remote_code=True,
    )  # fmt: skip
    job = jobs.prepare(recipe, jobs.load_model(recipe), dataset=rows)
    jobs.run(job)
    for name in job.plan.quantized:
        assert torch.isfinite(job.loaded.model.get_submodule(name).weight).all(), name


READABLE = ["qwen2_vl", "qwen3_vl", "mllama", "gemma3n_text", "granite_speech", "whisper", "gpt2"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_vl_moe"])
def test_transformers_reads_experts_with_auto_round(name, tokenizer, tmp_path):
    """In a process of its own: auto-round changes the tables of Transformers for these."""
    job, folders = journey(FAMILIES[name], tokenizer, tmp_path)
    kind = "AutoModelForImageTextToText" if FAMILIES[name].media else "AutoModelForCausalLM"
    inputs = [sample.kwargs for sample in job.inputs]
    python = interpreter("auto_round", Path(__file__).parents[1])
    result = run_transformers(folders[0], inputs, python=python, model_class=kind)
    assert result.ok and result.quantized == len(job.plan.quantized), result.error
    for ours, theirs in zip(logits(job.loaded.model, job), result.logits, strict=True):
        assert difference(theirs, ours) < 5e-3


@pytest.mark.parametrize("name", READABLE)
def test_transformers_reads_it_with_auto_round(name, tokenizer, tmp_path):
    """The engine's own reader, kernels in float16: near our decoded weights, towers included."""
    family = FAMILIES[name]
    job, folders = journey(family, tokenizer, tmp_path)
    model, info = getattr(transformers, family.architecture).from_pretrained(
        folders[0], dtype=torch.float16, device_map="cpu", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert sum(hasattr(module, "qweight") for module in model.modules()) == len(job.plan.quantized)
    for ours, theirs in zip(
        logits(job.loaded.model, job), logits(model.to(torch.float32).eval(), job), strict=True
    ):
        assert difference(theirs, ours) < 5e-3


def test_whisper_hears_rows_of_sound_and_text(tokenizer, tmp_path):
    family = replace(
        FAMILIES["whisper"], config=FAMILIES["whisper"].config | dict(max_source_positions=50)
    )
    family.save(tmp_path / "model", tokenizer)
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    WhisperProcessor(extractor, tokenizer).save_pretrained(tmp_path / "model")
    recipe = Recipe(
        model=str(tmp_path / "model"), output_dir=str(tmp_path / "out"), group_size=32, iters=1,
        nsamples=2, amp=False,
        device="cpu", quant_nontext_module=True,
    )  # fmt: skip
    sound = np.random.default_rng(0).normal(size=8000).astype(np.float32)
    rows = [
        {"audio": {"array": sound, "sampling_rate": 16000}, "text": "w5 w6 w7 " * n} for n in (4, 5)
    ]
    job = jobs.prepare(recipe, jobs.load_model(recipe), dataset=rows)
    first = job.inputs[0]
    assert (
        first.kwargs["decoder_input_ids"][0, :3].tolist() == [3, 5, 6]
        and len(first.modality_T) == 13
    )
    assert first.answer_T.tolist() == [False] + [True] * 12
    assert from_quantized(jobs.run(job)[0]).model.config.model_type == "whisper"


def test_labels_become_decoder_inputs():
    config = FAMILIES["whisper"].build().config
    labels = torch.tensor([[7, 8, 9, -100]])
    inputs = with_decoder_ids({"input_features": torch.zeros(1, 8, 32), "labels": labels}, config)
    assert set(inputs) == {"input_features", "decoder_input_ids"}
    assert inputs["decoder_input_ids"].tolist() == [[3, 7, 8, 9]]
    batch = torch.tensor([[7, 8, -100, -100], [-100, -100, 9, 10]])  # padded; asked for
    for row, ids in zip(batch, ([[3, 7, 8]], [[3, 0, 0, 9]]), strict=True):
        assert with_decoder_ids({"labels": row[None]}, config)["decoder_input_ids"].tolist() == ids


def test_a_family_that_nobody_knows(tokenizer, tmp_path, monkeypatch):
    """docs/new-model.md as written: template, processor, and a stage whose glue is found out."""
    (template,) = blocks("docs/new-model.md", "json")
    (processor,) = blocks("docs/new-model.md", "python")
    (tmp_path / "my_family.json").write_text(template)
    (tmp_path / "my_family.py").write_text(processor)
    (tmp_path / "images").mkdir()
    rows = [conversation(seed) for seed in range(4)]
    for i, row in enumerate(rows):
        row["image"].save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "pairs.json").write_text(
        json.dumps([row | {"image": f"{i}.png"} for i, row in enumerate(rows)])
    )
    Tiny("my_family", "MyModel", {}, standin="standins.my_family").save(
        tmp_path / "my-model", tokenizer
    )
    monkeypatch.chdir(tmp_path)
    command = next(
        code for code in blocks("docs/new-model.md", "bash") if "--processor my_family.py" in code
    )
    program, *words = shlex.split(command.replace("\\\n", " "))
    assert program == "auto-round-mllm"
    options = "--iters 1 --nsamples 4 --group_size 32 --output_dir out --device cpu --disable_amp"
    assert cli.main([*words, *options.split()]) == 0
    folder = tmp_path / "out" / "my-model-w4g32-auto_round"
    assert from_quantized(folder, remote_code=True).model.config.model_type == "my_family"
    assert len(json.loads((folder / "run.json").read_text())["blocks"]) == 3


def blocks(name: str, language: str) -> list[str]:
    return re.findall(
        rf"```{language}\n(.*?)```", (Path(__file__).parents[1] / name).read_text(), re.DOTALL
    )
