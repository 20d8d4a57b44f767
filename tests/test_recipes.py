"""Recipe files: those of scripts/recipes end to end on the bundled model, names and files of other
tools, mistakes."""

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from auto_mmround import AutoRoundMLLM, cli
from auto_mmround.errors import UserError
from auto_mmround.export.formats import FORMATS
from auto_mmround.model.loading import DEMO
from auto_mmround.recipe.files import read, to_toml
from auto_mmround.recipe.recipe import ALIASES, HINTS, Recipe, from_mapping
from auto_mmround.recipe.schemes import SCHEMES
from auto_mmround.run.plan import make_plan

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "scripts" / "recipes"
REAL = sorted(path.name for path in RECIPES.glob("*.toml") if not path.name.startswith("demo_"))
waits_for_format = pytest.mark.skipif(
    "compressed_tensors" not in FORMATS, reason="waits for compressed_tensors"
)


def eight_bit_activations() -> bool:
    try:
        return bool(Recipe(act_bits=8))
    except UserError:
        return False


def marked(names):
    needs = pytest.mark.skipif(not eight_bit_activations(), reason="waits for act_bits = 8")
    return [pytest.param(name, marks=[needs] if "w8a8" in name else []) for name in names]


# --------------------------------------------------------------------------------------------------
# shipped recipes


@waits_for_format
@pytest.mark.parametrize("name", marked([f"demo_{name}" for name in REAL]))
def test_each_recipe_runs_end_to_end_on_the_demo(name, tmp_path, capsys):
    assert cli.main([str(RECIPES / name), "--output_dir", str(tmp_path), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert (
        ("sample generation" in printed and "assistant" in printed)
        or "text" in name
        or "w8a8" in name
    )
    recipe = from_mapping(read(RECIPES / name))
    for fmt in recipe.formats:
        folder = tmp_path / f"demo-w{recipe.bits}g{recipe.group_size}-{fmt}"
        assert (folder / "config.json").is_file()
        stored = from_mapping(read(folder / "recipe.toml"))
        assert (stored.ignore, stored.sequential_targets, stored.mappings, stored.equalize) == (
            recipe.ignore, recipe.sequential_targets, recipe.mappings, recipe.equalize,
        )  # fmt: skip


def test_demo_recipes_differ_from_the_real_ones_only_where_the_model_does():
    for name in REAL:
        real, demo = (tomllib.loads((RECIPES / n).read_text()) for n in (name, f"demo_{name}"))
        assert real.keys() | {"iters"} == demo.keys() | {"iters"}, name
        for key in (
            "scheme",
            "algorithm",
            "equalize",
            "group_size",
            "actorder",
            "dampening_frac",
            "format",
        ):
            assert real.get(key) == demo.get(key), (name, key)


SMALL = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TEXT = SMALL | {"num_key_value_heads": 2, "vocab_size": 99}
SPEECH = {"d_model": 128, "encoder_attention_heads": 2, "encoder_layers": 2, "encoder_ffn_dim": 128,
          "num_mel_bins": 16, "max_source_positions": 20}  # fmt: skip


def tiny_llava():
    vision = SMALL | {
        "model_type": "clip_vision_model",
        "image_size": 28,
        "patch_size": 14,
        "projection_dim": 32,
    }
    return transformers.LlavaConfig(
        vision_config=vision, text_config=TEXT | {"model_type": "llama"}
    )


def tiny_whisper():
    return transformers.WhisperConfig(
        **SPEECH, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=128, vocab_size=99,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip


CONFIGS = {
    "llava_w4a16_gptq.toml": ("LlavaForConditionalGeneration", tiny_llava),
    "whisper_w4a16_g64.toml": ("WhisperForConditionalGeneration", tiny_whisper),
    "qwen2_audio_w4a16.toml": (
        "Qwen2AudioForConditionalGeneration",
        lambda: transformers.Qwen2AudioConfig(
            audio_config=SPEECH, text_config=TEXT | {"model_type": "qwen2"}
        ),
    ),
    "qwen2.5_0.5b_w8a8.toml": ("Qwen2ForCausalLM", lambda: transformers.Qwen2Config(**TEXT)),
    "qwen2_vl_w4a16.toml": (
        "Qwen2VLForConditionalGeneration",
        lambda: transformers.AutoConfig.from_pretrained(DEMO),
    ),
}


@pytest.mark.parametrize("name", marked(REAL))
def test_each_recipe_fits_the_architecture_it_is_written_for(name):
    """Patterns and classes that name nothing raise UserError; towers and heads stay, unless they
    are asked for."""
    architecture, config = CONFIGS[name]
    with torch.device("meta"):
        model = getattr(transformers, architecture)(config())
    recipe = from_mapping(read(RECIPES / name))
    plan = make_plan(
        model, replace(recipe, format="auto_round" if recipe.act_bits > 8 else recipe.format)
    )
    wanted = {"encoder", "text"} if "whisper" in name else {"text"}
    assert {stage.name for stage in plan.stages} == wanted
    assert sum(stage.depth for stage in plan.stages) > 1 and not any(
        "head" in layer for layer in plan.quantized
    )


# ----------------------------------------------------------------------------------------------
# names of other tools


def test_names_of_other_tools_mean_our_keys():
    values = {
        "num_calibration_samples": 9,
        "max_seq_length": 77,
        "percdamp": 0.1,
        "actorder": "static",
        "scheme": "w3a16",
    }
    assert from_mapping(values) == Recipe(
        nsamples=9, seqlen=77, dampening=0.1, actorder="weight", bits=3
    )
    assert from_mapping({"scheme": "W4A16", "group_size": 64, "actorder": None}).group_size == 64
    assert from_mapping({"scheme": "W8A16"}, base=Recipe(bits=3, group_size=64)).group_size == -1
    assert set(ALIASES.values()) <= HINTS.keys() and not set(ALIASES) & HINTS.keys()


@pytest.mark.parametrize("name", ["FP8", "W8A8", "NVFP4", "W4A16_ASYM"])
def test_the_api_takes_a_scheme_whole(name):
    recipe = AutoRoundMLLM("demo", scheme=name, format="compressed_tensors", device="cpu").recipe
    assert {key: getattr(recipe, key) for key in SCHEMES[name]} == SCHEMES[name]


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_is_its_keys(name):
    recipe = from_mapping({"scheme": name})
    assert {key: getattr(recipe, key) for key in SCHEMES[name]} == SCHEMES[name]
    assert recipe == from_mapping(SCHEMES[name]) == from_mapping({"scheme": name.lower()})
    assert recipe.calibrates and recipe.closed_form and recipe.steps == 20
    assert not replace(recipe, iters=0).calibrates


def test_names_of_schemes_mean_what_they_say():
    wanted = {"W8A8", "W4A16", "W8A16", "W3A16", "W2A16", "W4A8", "FP8", "NVFP4", "MXFP4"}
    assert wanted <= SCHEMES.keys()
    for name, keys in SCHEMES.items():
        if name[0] == "W":
            bits, inputs = name[1:].removesuffix("_ASYM").split("A")
            kind, inputs = keys.get("act_data_type", ""), inputs.removeprefix("FP")
            assert (keys["bits"], min(keys["act_bits"], 16)) == (int(bits), int(inputs))
            assert kind == ("fp8" if "AFP8" in name else "")
        else:
            assert name.lower().startswith(keys["data_type"]) and keys["bits"] == int(
                keys["data_type"][-1]
            )
            assert keys["act_bits"] == (32 if name.endswith("A16") else keys["bits"])
    with pytest.raises(UserError, match="act_dynamic = false is for FP8"):
        from_mapping({"scheme": "W8A8", "act_dynamic": False})


@pytest.mark.parametrize(
    "name", ["FP8", "FP8_STATIC", "FP8_TENSOR", "FP8_BLOCK", "MXFP8", "MXFP4", "MXFP4A16", "NVFP4"]
)
def test_a_float_scheme_runs_from_a_recipe_of_three_lines(name, tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(f'model = "demo"\nscheme = "{name}"\nformat = "compressed_tensors"\n')
    assert (
        cli.main([str(path), "--dataset", "demo", "--nsamples", "8", "--output_dir", str(tmp_path)])
        == 0
    )
    keys = SCHEMES[name]
    (folder,) = tmp_path.glob("demo-*")
    group = json.loads((folder / "config.json").read_text())["quantization_config"][
        "config_groups"
    ]["group_0"]
    assert (group["weights"]["type"], group["weights"]["num_bits"]) == ("float", keys["bits"])
    assert bool(group["input_activations"]) == (keys["act_bits"] < 16)


@pytest.mark.parametrize(
    "values, word",
    [
        ({"num_calibration_sample": 4}, "did you mean num_calibration_samples"),
        ({"nsamples": 4, "num_calibration_samples": 4}, "the same key"),
        ({"scheme": "W5A16"}, "there are W2A16"),
        ({"scheme": ["W4A16"]}, "is unknown"),
        ({"equalize": "smooth"}, "smoothquant"),
        ({"smoothing_strength": 1.5}, "0 to 1"),
        ({"ignore": "lm_head"}, "expected list"),
        ({"ignore": [3]}, "a list of names"),
        ({"mappings": [["re:.*q_proj", "re:.*norm"]]}, "readers before their source"),
        ({"mappings": [[["re:.*q_proj"], "re:.*norm", "more"]]}, "readers before their source"),
        ({"actorder": "groups"}, "one of none, weight, group"),
    ],
)
def test_wrong_values_are_one_line(values, word):
    with pytest.raises(UserError) as caught:
        from_mapping(values, "recipe file r.toml")
    assert word in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "lines, word",
    [
        ('smoothing_strenght = 0.8', "did you mean smoothing_strength"),
        ('scheme = "W3A16"\nformat = "auto_awq"', "auto_awq"),
        ('equalize = "awq"\nmappings = [[["re:.*q_prj"], "re:.*input_layernorm"]]', "q_proj"),
        ('ignore = ["re:.*vision_tower.*"]', "matches no linear layer"),
        ('targets = ["Conv3d"]', "matches no linear layer"),
        ('sequential_targets = ["LlamaDecoderLayer"]', "Qwen2VLDecoderLayer"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_is_one_line_and_exit_2(lines, word, tmp_path, capsys):
    path, out = tmp_path / "r.toml", tmp_path / "out"
    path.write_text(f'model = "demo"\ndataset = "demo"\nnsamples = 8\nalgorithm = "rtn"\n{lines}\n')
    assert cli.main([str(path), "--output_dir", str(out), "--device", "cpu"]) == 2
    error = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("auto-round-mllm:")
    ]
    assert len(error) == 1 and word in error[0] and not out.exists()


def test_flags_for_lists_win_over_the_file(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: demo\nalgorithm: rtn\nscheme: W4A16\nignore: [down_proj]\nequalize: null\n"
    )
    flags = [
        "--ignore",
        "re:.*layers\\.0\\.",
        "o_proj",
        "--scheme",
        "W8A16",
        "--output_dir",
        str(tmp_path),
    ]
    assert cli.main([str(path), *flags, "--device", "cpu"]) == 0
    stored = from_mapping(read(tmp_path / "demo-w8g-1-auto_round" / "recipe.toml"))
    assert stored.ignore == ["re:.*layers\\.0\\.", "o_proj"] and stored.bits == 8


@pytest.fixture(scope="module")
def demo_model():
    config = transformers.AutoConfig.from_pretrained(DEMO)
    with torch.device("meta"):
        return transformers.Qwen2VLForConditionalGeneration(config)


def test_layers_by_class_and_stages_by_block(demo_model):
    plan = make_plan(demo_model, Recipe(ignore=["Qwen2VLAttention"], targets=["Linear"]))
    assert all("mlp" in name for name in plan.quantized)
    plan = make_plan(demo_model, Recipe(targets=["re:.*down_proj", "o_proj"]))
    assert {name.rpartition(".")[2] for name in plan.quantized} == {"down_proj", "o_proj"}
    assert "not among the targets" in plan.kept.values()
    plan = make_plan(demo_model, Recipe(sequential_targets=["Qwen2VLVisionBlock"]))
    assert [stage.name for stage in plan.stages] == ["vision"]
    plan = make_plan(demo_model, Recipe(sequential_targets=["Linear"]))  # the grain, not the blocks
    assert [stage.name for stage in plan.stages] == ["text"]
    # A tower that is ignored as a whole is no stage: nothing of it is captured or tuned.
    plan = make_plan(demo_model, Recipe(quant_nontext_module=True, ignore=["re:.*visual"]))
    assert [stage.name for stage in plan.stages] == ["text"]


# ------------------------------------------------------------------------------------------ recipes
# of llm-compressor


def translated(text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return from_mapping(read(path))


GROUPS = """
quant_stage:
  run_type: oneshot
  quant_modifiers:
    GPTQModifier:
      ignore: ["re:.*lm_head"]
      sequential_targets: [WhisperEncoderLayer, WhisperDecoderLayer]
      dampening_frac: 0.05
      block_size: 128
      config_groups:
        group_0:
          targets: [Linear]
          weights: {num_bits: 4, type: int, strategy: group, group_size: 64, symmetric: true,
                    actorder: weight, observer: minmax, dynamic: false}
          input_activations: null
        group_1:
          targets: ["re:.*fc2"]
          weights: {num_bits: 8, type: int, strategy: channel, symmetric: false}
"""


def test_config_groups(tmp_path):
    recipe = translated(GROUPS, tmp_path)
    assert (recipe.bits, recipe.group_size, recipe.sym, recipe.actorder) == (4, 64, True, "weight")
    assert (recipe.algorithm, recipe.dampening, recipe.format) == (
        "gptq",
        0.05,
        "compressed_tensors",
    )
    assert recipe.block_size == 128
    assert recipe.layer_config == {"re:.*fc2": {"bits": 8, "group_size": -1, "sym": False}}
    assert recipe.sequential_targets == ["WhisperEncoderLayer", "WhisperDecoderLayer"]
    assert (
        recipe.ignore == ["re:.*lm_head"] and not recipe.quant_nontext_module and not recipe.in_turn
    )
    path = tmp_path / "ours.toml"
    path.write_text(to_toml(recipe))
    assert from_mapping(read(path)) == recipe


def test_awq_and_plain_modifiers(tmp_path):
    recipe = translated(
        """
default_stage:
  default_modifiers:
    AWQModifier:
      ignore: [lm_head]
      scheme: W4A16_ASYM
      targets: [Linear]
      duo_scaling: false
      mappings:
        - smooth_layer: re:.*input_layernorm
          balance_layers: ["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"]
""",
        tmp_path,
    )
    assert (recipe.equalize, recipe.algorithm, recipe.sym, recipe.duo_scaling) == (
        "awq",
        "rtn",
        False,
        False,
    )
    assert recipe.mappings == [
        [["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], "re:.*input_layernorm"]
    ]
    assert recipe.quant_nontext_module  # its targets are the whole model's
    fine = translated(
        "GPTQModifier: {scheme: W4A16, sequential_targets: [Linear], actorder: group}", tmp_path
    )
    assert (
        fine.in_turn
        and fine.quant_nontext_module
        and not fine.block_classes
        and fine.actorder == "group"
    )
    tuned = translated("GPTQModifier: {scheme: NVFP4A16}", tmp_path)
    assert (tuned.data_type, tuned.algorithm, tuned.closed_form) == ("nvfp4", "gptq", True)
    assert translated("GPTQModifier: {scheme: NVFP4}", tmp_path).act_bits == 4
    static = translated("QuantizationModifier: {scheme: FP8}", tmp_path)
    assert (static.data_type, static.act_dynamic, static.algorithm) == ("fp8", False, "rtn")
    assert static.group_size == 0  # one scale for the whole weight
    assert translated("QuantizationModifier: {scheme: FP8_DYNAMIC}", tmp_path).act_dynamic
    plain = translated(
        "QuantizationModifier: {targets: Linear, scheme: {W8A16: [Linear]}}", tmp_path
    )
    assert (plain.algorithm, plain.bits, plain.group_size, plain.targets) == ("rtn", 8, -1, None)


WRITTEN = """
default_stage:
  default_modifiers:
    SmoothQuantModifier:
      {requires_calibration_data: true, smoothing_strength: 0.8, algorithm: smoothquant}
    GPTQModifier:
      config_groups:
        g:
          targets: [Linear]
          weights:
            num_bits: 4
            type: !!python/object/apply:compressed_tensors.quantization.quant_args.QuantizationType
              [int]
            symmetric: true
            group_size: 64
            strategy: group
            block_structure: null
            dynamic: false
            actorder: static
            scale_dtype: null
            zp_dtype: null
            observer: null
            observer_kwargs: {}
          input_activations: null
          output_activations: null
          format: null
      targets: [Linear]
      ignore: ['re:.*lm_head']
      weight_observer: mse
      bypass_divisibility_checks: false
      requires_calibration_data: true
      block_size: 128
      dampening_frac: 0.01
      actorder: static
"""


def test_the_file_that_llm_compressor_writes_beside_a_checkpoint(tmp_path):
    """As `recipe.yaml` of 0.14.0: defaults spelt out, members of enumerations as Python objects."""
    recipe = translated(WRITTEN, tmp_path)
    assert (recipe.equalize, recipe.smoothing_strength, recipe.algorithm) == (
        "smoothquant",
        0.8,
        "gptq",
    )
    assert (recipe.bits, recipe.group_size, recipe.actorder, recipe.block_size) == (
        4,
        64,
        "weight",
        128,
    )
    evil = WRITTEN.replace(
        "compressed_tensors.quantization.quant_args.QuantizationType", "os.system"
    )
    with pytest.raises(UserError, match=r"could not determine a constructor for os\.system"):
        translated(evil, tmp_path)


@pytest.mark.parametrize(
    "text, word",
    [
        ("GPTQModifier: {schem: W4A16}", "did you mean scheme"),
        ("GPTQModifier: {ignore: [lm_head]}", "names no scheme"),
        ("GTPQModifier: {scheme: W4A16}", "did you mean GPTQModifier"),
        ("quant_stage: {quant_modifiers: {SparseGPTModifier: {sparsity: 0.5}}}",
            "modifier 'SparseGPTModifier'"),
        ("GPTQModifier: {scheme: W4A16, kv_cache_scheme: {num_bits: 8}}", "can't be translated"),
        ("SmoothQuantModifier: {}\nAWQModifier: {scheme: W4A16}", "both set equalize"),
        ("GPTQModifier: {config_groups: {a: {weights: {num_bits: 8, type: float}}}}",
            "'float' can't be translated"),
        ("GPTQModifier: {config_groups: {a: {weights: {num_bits: 4, strategy: tensor}}}}",
            "'tensor'"),
        ("GPTQModifier: {config_groups: {a: {weights: {bits: 4}}}}", "unknown key 'bits'"),
        ("quant_stage: [1]", "expected keys and values"),
        ("GPTQModifier: {scheme: W9A16}", "there are W2A16"),
    ],
)  # fmt: skip
def test_what_cannot_be_translated_is_one_line(text, word, tmp_path):
    with pytest.raises(UserError) as caught:
        translated(text, tmp_path)
    assert word in str(caught.value) and "\n" not in str(caught.value)


def test_a_recipe_of_llm_compressor_runs(tmp_path):
    path = tmp_path / "recipe.yaml"
    text = (
        (RECIPES / "llm_compressor_w8a8.yaml")
        .read_text()
        .replace("W8A8", "W8A16")
        .replace(" Linear", " [Linear]")
    )
    path.write_text(text)
    assert yaml.safe_load(text)["quant_stage"]
    flags = (
        "--model demo --dataset demo-llava --nsamples 8 --format auto_round --device cpu"
        " --output_dir"
    )
    assert cli.main([str(path), *flags.split(), str(tmp_path / "out")]) == 0
    stored = from_mapping(read(tmp_path / "out" / "demo-w8g-1-auto_round" / "recipe.toml"))
    assert (stored.equalize, stored.algorithm, stored.smoothing_strength) == (
        "smoothquant",
        "gptq",
        0.8,
    )


# --------------------------------------------------------------------------------------------------
# the pages


def test_every_key_of_ours_on_the_migration_page_exists():
    page = (ROOT / "docs" / "migration.md").read_text()
    rows = [
        line.split("|") for line in page.splitlines() if line.startswith("|") and "---" not in line
    ]
    keys = [key for row in rows for key in re.findall(r"`(\w+)(?: = [^`]*)?`", row[-2])]
    assert len(keys) > 25 and [key for key in keys if key not in {*HINTS, "scheme"}] == []


def test_the_pages_name_every_recipe_key_of_this_room():
    text = (ROOT / "docs" / "recipes.md").read_text() + (ROOT / "docs" / "migration.md").read_text()
    for name in (
        *REAL,
        *ALIASES,
        "equalize",
        "smoothing_strength",
        "duo_scaling",
        "mappings",
        "sample_generation",
    ):
        assert name in text, name
