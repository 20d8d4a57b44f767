"""Mixtures of experts with thousands of modules: work grows with their number, not with its square.

Operations are counted, not seconds: comparisons of a pattern with a name, and files opened.
"""

import json
import re
import sys
from collections.abc import Callable

import pytest
import torch
from nearest import round_to_nearest
from safetensors import safe_open
from safetensors.torch import save_file

from auto_mmround import headers
from auto_mmround.checkpoint import reading
from auto_mmround.export import formats
from auto_mmround.export.layout import Layout
from auto_mmround.numerics import grids
from auto_mmround.recipe.patterns import Patterns
from auto_mmround.recipe.schemes import Scheme

BLOCKS = "model.language_model.layers"
W4, W3 = Scheme(4, 32), Scheme(3, 32)


def names(layers: int, experts: int) -> list[str]:
    return [
        f"{BLOCKS}.{layer}.{part}"
        for layer in range(layers)
        for part in [
            *(f"self_attn.{p}_proj" for p in "qkvo"),
            *(f"mlp.experts.{e}.{p}_proj" for e in range(experts) for p in ("gate", "up", "down")),
        ]
    ]


def layout(layers: int, experts: int) -> Layout:
    """Every second layer at 3 bits, half of the experts' down_proj too; a kept gate a layer."""
    made = {
        n: W3 if int(n.split(".")[3]) % 2 or ("down" in n and "experts" in n) else W4
        for n in names(layers, experts)
    }
    kept = [f"{BLOCKS}.{layer}.mlp.gate" for layer in range(layers)]
    return Layout(
        made, kept, [BLOCKS], lambda name: name.replace("model.language_model.", "model."), W4
    )


def calls(work: Callable[[], object]) -> int:
    """How many functions of Python and C the work calls: any loop over pairs that does something
    shows."""
    count = 0

    def see(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(see)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def grows_linearly(work: Callable[[int], Callable[[], object]]) -> bool:
    """Four times the layers, at most five times the calls."""
    small, large = calls(work(4)), calls(work(16))
    return large <= 5 * small


@pytest.mark.parametrize("name", ["compressed_tensors", "auto_round", "auto_gptq", "mlx"])
def test_configurations_are_written_in_linear_time(name):
    assert grows_linearly(lambda layers: lambda: formats.get(name).config(layout(layers, 80)))


@pytest.mark.parametrize("name", ["compressed_tensors", "auto_round", "auto_gptq", "mlx"])
def test_configurations_are_read_in_linear_time_and_say_what_was_written(name):
    def work(layers):
        made = layout(layers, 80)
        config, stored = (
            formats.get(name).config(made),
            [made.checkpoint_name(n) for n in made.quantized],
        )
        return lambda: formats.schemes_of(config, stored)

    assert grows_linearly(work)
    made = layout(4, 80)
    found = formats.schemes_of(
        formats.get(name).config(made), map(made.checkpoint_name, made.quantized)
    )
    assert {n: found[made.checkpoint_name(n)].bits for n in made.quantized} == {
        n: s.bits for n, s in made.quantized.items()
    }


@pytest.mark.parametrize("name", ["compressed_tensors", "auto_gptq"])
def test_patterns_fold_experts_and_layers_that_agree(name):
    assert len(json.dumps(formats.get(name).config(layout(16, 80)))) < 20_000


@pytest.mark.parametrize("head", [".*", "^", r"(.*\.)?", ""])
@pytest.mark.parametrize("escaped", [True, False])
def test_one_pattern_a_module_is_read_in_linear_time(head, escaped):
    def work(layers):
        all_ = names(layers, 80)
        rules = {f"+:{head}{re.escape(n) if escaped else n}$": {"bits": 3} for n in all_[::2]}
        config = {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 32,
            "sym": True,
            "dynamic": rules,
        }
        return lambda: formats.schemes_of(config, all_)

    assert grows_linearly(work)


PATTERNS = (
    r".*layers\.\d+\.mlp\.experts\.3\.up_proj$",
    r".*layers\.3\.mlp\.experts\.\d+\.down_proj$",
    r".*\d+\.up_proj$",
    r"(.*\.)?layers\.1\..*up_proj$",
    r".*\.q_proj$",
    r".*1\.self_attn\.q_proj$",
    r"model\.language_model\.layers\.2\.self_attn\.q_proj",
    r"(.*\.)?_proj$",
    r"(.*\.)?layers.3.self.attn.q_proj$",
    r".*.self_attn.q_proj$",
    r".*3.self_attn.q_proj$",
    r"model.language_model.layers.2.self_attn.k_proj$",
    r"^model\.language_model\.layers\.\d+\.self_attn\.k_proj$",
    r"(.*\.)?layers.\d+.self_attn.v_proj$",
    r".*\d\.self_attn.v_proj$",
    r".*(q|k)_proj$",
    "q_proj$",
)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_means_what_the_regular_expression_does(pattern):
    all_ = [*names(13, 13), "q_proj", "layers.3.self_attn.q_proj"]
    config = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "dynamic": {f"+:{pattern}": {"bits": 3}},
    }
    found = formats.schemes_of(config, all_)
    assert {n for n in all_ if found[n].bits == 3} == {n for n in all_ if re.match(pattern, n)}


def test_recipes_with_an_entry_a_weight_are_matched_in_linear_time():
    def work(layers):
        all_ = names(layers, 80)
        return lambda: [Patterns(all_)] and (lambda p: [p.of(n) for n in all_])(Patterns(all_))

    assert grows_linearly(work)
    patterns = Patterns(
        ["q_proj", "re:.*layers.1.*", f"{BLOCKS}.1.self_attn.q_proj", "Linear", "elf_attn"]
    )
    assert patterns.of(f"{BLOCKS}.1.self_attn.q_proj", ["Linear"]) == patterns.all[:4]


def test_decoding_opens_each_file_once(tmp_path, monkeypatch):
    codes = round_to_nearest(torch.randn(32, 32), 32, grids.Grid(4, True, min_zero=1))
    all_ = names(2, 4)
    config = formats.get("auto_gptq").config(Layout(dict.fromkeys(all_, W4), [], [BLOCKS], str, W4))
    tensors = {key: t for n in all_ for key, t in formats.get("auto_gptq").pack(n, codes).items()}
    save_file({key: t.clone() for key, t in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    opened = []
    monkeypatch.setattr(
        headers, "safe_open", lambda *given: opened.append(given[0]) or safe_open(*given)
    )
    assert len(dict(reading.dequantized_state_dict(tmp_path))) == len(all_)
    assert len(opened) == 2  # for the names, and for the tensors
