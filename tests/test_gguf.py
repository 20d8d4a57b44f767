"""GGUF: blocks, names of every architecture on tiny random models, our own reader; llama.cpp itself
where installed."""

import json
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from asking import same_weights
from nearest import round_to_nearest
from tiny_gguf import CONFIGS, VOCABULARY, byte_level_tokenizer, export, source_tensors, tiny
from tokenizers import pre_tokenizers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from auto_mmround.checkpoint.loader import from_quantized
from auto_mmround.checkpoint.reading import dequantized_state_dict
from auto_mmround.errors import UserError
from auto_mmround.export import formats
from auto_mmround.export.gguf import k as gguf_k
from auto_mmround.export.gguf import models as gguf_models
from auto_mmround.export.gguf import read as gguf_read
from auto_mmround.export.gguf import tokens as gguf_tokens
from auto_mmround.export.gguf import towers as gguf_towers
from auto_mmround.export.gguf.types import TYPES, exact_type, pack, unpack
from auto_mmround.model.loading import load
from auto_mmround.numerics import super_grids
from auto_mmround.numerics.grids import SUPER, Codes, Grid, dequantize
from auto_mmround.numerics.moments import Moments
from auto_mmround.numerics.rounding import Rounding
from auto_mmround.numerics.start import StartConfig, closed_form
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.recipe.schemes import Scheme
from auto_mmround.run import job as jobs
from auto_mmround.run.finished import Finished
from auto_mmround.run.pipeline import quantize
from auto_mmround.run.record import checksum, codes_record
from auto_mmround.verify.static import check
from auto_mmround.verify.values import _tuned_so

gguf = pytest.importorskip("gguf")

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".engines" / "llamacpp" / "bin" / "python"


@pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize(("bits", "group"), [(None, 32), (3, 64), (2, 128)])
def test_blocks_hold_codes_exactly(kind, bits, group):
    bits = bits or kind.bits
    w_OI = (
        torch.randn(6, 256, generator=torch.Generator().manual_seed(1))
        * torch.logspace(-4, 1, 6)[:, None]
    )
    codes = round_to_nearest(
        w_OI, group, Grid(bits, kind.sym, scale_bits=None if kind.sym else 11 - bits)
    )
    # both signs are tried
    assert kind.sym is False or codes.scale_OG.min() < 0 < codes.scale_OG.max()
    blocks = pack(codes, kind)
    decoded = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind.name])
    np.testing.assert_array_equal(decoded, dequantize(codes).numpy())
    assert torch.equal(dequantize(unpack(blocks, kind)), dequantize(codes))


def test_lowest_and_highest_codes_reach_their_ends():
    for kind in TYPES.values():
        q_OI = torch.tensor([[0, 2**kind.bits - 1] * 16], dtype=torch.uint8)
        zero = torch.full((1, 1), 2 ** (kind.bits - 1) if kind.sym else 3, dtype=torch.uint8)
        codes = Codes(q_OI, torch.ones(1, 1, dtype=torch.float16), zero, kind.bits, 32, kind.sym)
        decoded = gguf.quants.dequantize(
            pack(codes, kind).numpy(), gguf.GGMLQuantizationType[kind.name]
        )
        assert set(decoded.ravel()) == {-float(zero), 2**kind.bits - 1 - float(zero)}


def test_a_scale_below_zero_is_no_difference():
    """Zeros of such a group are -0.0 by scale * (q - zero), and 0.0 by d * n + m. A model of 1.5
    billion weights had one such group, and its file was called wrong."""
    q_OI = torch.arange(64, dtype=torch.uint8).reshape(2, 32) % 16
    zero_OG = torch.zeros(2, 1, dtype=torch.uint8)
    scale_OG = torch.tensor([[-0.25], [0.5]]).half()
    codes = Codes(q_OI, scale_OG, zero_OG, 4, 32, False)
    blocks = pack(codes, TYPES["Q4_1"])
    read = torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType.Q4_1))
    decoded = dequantize(codes)
    assert torch.equal(read, decoded) and checksum(read) != checksum(decoded)
    for wanted in (codes_record(codes, decoded=True)["weight"], checksum(decoded)):
        assert _tuned_so(decoded, wanted)
    assert _tuned_so(read, codes_record(codes, decoded=True)["weight"])
    assert not _tuned_so(read + 1, codes_record(codes, decoded=True)["weight"])


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


def as_llamacpp(codes, kind) -> np.ndarray:
    """What the package `gguf` decodes, as bits: minus zero and zero differ."""
    decoded = gguf.quants.dequantize(
        gguf_k.pack(codes, kind).numpy(), gguf.GGMLQuantizationType[kind.name]
    )
    return decoded.view(np.uint32)


@pytest.mark.parametrize("kind", K_TYPES.values(), ids=K_TYPES)
def test_tuned_super_blocks_are_stored_bit_for_bit(kind):
    """Rows of very different size, one of zeros, one without negative values; from the first
    rounding, through the closed form, to sign steps that move scales, minima and codes."""
    generator = torch.Generator().manual_seed(2)
    w_OI = torch.randn(6, 512, generator=generator) * torch.logspace(-5, 1, 6)[:, None]
    w_OI[1], w_OI[2] = 0, w_OI[2].abs()
    x_TI = torch.randn(900, 512, generator=generator) * torch.rand(512, generator=generator)
    moments, rounding, seen = Moments(512), Rounding(w_OI, kind.group, kind.grid), []
    moments.add(x_TI)
    for stage in range(3):
        if stage == 1:
            closed_form([rounding], moments, StartConfig())
        for _ in range(5 * (stage == 2)):
            rounding.step(torch.randn(6, 512, generator=generator), 0.05, 0.05, torch.empty(6, 512))
        codes = rounding.codes()
        assert torch.equal(dequantize(codes), rounding.weight())
        np.testing.assert_array_equal(
            as_llamacpp(codes, kind), rounding.weight().numpy().view(np.uint32)
        )
        seen.append(codes)
    parts = ("q_OI", "scale_OG") if kind.sym else ("q_OI", "scale_OG", "min_OG")
    for before, after in pairwise(seen):
        assert not any(torch.equal(getattr(before, part), getattr(after, part)) for part in parts)
    assert torch.equal(seen[1].unit_OS2, seen[2].unit_OS2)  # units stay while the signs step


@pytest.mark.parametrize("kind", K_TYPES.values(), ids=K_TYPES)
def test_every_code_and_scale_finds_its_bits(kind):
    generator = torch.Generator().manual_seed(3)
    groups = 2 * SUPER // kind.group
    q_OI = torch.randint(0, 2**kind.bits, (3, 2 * SUPER), generator=generator).to(torch.uint8)
    scale, minimum = (
        torch.randint(low, kind.high + 1, (3, groups), generator=generator).float()
        for low in (kind.low, 0)
    )
    unit = torch.tensor([0.5, 0.25], dtype=torch.float16).expand(3, 2, 2)
    zero = torch.full(scale.shape, 2 ** (kind.bits - 1) if kind.sym else 0, dtype=torch.uint8)
    own = None if kind.sym else minimum / 4
    drawn = Codes(q_OI, scale / 2, zero, kind.bits, kind.group, kind.sym, min_OG=own, unit_OS2=unit)
    np.testing.assert_array_equal(
        as_llamacpp(drawn, kind).view(np.float32), dequantize(drawn).numpy()
    )
    with pytest.raises(ValueError, match="no integers"):
        gguf_k.pack(drawn._replace(scale_OG=drawn.scale_OG + 0.25), kind)
    with pytest.raises(ValueError, match="no integers"):
        gguf_k.pack(drawn._replace(scale_OG=drawn.scale_OG * 0 + 0.5 * (kind.high + 1)), kind)
    with pytest.raises(ValueError, match="without units"):
        gguf_k.pack(drawn._replace(unit_OS2=None), kind)


@pytest.mark.parametrize("kind", K_TYPES.values(), ids=K_TYPES)
def test_a_weight_on_the_super_grid_stays_and_others_come_close(kind):
    generator = torch.Generator().manual_seed(4)
    w_OI = torch.randn(8, 512, generator=generator)
    rounded = Rounding(w_OI, kind.group, kind.grid).codes()
    value_OI = dequantize(rounded)
    plain = round_to_nearest(w_OI, kind.group, Grid(kind.bits, kind.sym))
    error = (value_OI - w_OI).square().mean()
    # even though its scales are coarser than float16 ones
    assert error < (dequantize(plain) - w_OI).square().mean()
    fitted, moved = gguf_k.onto(plain, kind)
    assert 0 < moved < 0.2 and not torch.equal(dequantize(fitted), dequantize(plain))
    np.testing.assert_array_equal(
        as_llamacpp(fitted, kind), dequantize(fitted).numpy().view(np.uint32)
    )
    w_OGg, value_OGg = (x_OI.unflatten(1, (-1, kind.group)) for x_OI in (w_OI, value_OI))
    importance_Gg = torch.rand(512, generator=generator).exp().pow(4).unflatten(0, (-1, kind.group))
    min_OG, ones_Gg = (
        torch.zeros_like(rounded.scale_OG) if kind.sym else rounded.min_OG,
        torch.ones_like(importance_Gg),
    )
    again = super_grids.fit(value_OGg, ones_Gg, kind.grid, rounded.scale_OG, min_OG)
    assert (
        super_grids._measure(value_OGg, ones_Gg, again, kind.grid)[1].sum()
        < 0.02 * error * w_OI.numel()
    )
    for weight_Gg in (importance_Gg, ones_Gg):
        found = super_grids.search(w_OGg, weight_Gg, kind.grid)
        other = super_grids.search(
            w_OGg, importance_Gg * (weight_Gg == 1) + (weight_Gg != 1), kind.grid
        )
        errors = [
            super_grids._measure(w_OGg, weight_Gg, each, kind.grid)[1].sum()
            for each in (found, other)
        ]
        assert errors[0] < errors[1]  # each is the better one by its own measure


def test_check_names_the_flags_that_help():
    named, plain = formats.FORMATS["gguf:q4_1"].check, formats.FORMATS["gguf"].check
    assert named(Scheme(4, 32, False), 64, 64) is None
    assert "--bits 4 --group_size 32 --asym" in named(Scheme(4, 128, True), 64, 128)
    assert (
        plain(Scheme(4, 128, True), 64, 128) is None and plain(Scheme(3, -1, False), 64, 96) is None
    )
    assert "no multiple" in plain(Scheme(4, 16, True), 64, 64)
    assert "no multiple" in plain(Scheme(4, -1, True), 64, 48)
    assert "asymmetric 8 bits" in plain(Scheme(8, 32, False), 64, 64)


def test_the_tuner_knows_how_precise_scales_may_be():
    asym = Scheme(4, 32, False)
    assert formats.fitted(["auto_round", "gguf:q4_1"], asym).scale_bits == 7
    assert formats.fitted(["auto_round"], asym).scale_bits is None
    assert formats.fitted(["gguf"], Scheme(4, 32, True)).scale_bits is None
    for names, wanted in (
        (["gguf:q4_k"], (0, 63)),
        (["fake", "gguf:q4_k"], (0, 63)),
        (["gguf:q4_k", "auto_round"], None),
        (["gguf:q4_0"], None),
    ):
        assert formats.fitted(names, asym).scale_range == wanted


@pytest.mark.parametrize("case", CONFIGS)
def test_every_tensor_has_one_place_and_comes_back(case, tmp_path):
    source = tiny(case, tmp_path / "source")
    wanted = source_tensors(source)
    out = export(source, tmp_path / "out", quantize=False)
    found = list(dequantized_state_dict(out))
    assert sorted(key for key, _ in found) == sorted(wanted)
    for key, tensor in found:
        assert torch.allclose(tensor, wanted[key], rtol=0, atol=1e-6 if "norm" in key else 0), key
    check_model = formats.FORMATS["gguf"].check_model
    assert check_model is not None
    check_model(json.loads((source / "config.json").read_text()), wanted, source)


def test_tensors_are_decoded_one_by_one_when_they_are_asked_for(tmp_path, monkeypatch):
    """The proof asks block by block: what comes earlier in the file must not wait in memory."""
    out = export(tiny("qwen2_vl", tmp_path / "source"), tmp_path / "out", quantize=True)
    decoded, decode = [], gguf_read._decode
    monkeypatch.setattr(
        gguf_read, "_decode", lambda part: decoded.append(part.name) or decode(part)
    )
    tensors = gguf_read.read(out)
    assert len(tensors) > 20 and not decoded
    assert tensors["model.layers.1.mlp.down_proj.weight"].ndim == 2
    assert decoded == ["blk.1.ffn_down.weight"]


@pytest.mark.parametrize("case", CONFIGS)
def test_names_are_those_of_the_gguf_package(case):
    model_type = case.partition(",")[0]
    config = CONFIG_MAPPING[model_type].from_dict(CONFIGS[case])
    text = config.get_text_config()
    arch = gguf.MODEL_ARCH[gguf_models.architecture(text).name.upper()]
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[arch]}
    used = {
        t for rule in gguf_models.text_part(model_type, text).rules.values() for t in rule.targets
    }
    # not every architecture has them
    optional = {"blk.{}.attn_q_norm", "blk.{}.attn_k_norm", "output"}
    assert {name.replace("{}", "{bid}") for name in used - optional} <= known
    keys = {value.replace("{arch}", gguf.MODEL_ARCH_NAMES[arch]) for value in _strings(gguf.Keys)}
    assert set(gguf_models.text_metadata(config, text)) <= keys
    tower = gguf_towers.tower_part(model_type, config)
    if tower:
        every = {name.replace("{bid}", "{}") for name in gguf.TENSOR_NAMES.values()}
        stems = {_stem(t) for rule in tower.rules.values() for t in rule.targets}
        assert {stem for stem in stems if not stem.startswith("v.unused.")} <= every
        facts = gguf_towers.tower_metadata(model_type, config, {})
        assert set(facts) <= keys and facts["clip.projector_type"] in (
            _strings(gguf.VisionProjectorType) | {"mlp"}
        )


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
    refused(
        "qwen2",
        "rope type yarn",
        rope_parameters={
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 1e4,
            "original_max_position_embeddings": 128,
        },
    )
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
    assert (
        len(facts["tokenizer.ggml.tokens"])
        == len(kinds)
        == len(facts["tokenizer.ggml.scores"])
        == VOCABULARY
    )
    assert kinds[0] == gguf.TokenType.CONTROL and kinds[3] == gguf.TokenType.UNKNOWN
    assert kinds[4] == gguf.TokenType.BYTE and kinds[-1] == gguf.TokenType.UNUSED
    assert len(set(facts["tokenizer.ggml.tokens"])) == VOCABULARY
    assert len(gguf_tokens.metadata(tmp_path, 100)["tokenizer.ggml.tokens"]) == 100


@pytest.mark.parametrize(
    ("fmt", "bits", "sym"), [("gguf:q4_0", 4, True), ("gguf:q4_1", 4, False), ("gguf", 3, True)]
)
def test_journey_of_the_demo_model(tmp_path, fmt, bits, sym):
    """Exported = tuned, to the bit: the closed form moves the scales, and the file holds what it
    found."""
    recipe = Recipe(model="demo", dataset="demo", bits=bits, group_size=32, sym=sym, format=fmt,
        nsamples=4, iters=1,
                    output_dir=str(tmp_path), device="cpu", batch_size=4, fisher=False)  # fmt: skip
    loaded = load("demo")
    folder = jobs.run(jobs.prepare(recipe, loaded))[0]
    tuned = {
        name: loaded.model.get_parameter(f"{name}.weight")
        for name in jobs.make_plan(loaded.model, recipe).quantized
    }
    assert tuned and same_weights(folder, {f"{name}.weight": w for name, w in tuned.items()}) == []
    config = json.loads((folder / "config.json").read_text())
    assert sorted(config["quantization_config"]["files"]) == sorted(
        p.name for p in folder.glob("*.gguf")
    )
    kept = from_quantized(folder).model.state_dict()
    for name, tensor in load("demo").model.state_dict().items():
        if name.removesuffix(".weight") not in tuned:
            assert torch.equal(kept[name], tensor), name


@pytest.mark.parametrize("algorithm", ["auto", "rtn", "sign_round"])
@pytest.mark.parametrize("kind", K_TYPES.values(), ids=K_TYPES)
def test_k_types_export_what_was_tuned(tmp_path, caplog, kind, algorithm):
    """To the bit: decoded by the package `gguf`, by our reader, and by the checksums of float32
    values in run.json."""
    recipe = Recipe(model="demo", dataset="demo", bits=kind.bits, group_size=kind.group,
        sym=kind.sym, nsamples=4,
                    iters=1, format=f"gguf:{kind.name.lower()}", output_dir=str(tmp_path),
                    device="cpu", batch_size=4,
                    fisher=False, algorithm=algorithm)  # fmt: skip
    job = jobs.prepare(recipe, load("demo"))
    assert {scheme.scale_range for scheme in job.plan.quantized.values()} == {(kind.low, kind.high)}
    (folder,) = jobs.run(job)
    tuned = {
        f"{name}.weight": job.loaded.model.get_parameter(f"{name}.weight")
        for name in job.plan.quantized
    }
    assert len(tuned) == 35 and same_weights(folder, tuned) == [] and "moved" not in caplog.text
    written = json.loads((folder / "run.json").read_text())["codes"]
    assert len(written) == 35 and all("weight" in record for record in written.values())
    assert [finding for finding in check(folder) if finding.severity == "error"] == []
    stored = {
        tensor.name: tensor for tensor in gguf.GGUFReader(next(folder.glob("model-*.gguf"))).tensors
    }
    down = stored["blk.0.ffn_down.weight"]
    decoded = torch.from_numpy(gguf.quants.dequantize(down.data, down.tensor_type))
    assert down.tensor_type.name == kind.name
    assert torch.equal(
        decoded.bfloat16(), tuned["model.language_model.layers.0.mlp.down_proj.weight"]
    )
    changed = bytearray(next(folder.glob("model-*.gguf")).read_bytes())
    changed[down.data_offset + 20] ^= 1
    next(folder.glob("model-*.gguf")).write_bytes(changed)
    assert [f.where for f in check(folder) if f.severity == "error"] == [
        "model.layers.0.mlp.down_proj.weight",
        next(folder.glob("model-*.gguf")).name,
    ]


def test_beside_another_format_k_types_are_fitted_and_say_how_far(tmp_path, caplog):
    recipe = Recipe(model="demo", bits=4, group_size=32, sym=False, iters=0,
        format="gguf:q4_k,auto_round",
                    device="cpu", output_dir=str(tmp_path))  # fmt: skip
    loaded = load("demo")
    folder = jobs.run(jobs.prepare(recipe, loaded))[0]
    share = float(re.search(r"moved by ([\d.]+)%", caplog.text)[1])
    assert 0 < share < 20
    name = "model.language_model.layers.0.mlp.down_proj.weight"
    found, tuned = from_quantized(folder).model.state_dict()[name], loaded.model.state_dict()[name]
    assert 0 < (found - tuned).float().norm() < 0.05 * tuned.float().norm()


def test_what_was_tuned_on_super_blocks_goes_nowhere_else(tmp_path):
    recipe = Recipe(
        model="demo", bits=4, group_size=32, sym=False, iters=0, format="gguf:q4_k", device="cpu"
    )
    with pytest.raises(UserError, match="polish tunes scales, which gguf:q4_k"):
        jobs.prepare(replace(recipe, polish=True), load("demo"))
    job, finished = jobs.prepare(recipe, load("demo")), Finished()
    quantize(job.loaded.model, job.recipe, job.plan, job.inputs, finished)
    with pytest.raises(UserError, match="tuned on the grid of another format"):
        jobs.save(job, finished, tmp_path / "out", "auto_round")
    assert jobs.save(job, finished, tmp_path / "out", "gguf:q4_k").is_dir()


def test_a_wrong_scheme_is_one_line_with_the_flags(tmp_path):
    recipe = Recipe(
        model="demo", iters=0, format="gguf:q4_0", output_dir=str(tmp_path), device="cpu"
    )
    with pytest.raises(UserError, match=r"--bits 4 --group_size 32$"):
        jobs.prepare(recipe, load("demo"))


def test_damaged_folders_are_named(tmp_path):
    out = export(tiny("qwen2_vl", tmp_path / "source"), tmp_path / "out", quantize=True)
    (out / "mmproj-model.gguf").unlink()
    with pytest.raises(UserError, match="lacks mmproj-model"):
        list(dequantized_state_dict(out))


@pytest.fixture
def foreign(tmp_path):
    """A folder without a record of ours, and its GGUF file."""
    out = export(tiny("llama", tmp_path / "source"), tmp_path / "out", quantize=True)
    (path,) = out.glob("*.gguf")
    return out, path


def rewritten(path: Path, leave_out: str = "", **options) -> None:
    """The same file by the package `gguf`, with other options."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_suffix(".new"), "llama", **options)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind, inner = field.types[0], field.types[-1]
            array = inner if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, array)
    for tensor in reader.tensors:
        if tensor.name != leave_out:
            writer.add_tensor(tensor.name, tensor.data.copy(), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".new").replace(path)


def names_files(folder: Path, *files: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["files"] = list(files)
    (folder / "config.json").write_text(json.dumps(config))


def test_a_file_that_is_written_anew_is_right(foreign):
    folder, path = foreign
    rewritten(path)
    assert [f for f in check(folder) if f.severity == "error"] == []


def test_big_endian_files_are_refused(foreign):
    """Their blocks decoded to other numbers without a word."""
    folder, path = foreign
    rewritten(path, endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(UserError, match="it is big-endian"):
        from_quantized(folder)
    assert any("big-endian" in finding.message for finding in check(folder))


def test_two_files_with_one_tensor_are_refused(foreign):
    folder, path = foreign
    shutil.copy(path, folder / "other.gguf")
    names_files(folder, path.name, "other.gguf")
    with pytest.raises(UserError, match=r"other.gguf holds .*, which another file holds, too"):
        from_quantized(folder)


@pytest.mark.parametrize("lost", ["one", "all"])
def test_lost_tensors_are_found_without_a_record(lost, foreign):
    folder, path = foreign
    if lost == "one":
        rewritten(path, leave_out="output_norm.weight")
    else:
        names_files(folder)
    found = [finding for finding in check(folder) if finding.severity == "error"]
    wanted = "model.norm.weight" if lost == "one" else "model.embed_tokens.weight"
    assert any(f.where == wanted and "no tensor fills it" in f.message for f in found), found
