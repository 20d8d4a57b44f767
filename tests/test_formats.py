"""The registry, what formats refuse, and whether the names in their configurations resolve in the
readers."""

import re
from itertools import chain
from typing import Any

import pytest

from auto_mmround.errors import UserError
from auto_mmround.export import formats
from auto_mmround.export.formats import FORMATS
from auto_mmround.export.layout import Layout
from auto_mmround.recipe.schemes import Scheme

SYM, ASYM = Scheme(4, 128, True), Scheme(4, 128, False)
BLOCK = "model.language_model.layers"
PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.down_proj",
)
TEXT = [f"{BLOCK}.{i}.{p}" for i in (0, 1, 11) for p in PROJECTIONS]
TOWER = [
    "model.visual.blocks.0.attn.qkv",
    "model.visual.blocks.0.mlp.down_proj",
    "model.visual.merger.mlp.0",
]


def swap(name: str, table: dict[str, str]) -> str:
    found = next((old for old in table if name.startswith(old)), "")
    return table.get(found, "") + name[len(found) :]


def stored(name: str) -> str:
    return swap(name, {"model.language_model.": "model.", "model.visual.": "visual."})


def in_vllm(name: str) -> str:
    """vLLM's own module name from Transformers' or from the checkpoint's spelling (Qwen2-VL)."""
    table = {
        "model.language_model.": "language_model.model.",
        "model.visual.": "visual.",
        "model.": "language_model.model.",
    }
    return swap(name, table | {"lm_head": "language_model.lm_head"})


def layout(keep: tuple[str, ...] = (), tower: bool = False, **schemes: Scheme) -> Layout:
    names = [n for n in TEXT + (TOWER[:2] if tower else []) if n not in keep]
    quantized = {n: schemes.get(n.rpartition(".")[2], SYM) for n in names}
    kept = [n for n in [*TOWER, *TEXT, "lm_head"] if n not in quantized]
    return Layout(
        quantized,
        kept,
        [BLOCK, "model.visual.blocks"] if tower else [BLOCK],
        stored,
        SYM,
        {"iters": 0},
    )


# What the readers do with a configuration, reduced to: is this module quantized?


def auto_round_transformers(config: dict[str, Any], name: str) -> bool:
    inside = any(name.startswith(block) for block in config["block_name_to_quantize"].split(","))
    extra = config["extra_config"]
    rule = extra.get(name) or next(
        (keys for key, keys in extra.items() if re.search(key, name)), None
    )
    return rule.get("bits", 4) < 16 if rule else inside


def auto_round_vllm(config: dict[str, Any], name: str) -> bool:
    extra = {in_vllm(key): keys for key, keys in config["extra_config"].items()}
    inside = any(
        name.startswith(in_vllm(block)) for block in config["block_name_to_quantize"].split(",")
    )
    rule = extra.get(name) or next(
        (k for key, k in extra.items() if "*" in key and re.search(key, name)), None
    )
    return rule.get("bits", 4) < 16 if rule else inside


def gptq_transformers(config: dict[str, Any], name: str) -> bool:
    inside = name.startswith(config["block_name_to_quantize"])
    listed = config.get("modules_in_block_to_quantize")
    return inside and (listed is None or any(name.endswith(entry) for entry in chain(*listed)))


def gptq_vllm(config: dict[str, Any], name: str) -> bool:
    # absent: vLLM looks at the tensors, which is always right
    listed = config.get("modules_in_block_to_quantize")
    excluded = any(rule[:2] == "-:" and re.match(rule[2:], name) for rule in config["dynamic"])
    return not excluded and (
        listed is None or any(in_vllm(entry) in name for entry in chain(*listed))
    )


def awq_transformers(config: dict[str, Any], name: str) -> bool:
    skips = config["modules_to_not_convert"]
    return not any(
        re.match(rf"(?:{key})(?:(?<=\.)|(?=\.|$))", name) or name.endswith(key) for key in skips
    )


def awq_vllm(config: dict[str, Any], name: str) -> bool:
    return not any(in_vllm(key) in name for key in config["modules_to_not_convert"])


def compressed_tensors(config: dict[str, Any], name: str, leave: str = "") -> bool:
    """Both readers: whatever `ignore` takes stays, else a name, a pattern or the class decides
    (compressed-tensors' own matching is in test_compressed_tensors)."""
    listed = [
        in_vllm(key) if leave and not key.startswith("re:") else key for key in config["ignore"]
    ]
    return not any(
        re.match(key[3:], name) if key.startswith("re:") else key == name for key in listed
    )


def compressed_tensors_vllm(config: dict[str, Any], name: str) -> bool:
    return compressed_tensors(config, name, "vllm")


READERS = {
    "auto_round": (auto_round_transformers, auto_round_vllm),
    "auto_round:auto_gptq": (auto_round_transformers, auto_round_vllm),
    "auto_round:auto_awq": (auto_round_transformers, auto_round_vllm),
    "auto_gptq": (gptq_transformers, gptq_vllm),
    "auto_awq": (awq_transformers, awq_vllm),
    "compressed_tensors": (compressed_tensors, compressed_tensors_vllm),
}
LAYOUTS = {
    "text": layout(),
    "two kept inside blocks": layout(
        keep=(f"{BLOCK}.1.mlp.down_proj", f"{BLOCK}.0.self_attn.o_proj")
    ),
    "a whole block kept": layout(keep=tuple(n for n in TEXT if ".11." in n)),
    "tower too": layout(tower=True),
}


@pytest.mark.parametrize("case", LAYOUTS)
@pytest.mark.parametrize("name", READERS)
def test_names_resolve_in_transformers_and_vllm(name: str, case: str) -> None:
    plan = LAYOUTS[case]
    config = FORMATS[name].config(plan)
    in_transformers, in_engine = READERS[name]
    modules = [*plan.quantized, *plan.kept]
    assert [n for n in modules if in_transformers(config, n)] == list(plan.quantized)
    assert [n for n in modules if in_engine(config, in_vllm(n))] == list(plan.quantized)


def test_text_model_without_towers_needs_no_lists() -> None:
    plan = Layout(
        {f"model.layers.0.{p}": SYM for p in PROJECTIONS}, ["lm_head"], ["model.layers"], str, SYM
    )
    gptq = FORMATS["auto_gptq"].config(plan)
    assert (
        gptq["block_name_to_quantize"] == "model.layers"
        and "modules_in_block_to_quantize" not in gptq
    )
    config = FORMATS["auto_round:auto_gptq"].config(plan)
    assert config["block_name_to_quantize"] == "model.layers" and list(config["extra_config"]) == [
        "lm_head"
    ]
    assert FORMATS["auto_awq"].config(plan)["modules_to_not_convert"] == ["lm_head"]


def test_a_tower_word_that_occurs_in_quantized_names_is_spelled_out() -> None:
    plan = Layout(
        {
            "model.decoder.layers.0.encoder_attn.q_proj": SYM,
            "model.decoder.layers.0.mlp.proj.fc": SYM,
        },
        ["model.encoder.layers.0.fc1", "model.proj.fc"],
        ["model.decoder.layers"],
        str,
        SYM,
    )
    skips = FORMATS["auto_awq"].config(plan)["modules_to_not_convert"]
    assert skips == ["model.encoder.", "encoder.", "model.proj."]
    assert set(FORMATS["auto_round"].config(plan)["extra_config"]) == {
        r".*encoder\..*",
        r".*model\.proj\..*",
    }


def test_a_kept_encoder_is_not_the_decoders_own() -> None:
    """Encoder-decoders of two models: the name of the kept one stands in the quantized one's."""
    quantized = [f"decoder.bert.encoder.layer.{i}.output.dense" for i in range(2)]
    kept = [f"encoder.encoder.layer.{i}.output.dense" for i in range(2)]
    plan = Layout(dict.fromkeys(quantized, SYM), kept, ["decoder.bert.encoder.layer"], str, SYM)
    for name in ("auto_round", "auto_gptq", "auto_awq", "compressed_tensors"):
        config, reads = FORMATS[name].config(plan), READERS[name][0]
        assert [n for n in (*quantized, *kept) if reads(config, n)] == quantized, name


def test_a_layer_of_one_list_is_not_that_of_another_in_gptq() -> None:
    """Encoder and decoder call their lists alike: what is said of one must not hold for both."""
    wide = Scheme(8, 32, True)
    names = [f"model.{part}.layers.{i}.fc1" for part in ("encoder", "decoder") for i in range(2)]
    quantized = {name: wide if name == "model.encoder.layers.1.fc1" else SYM for name in names[1:]}
    plan = Layout(quantized, names[:1], ["model.encoder.layers", "model.decoder.layers"], str, SYM)
    config = FORMATS["auto_gptq"].config(plan)
    out = [rule[2:] for rule in config["dynamic"] if rule.startswith("-:")]
    assert [n for n in names if any(re.match(rule, n) for rule in out)] == names[:1]
    for name, scheme in quantized.items():
        assert formats.scheme_of(config, name) == scheme, name


def test_mixed_schemes_are_stated_and_read_back() -> None:
    plan = layout(down_proj=Scheme(8, 64, True))
    for name in ("auto_round:auto_gptq", "auto_gptq"):
        config = FORMATS[name].config(plan)
        assert formats.from_config(config).name == name
        for module, scheme in plan.quantized.items():
            assert formats.scheme_of(config, stored(module)) == scheme, module
    with pytest.raises(UserError, match="mixed"):
        FORMATS["auto_awq"].config(plan)


def test_quantized_output_layer() -> None:
    plan = layout()
    plan = Layout(dict(plan.quantized) | {"lm_head": SYM}, TOWER, plan.blocks, stored, SYM)
    assert FORMATS["auto_round"].config(plan)["extra_config"]["lm_head"] == {
        "bits": 4,
        "data_type": "int",
    }
    gptq = FORMATS["auto_gptq"].config(plan)
    assert (
        gptq["lm_head"]
        and gptq["block_name_to_quantize"] == ""
        and gptq_transformers(gptq, "lm_head")
    )
    assert not gptq_transformers(gptq, TOWER[1])


def test_resolve_and_min_zero() -> None:
    assert formats.resolve("auto_round", [SYM]).name == "auto_round:auto_gptq"
    assert formats.resolve("auto_round", [ASYM]).name == "auto_round:auto_awq"
    assert formats.resolve("auto_round", [Scheme(3, 128, False)]).name == "auto_round"
    assert formats.resolve("auto_round", [SYM, ASYM]).name == "auto_round"
    assert formats.resolve("auto_gptq", [ASYM]).name == "auto_gptq"
    assert formats.resolve("compressed_tensors", [SYM, ASYM]).name == "compressed_tensors"
    assert (
        formats.resolve("compressed_tensors", [Scheme(8, -1, act_bits=8)]).name
        == "compressed_tensors:int8"
    )
    assert formats.fitted(["auto_round", "auto_awq"], ASYM).min_zero == 0
    assert formats.fitted(["auto_round", "auto_gptq"], ASYM).min_zero == 1


def test_a_format_says_what_it_does_not_hold() -> None:
    """Whatever the shape; codes that were tuned for another grid too."""
    said = {
        ("auto_gptq", ASYM): "stores no zero point below 1",
        ("gguf", Scheme(4, 32, False)): "stores scale * zero as one number",
        ("auto_gptq", Scheme(5)): "holds 2, 3, 4, 8 bits, not 5",
        ("auto_awq", Scheme(4, 48)): "has kernels for group sizes -1, 16, 32, 64, 128, not 48",
        ("mlx", Scheme(4, 32, False, scale_range=(0, 63))): "the grid of another format",
    }
    for (name, scheme), reason in said.items():
        assert reason in str(FORMATS[name].holds(scheme)), name
        if not scheme.sym and scheme.scale_range is None:
            assert FORMATS[name].holds(formats.fitted([name], scheme)) is None
    assert FORMATS["fake"].holds(Scheme(4, 32, False, scale_range=(0, 63))) is None
    assert all(FORMATS[name].holds(SYM) is None for name in ("auto_round", "auto_awq", "mlx"))


def test_every_format_declares_what_others_ask() -> None:
    for name, fmt in FORMATS.items():
        assert fmt.engines and {limit.engine for limit in fmt.limits} <= fmt.engines.keys(), name
        assert {"q", "scale", "zero"} <= {*fmt.parts.values()} or not fmt.parts, name
        assert fmt.method or name == "fake"
        if fmt.method:
            assert {*fmt.method.listed} <= fmt.method.form.keys(), name
            stated = {"quant_method": fmt.method.name, **{k: v[0] for k, v in fmt.told.items()}}
            root = name if name.startswith("auto_round") else name.partition(":")[0]
            assert formats.from_config(stated).name == root


@pytest.mark.parametrize(
    ("name", "scheme", "shape", "reason"),
    [
        ("auto_gptq", Scheme(5), (128, 128), "bits"),
        ("auto_gptq", Scheme(4, 96), (96, 96), "group sizes"),
        ("auto_gptq", Scheme(4, 128), (128, 164), "group size 128"),
        ("auto_gptq", Scheme(4, -1), (128, 100), "multiple of 32"),
        ("auto_round", Scheme(3, 32, False), (40, 64), "multiple of 32"),
        ("auto_round:auto_gptq", ASYM, (128, 128), "symmetric"),
        ("auto_awq", Scheme(3), (128, 128), "bits"),
        ("auto_awq", Scheme(4), (132, 128), "multiple of 8"),
        ("auto_awq", Scheme(4, 256), (128, 256), "group sizes"),
        ("auto_awq", Scheme(4, scale_dtype="bf16"), (128, 128), "fp16"),
        ("auto_round", Scheme(4, data_type="mx_fp"), (128, 128), "integers"),
        ("auto_round", Scheme(8, act_bits=8), (128, 128), "activations"),
        ("auto_round", Scheme(4, 0), (128, 128), "group size 0"),
        ("compressed_tensors", Scheme(4, 128), (128, 164), "group size 128"),
        ("compressed_tensors:int8", Scheme(8, 128, act_bits=8), (128, 128), "group size -1"),
        ("compressed_tensors:int8", Scheme(8, -1, False, act_bits=8), (128, 128), "symmetric"),
        ("compressed_tensors:int8", Scheme(6, -1, act_bits=8), (128, 128), "bits"),
        ("fake", Scheme(8, -1, act_bits=8), (128, 128), "activations"),
    ],
)
def test_check_refuses(name: str, scheme: Scheme, shape: tuple[int, int], reason: str) -> None:
    assert reason in str(FORMATS[name].check(scheme, *shape))


def test_check_accepts() -> None:
    assert all(
        FORMATS["auto_round"].check(Scheme(b, 32, s), 64, 64) is None
        for b in range(2, 9)
        for s in (True, False)
    )
    assert all(FORMATS["auto_gptq"].check(Scheme(b, -1), 32, 96) is None for b in (2, 3, 4, 8))
    assert FORMATS["auto_awq"].check(ASYM, 8, 128) is None
    odd = [
        Scheme(b, g, s, scale_dtype=d)
        for b in range(2, 9)
        for g, s, d in ((-1, True, "bf16"), (33, False, "fp32"))
    ]
    assert all(FORMATS["compressed_tensors"].check(scheme, 7, 99) is None for scheme in odd)
    assert FORMATS["compressed_tensors:int8"].check(Scheme(8, -1, act_bits=8), 7, 99) is None


def test_unknown_names_are_one_line_with_a_hint() -> None:
    with pytest.raises(UserError, match=r"did you mean auto_gptq\?"):
        formats.get("auto_gtpq")
    with pytest.raises(UserError, match="there are auto_round"):
        formats.get("zip")
    with pytest.raises(UserError, match="bitsandbytes"):
        formats.from_config({"quant_method": "bitsandbytes"})
    with pytest.raises(UserError, match="checkpoint_format 'gptq_v2', only 'gptq'"):
        formats.from_config({"quant_method": "gptq", "checkpoint_format": "gptq_v2"})


def test_layouts_that_share_a_method() -> None:
    """AutoAWQ names its layout by version, GPTQModel by checkpoint_format as well."""
    for keys in ({}, {"version": "GEMM"}, {"version": "gemm", "checkpoint_format": "gemm"}):
        assert formats.from_config({"quant_method": "awq", **keys}) is FORMATS["auto_awq"]
    with pytest.raises(UserError, match="version 'gemv', only 'gemm'"):
        formats.from_config({"quant_method": "awq", "version": "gemv"})


@pytest.mark.parametrize("method, layout_name", [("gptq", "gptq_v2"), ("awq", "gemv_fast")])
def test_a_layout_that_is_named_by_format_alone_is_not_read_as_another(
    method: str, layout_name: str
) -> None:
    """GPTQModel takes `checkpoint_format` for an older name of `format`. Its second layout of GPTQ
    has other zero points in the same shapes."""
    with pytest.raises(UserError, match=f"with format '{layout_name}', only"):
        formats.from_config({"quant_method": method, "format": layout_name})


def test_patterns_of_peers_are_read() -> None:
    """A rule of GPTQModel without a mark is one with +:, and AutoRound searches for every key that
    is no layer's name."""
    plan = layout(down_proj=Scheme(8, 64, True))
    gptq = FORMATS["auto_gptq"].config(plan)
    rules = {r"(?:.*\.)?layers\.\d+\.mlp\.down_proj$": {"bits": 8, "group_size": 64}}
    own = FORMATS["auto_round:auto_gptq"].config(plan)
    keys = {r"layers\.\d+\.mlp\.down_proj": {"bits": 8, "group_size": 64}}
    kept = {"-:.*lm_head$": {}}
    for config in (gptq | {"dynamic": kept | rules}, own | {"extra_config": keys}):
        for module, scheme in plan.quantized.items():
            assert formats.scheme_of(config, stored(module)) == scheme, module
    for config in (gptq | {"dynamic": {"(": {}}}, own | {"extra_config": {"(": {}}}):
        with pytest.raises(UserError, match="has not the form it must have"):
            formats.from_config(config)
