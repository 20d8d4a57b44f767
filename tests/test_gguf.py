"""GGUF: blocks, names of every architecture on tiny random models, our own reader; llama.cpp itself where installed."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tiny_gguf import CONFIGS, VOCABULARY, byte_level_tokenizer, export, source_tensors, tiny
from tokenizers import pre_tokenizers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from auto_mmround.errors import UserError
from auto_mmround.evaluation.loader import from_quantized
from auto_mmround.evaluation.verify import same_weights
from auto_mmround.export import formats, gguf_k, gguf_models, gguf_tokens, gguf_towers
from auto_mmround.export.checkpoint import dequantized_state_dict
from auto_mmround.export.gguf_types import TYPES, exact_type, pack, unpack
from auto_mmround.model.loading import load
from auto_mmround.numerics.grids import Codes, Grid, dequantize, round_to_nearest
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.recipe.schemes import Scheme
from auto_mmround.run import job as jobs

gguf = pytest.importorskip("gguf")

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".engines" / "llamacpp" / "bin" / "python"


@pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize(("bits", "group"), [(None, 32), (3, 64), (2, 128)])
def test_blocks_hold_codes_exactly(kind, bits, group):
    bits = bits or kind.bits
    w_OI = torch.randn(6, 256, generator=torch.Generator().manual_seed(1)) * torch.logspace(-4, 1, 6)[:, None]
    codes = round_to_nearest(w_OI, group, Grid(bits, kind.sym, scale_bits=None if kind.sym else 11 - bits))
    assert kind.sym is False or codes.scale_OG.min() < 0 < codes.scale_OG.max()  # both signs are tried
    blocks = pack(codes, kind)
    decoded = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind.name])
    np.testing.assert_array_equal(decoded, dequantize(codes).numpy())
    assert torch.equal(dequantize(unpack(blocks, kind)), dequantize(codes))


def test_lowest_and_highest_codes_reach_their_ends():
    for kind in TYPES.values():
        q_OI = torch.tensor([[0, 2**kind.bits - 1] * 16], dtype=torch.uint8)
        zero = torch.full((1, 1), 2 ** (kind.bits - 1) if kind.sym else 3, dtype=torch.uint8)
        codes = Codes(q_OI, torch.ones(1, 1, dtype=torch.float16), zero, kind.bits, 32, kind.sym)
        decoded = gguf.quants.dequantize(pack(codes, kind).numpy(), gguf.GGMLQuantizationType[kind.name])
        assert set(decoded.ravel()) == {-float(zero), 2**kind.bits - 1 - float(zero)}


def test_pack_refuses_what_it_cannot_hold():
    w_OI = torch.randn(2, 64)
    with pytest.raises(ValueError, match="does not hold 5 bits"):
        pack(round_to_nearest(w_OI, 32, Grid(5, True)), TYPES["Q4_0"])
    with pytest.raises(ValueError, match="asym"):
        pack(round_to_nearest(w_OI, 32, Grid(4, False)), TYPES["Q4_0"])
    with pytest.raises(ValueError, match="blocks of 32"):
        pack(round_to_nearest(w_OI, 16, Grid(4, True)), TYPES["Q4_0"])
    with pytest.raises(ValueError, match="float32"):
        pack(round_to_nearest(w_OI, 32, Grid(4, True, torch.float32)), TYPES["Q4_0"])
    with pytest.raises(ValueError, match="tune for this format"):
        pack(round_to_nearest(w_OI, 32, Grid(4, False)), TYPES["Q4_1"])


def test_the_smallest_exact_type_is_chosen():
    found = {(bits, sym): exact_type(bits, sym) for bits in range(2, 9) for sym in (True, False)}
    names = {key: kind.name if kind else None for key, kind in found.items()}
    assert [names[bits, True] for bits in range(2, 9)] == ["Q4_0"] * 3 + ["Q5_0"] + ["Q8_0"] * 3
    assert [names[bits, False] for bits in range(2, 9)] == ["Q4_1"] * 3 + ["Q5_1"] + [None] * 3


K_TYPES = gguf_k.SUPER_TYPES


@pytest.mark.parametrize("kind", K_TYPES.values(), ids=K_TYPES)
def test_super_blocks_decode_to_what_was_fitted(kind):
    """Rows of very different size, one of zeros, one without negative values; every integer is in its range."""
    w_OI = torch.randn(6, 512, generator=torch.Generator().manual_seed(2)) * torch.logspace(-3, 1, 6)[:, None]
    w_OI[1], w_OI[2] = 0, w_OI[2].abs()
    fitted = gguf_k.fit(w_OI, kind, *gguf_k.search(w_OI, kind))
    assert kind.low <= int(fitted.scale_OSG.min()) and int(fitted.scale_OSG.max()) <= kind.high
    assert int(fitted.min_OSG.min()) >= 0 and int(fitted.min_OSG.max()) <= kind.high
    blocks = gguf_k.pack(fitted, kind).numpy()
    decoded = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind.name])
    np.testing.assert_array_equal(decoded, gguf_k.decode(fitted, kind).numpy())


@pytest.mark.parametrize("kind", K_TYPES.values(), ids=K_TYPES)
def test_every_code_and_scale_finds_its_bits(kind):
    generator = torch.Generator().manual_seed(3)
    groups = gguf_k.SUPER // kind.group
    n = torch.randint(0, 2**kind.bits, (3, 2, groups, kind.group), generator=generator).to(torch.uint8)
    scale, minimum = (
        torch.randint(low, kind.high + 1, (3, 2, groups), generator=generator).to(torch.int16) for low in (kind.low, 0)
    )
    d = torch.full((3, 2), 0.5, dtype=torch.float16)
    drawn = gguf_k.Super(n, d, d / 2 if not kind.sym else d * 0, scale, minimum * (not kind.sym))
    decoded = gguf.quants.dequantize(gguf_k.pack(drawn, kind).numpy(), gguf.GGMLQuantizationType[kind.name])
    np.testing.assert_array_equal(decoded, gguf_k.decode(drawn, kind).numpy())


@pytest.mark.parametrize("kind", K_TYPES.values(), ids=K_TYPES)
def test_a_weight_on_the_super_grid_stays_and_others_come_close(kind):
    generator = torch.Generator().manual_seed(4)
    w_OI = torch.randn(8, 512, generator=generator)
    fitted = gguf_k.fit(w_OI, kind, *gguf_k.search(w_OI, kind))
    value_OI = gguf_k.decode(fitted, kind)
    plain_OI = dequantize(round_to_nearest(w_OI, kind.group, Grid(kind.bits, kind.sym)))
    error, plain = ((w - w_OI).square().mean() for w in (value_OI, plain_OI))
    assert error < plain  # even though its scales are coarser than float16 ones
    scale_OG, min_OG = (
        (x.float()[..., None] * k).flatten(1)
        for x, k in ((fitted.d_OS, fitted.scale_OSG), (fitted.dmin_OS, fitted.min_OSG))
    )
    again = gguf_k.decode(gguf_k.fit(value_OI, kind, scale_OG, min_OG), kind)
    assert (again - value_OI).square().mean() < 1e-3 * error
    importance_I = torch.rand(512, generator=generator).exp() ** 4
    weighted = gguf_k.fit(w_OI, kind, *gguf_k.search(w_OI, kind, importance_I), importance_I)
    weigh = [((gguf_k.decode(f, kind) - w_OI).square() * importance_I).sum() for f in (weighted, fitted)]
    assert weigh[0] < weigh[1]


def test_check_names_the_flags_that_help():
    named, plain = formats.FORMATS["gguf:q4_1"].check, formats.FORMATS["gguf"].check
    assert named(Scheme(4, 32, False), 64, 64) is None
    assert "--bits 4 --group_size 32 --asym" in named(Scheme(4, 128, True), 64, 128)
    assert plain(Scheme(4, 128, True), 64, 128) is None and plain(Scheme(3, -1, False), 64, 96) is None
    assert "no multiple" in plain(Scheme(4, 16, True), 64, 64)
    assert "no multiple" in plain(Scheme(4, -1, True), 64, 48)
    assert "asymmetric 8 bits" in plain(Scheme(8, 32, False), 64, 64)


def test_the_tuner_knows_how_precise_scales_may_be():
    assert formats.scale_bits(["auto_round", "gguf:q4_1"], Scheme(4, 32, False)) == 7
    assert formats.scale_bits(["auto_round"], Scheme(4, 32, False)) is None
    assert formats.scale_bits(["gguf"], Scheme(4, 32, True)) is None


@pytest.mark.parametrize("case", CONFIGS)
def test_every_tensor_has_one_place_and_comes_back(case, tmp_path):
    source = tiny(case, tmp_path / "source")
    wanted = source_tensors(source)
    out = export(source, tmp_path / "out", quantize=False)
    found = list(dequantized_state_dict(out))
    assert sorted(key for key, _ in found) == sorted(wanted)
    for key, tensor in found:
        assert torch.allclose(tensor, wanted[key], rtol=0, atol=1e-6 if "norm" in key else 0), key
    check = formats.FORMATS["gguf"].check_model
    assert check is not None
    check(json.loads((source / "config.json").read_text()), wanted, source)


@pytest.mark.parametrize("case", CONFIGS)
def test_names_are_those_of_the_gguf_package(case):
    model_type = case.partition(",")[0]
    config = CONFIG_MAPPING[model_type].from_dict(CONFIGS[case])
    text = config.get_text_config()
    arch = gguf.MODEL_ARCH[gguf_models.architecture(text).name.upper()]
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[arch]}
    used = {t for rule in gguf_models.text_part(model_type, text).rules.values() for t in rule.targets}
    optional = {"blk.{}.attn_q_norm", "blk.{}.attn_k_norm", "output"}  # not every architecture has them
    assert {name.replace("{}", "{bid}") for name in used - optional} <= known
    keys = {value.replace("{arch}", gguf.MODEL_ARCH_NAMES[arch]) for value in _strings(gguf.Keys)}
    assert set(gguf_models.text_metadata(config, text)) <= keys
    tower = gguf_towers.tower_part(model_type, config)
    if tower:
        every = {name.replace("{bid}", "{}") for name in gguf.TENSOR_NAMES.values()}
        stems = {_stem(t) for rule in tower.rules.values() for t in rule.targets}
        assert {stem for stem in stems if not stem.startswith("v.unused.")} <= every
        facts = gguf_towers.tower_metadata(model_type, config, {})
        assert set(facts) <= keys and facts["clip.projector_type"] in (_strings(gguf.VisionProjectorType) | {"mlp"})


def _strings(space) -> set[str]:
    values = [value for name, value in vars(space).items() if not name.startswith("__")]
    nested = [_strings(value) for value in values if isinstance(value, type)]
    return {value for value in values if isinstance(value, str)}.union(*nested)


def _stem(target: str) -> str:
    stem = target.removesuffix(".weight.1").removesuffix(".weight").removesuffix(".bias")
    parts = ["{}" if part.isdigit() else part for part in stem.split(".")]
    return ".".join(parts)


def test_what_llamacpp_computes_otherwise_is_refused():
    def refused(model_type: str, match: str, **changes) -> None:
        config = CONFIG_MAPPING[model_type].from_dict({**CONFIGS[model_type], **changes})
        with pytest.raises(UserError, match=match):
            gguf_models.architecture(config)

    refused("llama", "computes silu, not gelu", hidden_act="gelu")
    refused("qwen2", "rope type yarn", rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
                                                        "original_max_position_embeddings": 128})  # fmt: skip
    refused("gemma3_text", "head size", query_pre_attn_scalar=100)
    refused("gemma3_text", "sliding windows", layer_types=["full_attention"] * 7)
    with pytest.raises(UserError, match="no table for gpt2"):
        gguf_models.architecture(transformers.GPT2Config())


def test_unknown_tensors_and_tokenizers_are_refused_before_any_work(tmp_path):
    source = tiny("qwen2", tmp_path / "source")
    check = formats.FORMATS["gguf"].check_model
    assert check is not None
    config = json.loads((source / "config.json").read_text())
    with pytest.raises(UserError, match=r"no place for the tensor layers\.0\.adapter\.weight"):
        check(config, ["model.layers.0.adapter.weight"], source)
    with pytest.raises(UserError, match="no part of the model"):
        check(config, ["mtp.fc.weight"], source)
    tokenizer = byte_level_tokenizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(source / "tokenizer.json"))
    with pytest.raises(UserError, match="type Whitespace"):
        check(config, [], source)
    (source / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        check(config, [], source)


def test_merges_become_scores_only_in_sentencepiece_order():
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁th", "e")]
    tokens = ["▁the", "the", "th", "t"]
    assert gguf_tokens._scores(tokens, merges) == [-2.0, -1.0, 0.0, -3.0]
    with pytest.raises(UserError, match="no SentencePiece order"):
        gguf_tokens._scores(tokens, [*merges, ("t", "h")])


def test_the_vocabulary_has_a_token_for_every_row(tmp_path):
    tiny("gemma3_text", tmp_path)
    facts = gguf_tokens.metadata(tmp_path, VOCABULARY)
    kinds = facts["tokenizer.ggml.token_type"]
    assert len(facts["tokenizer.ggml.tokens"]) == len(kinds) == len(facts["tokenizer.ggml.scores"]) == VOCABULARY
    assert kinds[0] == gguf.TokenType.CONTROL and kinds[3] == gguf.TokenType.UNKNOWN
    assert kinds[4] == gguf.TokenType.BYTE and kinds[-1] == gguf.TokenType.UNUSED
    assert len(set(facts["tokenizer.ggml.tokens"])) == VOCABULARY
    assert len(gguf_tokens.metadata(tmp_path, 100)["tokenizer.ggml.tokens"]) == 100


@pytest.mark.parametrize(("fmt", "bits", "sym"), [("gguf:q4_0", 4, True), ("gguf:q4_1", 4, False), ("gguf", 3, True)])
def test_journey_of_the_demo_model(tmp_path, fmt, bits, sym):
    """Exported = tuned, to the bit: the closed form moves the scales, and the file holds what it found."""
    recipe = Recipe(model="demo", dataset="demo", bits=bits, group_size=32, sym=sym, format=fmt, nsamples=4, iters=1,
                    output_dir=str(tmp_path), device="cpu", batch_size=4, fisher=False)  # fmt: skip
    loaded = load("demo")
    folder = jobs.run(jobs.prepare(recipe, loaded))[0]
    tuned = {
        name: loaded.model.get_parameter(f"{name}.weight") for name in jobs.make_plan(loaded.model, recipe).quantized
    }
    assert tuned and same_weights(folder, {f"{name}.weight": w for name, w in tuned.items()}) == []
    config = json.loads((folder / "config.json").read_text())
    assert sorted(config["quantization_config"]["files"]) == sorted(p.name for p in folder.glob("*.gguf"))
    kept = from_quantized(folder).model.state_dict()
    for name, tensor in load("demo").model.state_dict().items():
        if name.removesuffix(".weight") not in tuned:
            assert torch.equal(kept[name], tensor), name


def test_k_types_say_how_far_the_weights_moved(tmp_path, caplog):
    recipe = Recipe(model="demo", bits=4, group_size=32, sym=False, iters=0, format="gguf:q4_k", device="cpu",
                    output_dir=str(tmp_path))  # fmt: skip
    loaded = load("demo")
    folder = jobs.run(jobs.prepare(recipe, loaded))[0]
    share = float(re.search(r"moved by ([\d.]+)%", caplog.text)[1])
    assert 0 < share < 20
    name = "model.language_model.layers.0.mlp.down_proj.weight"
    found, tuned = from_quantized(folder).model.state_dict()[name], loaded.model.state_dict()[name]
    assert 0 < (found - tuned).float().norm() < 0.05 * tuned.float().norm()


def test_a_wrong_scheme_is_one_line_with_the_flags(tmp_path):
    recipe = Recipe(model="demo", iters=0, format="gguf:q4_0", output_dir=str(tmp_path), device="cpu")
    with pytest.raises(UserError, match=r"--bits 4 --group_size 32$"):
        jobs.prepare(recipe, load("demo"))


def test_damaged_folders_are_named(tmp_path):
    out = export(tiny("qwen2_vl", tmp_path / "source"), tmp_path / "out", quantize=True)
    (out / "mmproj-model.gguf").unlink()
    with pytest.raises(UserError, match="lacks mmproj-model"):
        list(dequantized_state_dict(out))
