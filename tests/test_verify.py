"""`verify`: how engines resolve names, what counts as agreement, and the command on right and wrong
folders."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import FAMILIES

from auto_mmround import cli
from auto_mmround.checkpoint.subject import read_subject
from auto_mmround.errors import UserError
from auto_mmround.export import formats
from auto_mmround.export.formats import FORMATS
from auto_mmround.export.method import Spelling
from auto_mmround.families import vllm_module
from auto_mmround.model.loading import DEMO
from auto_mmround.readers import ENGINES
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.recipe.schemes import Scheme
from auto_mmround.run import job as jobs
from auto_mmround.verify.agreement import (
    Reference,
    agreed,
    greedy,
    judge,
    largest_difference,
    make_reference,
)
from auto_mmround.verify.engines import EngineResult, interpreter, worker
from auto_mmround.verify.limits import LIMITS, refusal, support
from auto_mmround.verify.probes import TEXT as PROBE
from auto_mmround.verify.probes import make_probes
from auto_mmround.verify.static import check
from auto_mmround.verify.verify import _reason_not_to_ask, verify

TEXT = "model.language_model.layers.0.mlp.up_proj"
TOWER = "model.visual.blocks.0.mlp.fc1"


@pytest.fixture
def mismatched(demo_folder, tmp_path):
    """The name mismatch of released exports: blocks by the checkpoint's spelling alone."""
    broken = tmp_path / "mismatched"
    shutil.copytree(demo_folder, broken)
    for name in ("config.json", "quantization_config.json"):
        content = json.loads((broken / name).read_text())
        content.get("quantization_config", content)["block_name_to_quantize"] = "model.layers"
        (broken / name).write_text(json.dumps(content))
    return broken


@pytest.mark.parametrize(
    "model_type, name, spelled",
    [
        ("qwen2_vl", "model.layers.0.mlp.up_proj", "language_model.model.layers.0.mlp.up_proj"),
        ("qwen2_vl", TEXT, "language_model.model.layers.0.mlp.up_proj"),
        ("qwen2_vl", TOWER, "visual.blocks.0.mlp.fc1"),
        ("qwen2_vl", "visual.blocks.0.mlp.fc1", "visual.blocks.0.mlp.fc1"),
        ("qwen2_vl", "lm_head", "language_model.lm_head"),
        ("llava", "model.vision_tower.x", "vision_tower.x"),
        ("llava", "language_model.model.layers.0", "language_model.model.layers.0"),
        ("whisper", "model.encoder.layers.0.fc1", "model.encoder.layers.0.mlp.fc1"),
        ("llama", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
    ],
)
def test_module_names_in_vllm(model_type, name, spelled):
    assert vllm_module(model_type, name) == spelled


@pytest.mark.parametrize(
    "engine, method, config, quantized",
    [
        (
            "Transformers",
            "auto-round",
            {"block_name_to_quantize": "model.language_model.layers"},
            {TEXT},
        ),
        ("Transformers", "auto-round", {"block_name_to_quantize": ["model.layers"]}, set()),
        ("Transformers", "auto-round", {}, {TEXT, TOWER}),
        ("Transformers", "auto-round", {"extra_config": {".*visual.*": {"bits": 16}}}, {TEXT}),
        (
            "Transformers",
            "auto-round",
            {"block_name_to_quantize": "model.visual", "extra_config": {TEXT: {"bits": 8}}},
            {TEXT, TOWER},
        ),
        ("Transformers", "gptq", {"block_name_to_quantize": "model.visual"}, {TOWER}),
        # optimum finds the blocks, and reads no dynamic
        ("Transformers", "gptq", {"dynamic": {"-:.*": {}}}, {TEXT}),
        (
            "Transformers",
            "gptq",
            {"block_name_to_quantize": "model", "modules_in_block_to_quantize": ["fc1"]},
            {TOWER},
        ),
        ("Transformers", "awq", {}, {TEXT, TOWER}),
        # not from the start
        ("Transformers", "awq", {"modules_to_not_convert": ["visual"]}, {TEXT, TOWER}),
        ("Transformers", "awq", {"modules_to_not_convert": ["model.visual"]}, {TEXT}),
        ("vLLM", "awq", {"modules_to_not_convert": ["visual"]}, {TEXT}),
        ("vLLM", "gptq", {"dynamic": {"-:.*visual": {}}}, {TEXT}),
        ("vLLM", "auto-round", {"block_name_to_quantize": "model.visual"}, {TOWER}),
        ("vLLM", "auto-round", {"extra_config": {"fc1": {"bits": 16}}}, {TEXT}),  # by ending
        (
            "vLLM",
            "compressed-tensors",
            {
                "config_groups": {"g": {"targets": ["Linear"]}},
                "ignore": ["re:.*visual.*", "lm_head"],
            },
            {TEXT},
        ),
    ],
)
def test_readers(engine, method, config, quantized):
    stated = {"bits": 4, "sym": True, "packing_format": "auto_round:auto_gptq"}
    question = Spelling(stated | config, [TEXT, TOWER, "lm_head"], "lm_head", frozenset({TEXT}))
    (found, *_) = formats.of_method({"quant_method": method})
    assert set(found.method.readers[engine](question)) == quantized


def test_tokens_agree_up_to_a_near_tie():
    assert agreed([1, 2, 3], [9, 9, 9], [1, 2, 3], 0.15) == (3, True)
    assert agreed([1, 2, 3], [9, 0.1, 9], [1, 7, 7], 0.15) == (1, True)
    assert agreed([1, 2, 3], [9, 9, 0.1], [1, 7, 3], 0.15) == (1, False)


def test_logits_are_compared_over_the_last_positions_and_the_own_vocabulary():
    want = torch.arange(12.0).reshape(4, 3)
    padded = torch.nn.functional.pad(want[None, 2:], (0, 5), value=99.0)
    assert largest_difference([padded], [want]) == 0
    assert largest_difference([padded + 0.5], [want]) == 0.5
    assert not largest_difference([], [want]) <= 1  # NaN: nothing to compare is never agreement


def answer(reference: Reference, offset: float, **changes) -> EngineResult:
    logits = [
        each[None] + offset * torch.linspace(-1, 1, each.shape[-1]) for each in reference.logits
    ]
    return EngineResult(
        **{"ok": True, "quantized": 35, "dtype": "float32", "logits": logits, **changes}
    )


def test_judgement(exact_demo):
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    reference = make_reference(DEMO, exact_demo.model, [{"input_ids": ids}])
    tokens, margins = greedy(exact_demo.model, {"input_ids": ids}, 4)
    options = dict(max_new_tokens=4, do_sample=False, eos_token_id=[-1])
    made = exact_demo.model.generate(input_ids=ids, **options)[0, 6:].tolist()
    assert tokens[:2] == made[:2] and len(margins) == 4 and min(margins) >= 0
    assert judge(answer(reference, 0), reference, 35)["status"] == "right"
    assert judge(answer(reference, 0), reference, 36)["reason"] == "35 quantized layers, 36 planned"
    assert "logits differ" in judge(answer(reference, reference.spread), reference, 35)["reason"]
    assert "logits differ" in judge(answer(reference, 0, logits=[]), reference, 35)["reason"]
    assert judge(answer(reference, float("nan")), reference, 35)["status"] == "wrong"
    wrong = [(token + 1) % 2048 for token in tokens]
    right = judge(answer(reference, 0, tokens=[torch.tensor([tokens])]), reference, 35)
    assert right["status"] == "right" and right["tokens"] == (4, 4)
    if margins[0] > 0.2:
        assert (
            "token 0"
            in judge(answer(reference, 0, tokens=[torch.tensor([wrong])]), reference, 35)["reason"]
        )


def test_engines_that_give_next_log_probabilities_only(exact_demo):
    reference = make_reference(DEMO, exact_demo.model, [{"input_ids": torch.tensor([[5, 6, 7]])}])
    top = reference.logits[0][-1].log_softmax(-1).topk(20)
    given = dict(zip(top.indices.tolist(), top.values.tolist()))
    assert judge(EngineResult(True, logprobs=[given]), reference, 35)["status"] == "right"
    shifted = {i: value - reference.spread for i, value in given.items()}
    assert judge(EngineResult(True, logprobs=[shifted]), reference, 35)["status"] == "wrong"
    assert judge(EngineResult(True, logprobs=[{}]), reference, 35)["status"] == "wrong"


def test_probes_need_nothing_but_the_folder(exact_demo, tmp_path):
    probes, notes = make_probes(exact_demo, tmp_path)
    assert [probe.kind for probe in probes] == ["text", "image"] and notes == []
    assert "pixel_values" in probes[1].kwargs and probes[1].media["image0"].dtype == torch.uint8


@pytest.mark.parametrize("form", ["as words", "as letters", "as three"])
def test_a_text_of_few_or_unknown_tokens_is_asked_about(form, tmp_path):
    """GPT-2's tokenizer makes 29 tokens of the text, fewer than calibration takes. Three would
    prove little: the first words are asked about instead."""
    pieces = {"as words": re.findall(r"\w+|[^\w\s]", PROBE), "as letters": PROBE}.get(form, "abc")
    ids = [3] * len(pieces)
    loaded = SimpleNamespace(
        model=FAMILIES["llama"].build(), processor=None,
        tokenizer=lambda text, **options: {"input_ids": ids},
    )  # fmt: skip
    (probe,), notes = make_probes(loaded, tmp_path)
    wanted = list(range(32)) if form == "as three" else ids
    assert probe.kwargs["input_ids"].tolist() == [wanted] and notes == []
    assert sorted(probe.kwargs) == ["attention_mask", "input_ids"]


def test_a_probe_for_speech_recognition(exact_demo, tmp_path):
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    size = {
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }
    config = WhisperConfig(d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=2048, **size)
    config.pad_token_id = config.bos_token_id = config.eos_token_id = (
        config.decoder_start_token_id
    ) = 3
    model = WhisperForConditionalGeneration(config).eval()
    processor = SimpleNamespace(feature_extractor=WhisperFeatureExtractor())
    loaded = SimpleNamespace(model=model, processor=processor, tokenizer=exact_demo.tokenizer)
    (probe,), _ = make_probes(loaded, tmp_path)
    reference = make_reference(tmp_path, model, [probe.kwargs])
    assert (
        probe.kind == "speech"
        and probe.media["audio0"].shape == (16000,)
        and reference.logits[0].shape == (9, 2048)
    )
    assert len(greedy(model, probe.kwargs, 3)[0]) == 3


def test_the_command_on_a_right_folder(demo_folder, capsys):
    words = ["--engine", "transformers", "--source", str(DEMO), "--json"]
    assert cli.main(["verify", str(demo_folder), *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["right"] and found["static"] == [] and found["format"] == "auto_round:auto_gptq"
    (engine,) = found["engines"]
    assert (
        engine["status"] == "right"
        and engine["layers"] == engine["planned"] == 35
        and engine["gap"] < 1e-3
    )


def test_the_command_on_a_wrong_folder(mismatched, capsys):
    assert cli.main(["verify", str(mismatched)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0].startswith("error: model.layers.0.self_attn.q_proj") and "Transformers" in lines[0]
    )
    assert "block_name_to_quantize: is not what the run wrote" in lines[1]
    assert lines[2].startswith("WRONG mismatched: files") and "no engine is asked" in lines[3]


@pytest.mark.slow
def test_the_engine_confirms_what_the_names_say(mismatched):
    (verdict,) = verify(mismatched, ["transformers"]).verdicts
    assert verdict.status == "wrong" and "made up" in str(verdict.reason)


def test_an_engine_that_is_not_installed_is_named_with_its_command(tmp_path):
    recipe = Recipe(
        model="demo", iters=0, device="cpu", format="auto_gptq", output_dir=str(tmp_path)
    )
    (folder,) = jobs.run(jobs.prepare(recipe, jobs.load_model(recipe)))
    found = verify(folder, root=tmp_path)
    assert found.right and [verdict.status for verdict in found.verdicts] == ["not run", "not run"]
    for name, verdict in zip(("gptqmodel", "vllm"), found.verdicts):
        assert f"bash scripts/engines.sh {name}" in verdict.line()
    with pytest.raises(UserError, match=r"bash scripts/engines\.sh vllm"):
        verify(folder, ["vllm"], root=tmp_path)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--engine", "vlm"], "there are transformers"),
        (["--engine", "mlx"], "does not read"),
        (["--engin", "x"], "did you mean --engine"),
        (["--engine", ""], "an argument is empty"),
        (["--engine", ","], "engine is empty"),
        (["--source", ""], "an argument is empty"),
        (["--timeout", "0"], "seconds above 0"),
        (["--timeout", "-1"], "seconds above 0"),
        (["--timeout", "nan"], "seconds above 0"),
        (["--timeout", "inf"], "seconds above 0"),
    ],
)
def test_mistakes_are_one_line(words, said, demo_folder, capsys):
    assert cli.main(["verify", str(demo_folder), *words]) == 2
    assert said in capsys.readouterr().err
    assert cli.main(["verify", str(demo_folder / "no")]) == 2


@pytest.mark.parametrize("words", [["verify"], ["eval", "--model"], ["report"]])
def test_an_empty_name_is_not_the_current_folder(words, demo_folder, monkeypatch, capsys):
    monkeypatch.chdir(demo_folder)
    assert cli.main([*words, ""]) == 2
    assert "an argument is empty" in capsys.readouterr().err


def test_what_engines_are_known_to_refuse():
    refused = refusal("vllm", "compressed_tensors", {Scheme(bits=3)})
    assert refused is not None and "Failed to find a kernel" in refused
    assert refusal("vllm", "compressed_tensors", {Scheme(4), Scheme(4, sym=False)}) is None
    assert refusal("vllm", "compressed_tensors:int8", {Scheme(8, -1, act_bits=8)}) is None
    assert "mismatched sizes" in str(refusal("transformers", "auto_gptq", {Scheme(4), Scheme(8)}))
    assert len(LIMITS) == len({limit for fmt in FORMATS.values() for limit in fmt.limits}) == 37


@pytest.mark.parametrize(
    "name, scheme, reason",
    [
        # AutoRound's configurations say the packing, whatever the schemes would make us choose
        ("auto_round", Scheme(4, 32, False), None),
        ("compressed_tensors", Scheme(4, 16, data_type="nvfp4"), "takes no compressed_tensors:fl"),
        ("compressed_tensors", Scheme(8, 32, data_type="mxfp8"), "with MXFP4 and MXFP8"),
    ],
)
def test_limits_are_those_of_the_format_that_was_written(name, scheme, reason, tmp_path):
    engine = "transformers" if reason is None else "vllm"
    subject = SimpleNamespace(fmt=FORMATS[name], schemes={"a": scheme}, quantization=None)
    told = _reason_not_to_ask(engine, subject, tmp_path)
    assert told is None if reason is None else reason in told


def test_the_support_matrix_has_a_reader_for_every_format():
    for name in FORMATS:
        assert any(answer.startswith("yes") for answer in support(name).values()), name
    assert support("auto_gptq")["vllm"].startswith("yes (") and support("auto_gptq")["mlx"] == "-"
    assert [engine for engine, answer in support("gguf:q4_k").items() if answer != "-"] == [
        "llamacpp"
    ]


def test_a_scheme_that_is_not_read_is_not_passed_over(tmp_path):
    weights = {
        "num_bits": 8,
        "type": "float",
        "strategy": "group",
        "group_size": 64,
        "symmetric": True,
    }
    quantization = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    quantization["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": weights}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    save_file(
        {f"{name}.weight_scale": torch.ones(2, 1) for name in ("b", "a")},
        tmp_path / "model.safetensors",
    )
    (found,) = [finding for finding in read_subject(tmp_path).findings if finding.where == "a"]
    assert (
        found.severity == "warning"
        and "is not checked (and 1 more): cannot read a: 8 bit float" in found.message
    )


def test_every_engine_is_a_row():
    assert set(ENGINES) == {"transformers", "vllm", "llamacpp", "mlx", "openvino"}
    assert worker("transformers").is_file()
    assert (
        interpreter("auto_gptq", folder_root := DEMO, "vllm")
        == folder_root / ".engines" / "vllm" / "bin" / "python"
    )


@pytest.mark.slow
def test_a_checkpoint_of_auto_round_is_flagged_for_its_names(tmp_path):
    """auto-round 0.16.1 without tuning names the blocks as the checkpoint does: Transformers makes
    plain layers."""
    import subprocess
    import sys

    program = tmp_path / "export.py"  # a file with a main guard: auto-round starts processes
    program.write_text(
        "from auto_round import AutoRound\nif __name__ == '__main__':\n    tool ="
        f" AutoRound({str(DEMO)!r}, scheme='W4A16', iters=0, device_map='cpu',"
        f" disable_opt_rtn=True)\n    tool.quantize_and_save({str(tmp_path / 'out')!r},"
        " format='auto_round')\n"
    )
    subprocess.run([sys.executable, str(program)], check=True, capture_output=True, timeout=600)
    (config,) = (tmp_path / "out").rglob("config.json")
    errors = [finding for finding in check(config.parent) if finding.severity == "error"]
    assert (
        len(errors) == 1
        and "Transformers" in errors[0].message
        and "model.layers.0" in errors[0].where
    )
