"""Ways to break a checkpoint: the static check must find each and name the tensor, key or file."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mutations_formats
import pytest
import torch
from mutations import (
    ATTENTION,
    DOWN,
    INDEX,
    NORM,
    SHARDS,
    Mutation,
    config,
    copy_tensor,
    drop,
    edit,
    index_says,
    missing_pattern,
    nibbles,
    one,
    poke,
    pop,
    put,
    quantize,
    rename,
    sharded,
    swap,
    tensors,
    truncate,
)

from auto_mmround.model.loading import DEMO
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs
from auto_mmround.verify.static import check

TOWER = "visual.blocks.0.attn.qkv"
ALL = ("auto_round", "auto_gptq", "auto_awq")
QZEROS, SCALES, QWEIGHT = f"{DOWN}.qzeros", f"{DOWN}.scales", f"{DOWN}.qweight"
GPTQ, AWQ = ("auto_gptq",), ("auto_awq",)

MUTATIONS = [
    # codes, scales, zero points
    Mutation("nibble order swapped", one(QWEIGHT, nibbles), QWEIGHT, ALL),
    Mutation("one code bit flipped", one(QWEIGHT, lambda t: t ^ torch.eye(*t.shape,
        dtype=torch.int32)), QWEIGHT, ALL),
    Mutation("zero points off by one", one(QZEROS, lambda t: t + 0x11111111), QZEROS, ALL),
    Mutation("scale missing", tensors(pop(SCALES)), SCALES, ALL),
    Mutation("zero points missing", tensors(pop(QZEROS)), QZEROS),
    Mutation("codes missing", tensors(pop(QWEIGHT)), DOWN, ALL),
    Mutation("scale is NaN", one(SCALES, poke(float("nan"))), SCALES, ALL),
    Mutation("scale is infinite", one(SCALES, poke(float("inf"))), SCALES),
    Mutation("scale is zero", one(SCALES, poke(0.0)), SCALES, ALL),
    Mutation("scale of the wrong sign", one(SCALES, lambda t: -t), SCALES),
    Mutation("scales as float32", one(SCALES, lambda t: t.float()), SCALES),
    Mutation("scales off by the last bit", one(SCALES,
        lambda t: (t.view(torch.int16) ^ 1).view(torch.half)), SCALES),
    Mutation("scales in the wrong order", one(SCALES, lambda t: t.flip(0)), SCALES, ALL),
    Mutation("scales transposed", one(SCALES, lambda t: t.T), SCALES),
    Mutation("codes transposed", one(QWEIGHT, lambda t: t.T), QWEIGHT, ALL),
    Mutation("codes as int64", one(QWEIGHT, lambda t: t.long()), QWEIGHT),
    Mutation(
        "scales of two layers' q exchanged",
        tensors(swap("model.layers.0.self_attn.q_proj.scales",
            "model.layers.1.self_attn.q_proj.scales")),
        "model.layers.0.self_attn.q_proj.scales",
        ALL,
    ),
    Mutation(
        "scales of q and k exchanged",
        tensors(swap(f"{ATTENTION}.q_proj.scales", f"{ATTENTION}.k_proj.scales")),
        f"{ATTENTION}.q_proj.scales",
    ),
    Mutation("g_idx permuted", one(f"{DOWN}.g_idx", lambda t: t.flip(0)), DOWN, GPTQ),
    Mutation("g_idx missing", tensors(pop(f"{DOWN}.g_idx")), f"{DOWN}.g_idx", GPTQ),
    # plain tensors
    Mutation("infinity in a norm", one(NORM, poke(float("inf"))), NORM, ALL),
    Mutation("NaN in a bias", one(f"{ATTENTION}.q_proj.bias", poke(float("nan"))),
        f"{ATTENTION}.q_proj.bias"),
    Mutation("square weight transposed", one("visual.blocks.1.attn.proj.weight", lambda t: t.T),
        "visual.blocks.1"),
    Mutation("one weight changed", one("model.embed_tokens.weight", poke(1.0)),
        "model.embed_tokens.weight"),
    Mutation("plain weight in another dtype", one(NORM, lambda t: t.float()), NORM),
    Mutation("norm cut short", one(NORM, lambda t: t[:-1]), NORM),
    # which tensors there are
    Mutation("module renamed", tensors(rename(DOWN, DOWN.replace("down_proj", "down"))), DOWN, ALL),
    Mutation("block renumbered", tensors(rename("model.layers.4.", "model.layers.5.")), "layers.4"),
    Mutation("kept layer missing", tensors(pop("visual.merger.mlp.0.weight")),
        "visual.merger.mlp.0.weight", ALL),
    Mutation("bias missing", tensors(pop(f"{ATTENTION}.k_proj.bias")), f"{ATTENTION}.k_proj.bias"),
    Mutation("unknown tensor", tensors(lambda t: t.update(extra=torch.ones(3))), "extra", ALL),
    Mutation(
        "tied embedding stored twice",
        tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]})),
        "lm_head.weight",
    ),
    Mutation("tower packed, not configured", tensors(quantize(TOWER)), TOWER),
    Mutation("tower packed in AWQ, not configured", tensors(quantize(TOWER, awq=True)), TOWER, AWQ),
    # files
    Mutation("weight file missing", drop("model.safetensors"), "model.safetensors", ALL),
    Mutation("shard missing", sharded(drop(SHARDS[0])), INDEX),
    Mutation("shard truncated", sharded(truncate), SHARDS[1]),
    Mutation("tensor in two shards", sharded(copy_tensor), NORM),
    Mutation("index names a missing file", sharded(index_says("no.safetensors")), INDEX),
    Mutation("index names the wrong shard", sharded(index_says(SHARDS[1])), NORM),
    Mutation("index forgets a tensor", sharded(edit(INDEX, lambda i: i["weight_map"].pop(NORM))),
        NORM),
    Mutation("index without metadata", sharded(edit(INDEX, pop("metadata"))), INDEX),
    Mutation("index with metadata of another form", sharded(edit(INDEX, put(metadata="x"))), INDEX),
    Mutation("a second weight file", lambda f: shutil.copy(f / "model.safetensors",
        f / "x.safetensors"), "x.safe"),
    Mutation("processor file dropped", drop("preprocessor_config.json"), "preprocessor_config.json",
        ALL),
    Mutation("processor configuration dropped", drop("processor_config.json"),
        "processor_config.json"),
    Mutation("chat template dropped", drop("chat_template.jinja"), "chat_template.jinja", ALL),
    Mutation("generation config dropped", drop("generation_config.json"), "generation_config.json"),
    Mutation("chat template is no text",
        lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"), "chat_template.jinja", ALL),
    Mutation("generation settings refused",
        edit("generation_config.json", put(max_new_tokens=-3)), "generation_config.json", ALL),
    Mutation("tokenizer dropped", drop("tokenizer.json"), "tokenizer.json"),
    Mutation("truncation left in", edit("tokenizer.json", put(truncation={"max_length": 512})),
        "tokenizer.json", ALL),
    Mutation("padding left in", edit("tokenizer.json", put(padding={"pad_id": 0})),
        "tokenizer.json"),
    Mutation("tokenizer config cut off", lambda f: (f / "tokenizer_config.json").write_text("{"),
        "tokenizer_config"),
    Mutation("custom code missing", edit("config.json", put(auto_map={"AutoConfig": "my_code.C"})),
        "my_code.py"),
    # configuration
    Mutation("configuration dropped", drop("config.json"), "config.json"),
    Mutation("quantization dropped", edit("config.json", pop("quantization_config")), "qweight"),
    Mutation("bits missing", config(pop("bits")), "quantization_config.bits", ALL),
    Mutation("packing format missing", config(pop("packing_format")), "packing_format"),
    Mutation("wrong bits", config(put(bits=8)), DOWN, ("auto_round", "auto_gptq")),
    Mutation("bits that the layout can't hold", config(put(bits=8)), DOWN, AWQ),
    Mutation("wrong group size", config(put(group_size=64)), DOWN, ALL),
    Mutation("sym flipped", config(put(sym=False)), DOWN, ("auto_round", "auto_gptq")),
    Mutation("zero_point flipped", config(put(zero_point=True)), DOWN, AWQ),
    Mutation("wrong quant_method", config(put(quant_method="awq", zero_point=False)),
        "quantization_config", GPTQ),
    Mutation(
        "wrong quant_method, with its layout",
        config(put(quant_method="awq", zero_point=False, checkpoint_format="gemm")),
        DOWN,
        GPTQ,
    ),
    Mutation("unknown quant_method", config(put(quant_method="quip")), "quantization_config", ALL),
    Mutation("quant_method of other files", config(put(quant_method="gguf")),
        "quantization_config"),
    Mutation("plain packing named", config(put(packing_format="auto_round")), QZEROS),
    Mutation("AWQ packing named", config(put(packing_format="auto_round:auto_awq")), DOWN),
    Mutation("block name wrong", config(put(block_name_to_quantize="model.layers")), "q_proj"),
    Mutation("block name misspelt",
        config(put(block_name_to_quantize="model.language_model.blocks")), "q_proj", GPTQ),
    Mutation("block names as a list", config(put(block_name_to_quantize=["model"])), "q_proj",
        GPTQ),
    Mutation("block prefix too short", config(put(block_name_to_quantize="model")), "visual.",
        GPTQ),
    Mutation("ignore pattern misses", config(missing_pattern("extra_config", "visual", "vision")),
        "vision"),
    Mutation("dynamic pattern misses", config(missing_pattern("dynamic", "visual", "vision")),
        "vision", GPTQ),
    Mutation("exclusion misses", config(missing_pattern("modules_to_not_convert", "visual",
        "vision")), "vision", AWQ),
    Mutation("exclusion too wide", config(put(modules_to_not_convert=["model.visual", "proj"])),
        "q_proj", AWQ),
    Mutation("exclusions dropped", config(pop("modules_to_not_convert")), "visual.", AWQ),
    Mutation("a packed layer excluded", config(put(dynamic={"-:.*k_proj": {}})), "k_proj", GPTQ),
    Mutation("override names a packed layer", config(put(extra_config={".*v_proj": {"bits": 16}})),
        "v_proj"),
    Mutation("the two configurations differ", config(put(iters=5), both=False),
        "quantization_config.json"),
]  # fmt: skip

CASES = [
    (mutation, name)
    for mutation in (*MUTATIONS, *mutations_formats.MUTATIONS)
    for name in mutation.formats
]
# names of checkpoints -> the run that writes them
RUNS: dict[tuple[str, ...], dict[str, Any]] = {
    ALL: {"format": ",".join(ALL)},
    mutations_formats.WORDS: {"format": "compressed_tensors", "sym": False},
    mutations_formats.INT8: {
        "format": "compressed_tensors", "bits": 8, "act_bits": 8, "group_size": -1
    },
    mutations_formats.MLX: {"format": "mlx", "group_size": 64},
    mutations_formats.GGUF: {"format": "gguf:q4_0", "group_size": 32},
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for names, changes in RUNS.items():
        out = tmp_path_factory.mktemp(names[0])
        recipe = Recipe(model="demo", algorithm="rtn", device="cpu", output_dir=str(out), **changes)
        found |= zip(names, jobs.run(jobs.prepare(recipe, jobs.load_model(recipe))))
    return found


@pytest.mark.parametrize("mutation, name", CASES, ids=[f"{m.name}: {name}" for m, name in CASES])
def test_every_way_to_break_a_checkpoint_is_found_and_named(mutation, name, checkpoints, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(checkpoints[name], folder)
    mutation.apply(folder)
    errors = [finding for finding in check(folder) if finding.severity == "error"]
    assert any(mutation.named in finding.where for finding in errors), [
        finding.line() for finding in errors
    ]


def test_enough_ways():
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 30


@pytest.mark.parametrize("name", [name for names in RUNS for name in names])
def test_unbroken_checkpoints_are_right(name, checkpoints):
    assert check(checkpoints[name]) == [] == check(checkpoints[name], source=DEMO)


@pytest.mark.parametrize("name", ALL)
def test_shards_are_right_too(name, checkpoints, tmp_path):
    shutil.copytree(checkpoints[name], tmp_path / "sharded")
    sharded()(tmp_path / "sharded")
    assert check(tmp_path / "sharded") == []


@pytest.mark.parametrize(
    "changes",
    [
        {"quant_nontext_module": True},
        {"sym": False, "format": "auto_round,auto_round:auto_awq,auto_gptq,auto_awq"},
        {"bits": 3, "group_size": 64, "format": "auto_round,auto_gptq"},
        {"bits": 2, "group_size": -1, "sym": False, "format": "auto_round,auto_gptq"},
        {"layer_config": {"re:.*mlp": {"bits": 8}, "o_proj": {"bits": 16}}, "format": "auto_round"},
        {"format": "compressed_tensors,mlx,fake"},
        {"bits": 3, "group_size": 64, "sym": False, "format": "compressed_tensors,mlx"},
        {"bits": 8, "group_size": -1, "act_bits": 8, "format": "compressed_tensors"},
        {"group_size": 32, "format": "gguf"},
        {"group_size": 32, "sym": False, "format": "gguf:q4_k"},
    ],
    ids=str,
)
def test_other_schemes_are_right_too(changes, tmp_path):
    recipe = replace(
        Recipe(model="demo", iters=0, device="cpu", output_dir=str(tmp_path)), **changes
    )
    for folder in jobs.run(jobs.prepare(recipe, jobs.load_model(recipe))):
        assert [finding.line() for finding in check(folder, source=DEMO)] == []


def without_record(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    (target / "run.json").unlink()
    return target


def test_other_tools_files_are_checked_as_far_as_they_can_be(checkpoints, tmp_path):
    folder = without_record(checkpoints["auto_gptq"], tmp_path / "foreign")
    assert check(folder) == []
    one(QWEIGHT, nibbles)(folder)
    assert check(folder) == []  # nothing in the folder tells
    assert [finding.where for finding in check(folder, source=DEMO)] == [f"{DOWN}.weight"]


def test_what_the_model_itself_tells_needs_no_record(checkpoints, tmp_path):
    """The same on files without `run.json`: what contradicts the model or the configuration is
    found all the same."""
    record_only = {
        "nibble order swapped", "one code bit flipped", "scale is zero", "scale of the wrong sign",
        "sym flipped",
        "scales off by the last bit", "scales in the wrong order",
        "scales of two layers' q exchanged", "g_idx missing",
        "square weight transposed", "one weight changed", "plain weight in another dtype",
        "processor file dropped",
        "tied embedding stored twice", "processor configuration dropped", "chat template dropped",
        "zero_point flipped",
        "generation config dropped", "ignore pattern misses", "dynamic pattern misses",
        "the two configurations differ",
    }  # fmt: skip
    assert record_only <= {mutation.name for mutation in MUTATIONS}
    for i, mutation in enumerate(m for m in MUTATIONS if m.name not in record_only):
        folder = without_record(checkpoints[mutation.formats[0]], tmp_path / str(i))
        mutation.apply(folder)
        assert any(finding.severity == "error" for finding in check(folder)), mutation.name
        shutil.rmtree(folder)
