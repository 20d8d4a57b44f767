"""Equalization: scales, the pairs they may go through, and what reaches the checkpoint."""

import json
from dataclasses import replace

import pytest
import torch
from nearest import round_to_nearest
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, WhisperConfig, WhisperModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from auto_mmround.checkpoint.loader import from_quantized
from auto_mmround.errors import UserError
from auto_mmround.evaluate.held_out import held_out
from auto_mmround.evaluate.metrics import measure
from auto_mmround.modalities import IMAGE, TEXT
from auto_mmround.model.capture import capture
from auto_mmround.model.chains import Call, difference
from auto_mmround.model.loading import DEMO, load
from auto_mmround.model.pairs import Pair, gain_offset, linear_pairs, norm_pairs, rescale
from auto_mmround.model.structure import Stage
from auto_mmround.numerics import equalize as numerics
from auto_mmround.numerics import grids
from auto_mmround.numerics.moments import output_error
from auto_mmround.recipe.files import read
from auto_mmround.recipe.recipe import Recipe, from_mapping
from auto_mmround.run import job as jobs
from auto_mmround.run.equalize import _Statistics
from auto_mmround.run.session import Session

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "head_dim": 8,
    "vocab_size": 64, "num_key_value_heads": 4,
}  # fmt: skip
FAST = Recipe(model="demo", dataset="demo", algorithm="rtn", nsamples=8, seqlen=64, device="cpu")


# --------------------------------------------------------------------------------------------------
# the numbers


def test_a_channel_counts_by_the_modality_in_which_it_stands_out():
    quiet, loud = torch.tensor([1.0, 1.0, 1.0, 5.0]), torch.tensor([400.0, 100.0, 100.0, 100.0])
    worst = numerics.worst_modality(torch.stack([quiet, loud]))
    pooled = torch.maximum(quiet, loud)
    assert worst[3] > 2 * worst[1] and pooled[3] == pooled[1]
    assert torch.equal(numerics.worst_modality(torch.stack([quiet, torch.zeros(4)])), quiet)


def test_smoothquant_is_the_published_quotient_up_to_a_factor():
    act, weight = torch.rand(1, 16) + 0.1, torch.randn(8, 16)
    wanted = act[0] ** 0.8 / weight.abs().amax(0) ** 0.2
    got = numerics.smoothquant(act, [weight], 0.8)
    assert torch.allclose(got / got[0], wanted / wanted[0]) and abs(got.log().mean()) < 1e-5


def rounded_error(w, h, scale, bits=3, group_size=32):
    grid = grids.Grid(bits, True)
    return output_error(
        w, grids.dequantize(round_to_nearest(w * scale, group_size, grid)) / scale, h
    )


@pytest.mark.parametrize("duo", [True, False])
@pytest.mark.parametrize("searched", [True, False])
def test_awq_lowers_the_output_error_where_some_channels_are_large(duo, searched):
    torch.manual_seed(0)
    w = torch.randn(64, 64)
    x = torch.randn(512, 64) * torch.where(torch.arange(64) % 16 == 0, 30.0, 1.0)
    h = x.t() @ x / len(x)
    found = numerics.awq(
        [w], [h], [numerics.quantizer(grids.Grid(3, True), 32, searched)], [32], duo=duo
    )
    # searched scales mind large channels already
    assert found.after < (0.9 if searched else 0.7) * found.before
    if not searched:
        assert rounded_error(w, h, found.scale_C) < 0.7 * rounded_error(w, h, torch.ones(64))


def test_awq_minds_the_worst_modality_and_never_makes_it_worse():
    torch.manual_seed(1)
    w, grid = torch.randn(48, 32), grids.Grid(3, True)
    rounding = numerics.quantizer(grid, -1, False)
    hessians = []
    for at in (3, 17):
        x = torch.randn(400, 32)
        x[:, at] *= 25
        hessians.append(x.t() @ x / len(x) * (1000 if at == 3 else 1))
    found = numerics.awq([w], hessians, [rounding], [-1])
    assert found.scale_C[3] > 1.5 and found.scale_C[17] > 1.5 and found.after < found.before
    plain = numerics.awq([w], [torch.eye(32)], [rounding], [-1], duo=False)
    assert (
        plain.ratio is None
        and torch.equal(plain.scale_C, torch.ones(32))
        and plain.after == plain.before
    )


def test_smoothquant_lowers_the_error_of_eight_bit_activations_in_both_modalities():
    torch.manual_seed(2)
    w = torch.randn(32, 64)
    text, image = torch.randn(200, 64), torch.randn(200, 64) * 0.1
    text[:, 5] *= 60
    image[:, 40] *= 60
    scale = numerics.smoothquant(torch.stack([text.abs().amax(0), image.abs().amax(0)]), [w], 0.5)

    def eight_bit(t):
        step = t.abs().amax(-1, keepdim=True) / 127
        return (t / step).round() * step

    for x in (text, image):
        errors = [
            (eight_bit(x / s) @ eight_bit(w * s).t() - x @ w.t()).norm()
            for s in (torch.ones(64), scale)
        ]
        assert errors[1] < 0.6 * errors[0]


def test_statistics_keep_modalities_apart_and_leave_pads_out():
    statistics = _Statistics(with_moments=True)
    x = torch.tensor([[1.0, -2.0], [5.0, 0.0], [100.0, 100.0]])
    statistics.add(x[None], torch.tensor([TEXT, IMAGE, 4]))
    assert statistics.largest[TEXT].tolist() == [1.0, 2.0] and statistics.largest[
        IMAGE
    ].tolist() == [5.0, 0.0]
    assert (
        set(statistics.moments) == {TEXT, IMAGE}
        and statistics.moments[IMAGE].hessian()[0, 0] == 25.0
    )


# --------------------------------------------------------------------------------------------------
# the pairs


def tiny(model_type: str, **changes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SMALL | changes))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.float().eval().requires_grad_(False)


def first_block(model, path, depth, **inputs):
    chain = capture(model, [Stage("text", path, depth)], [inputs])[path]
    return model.get_submodule(f"{path}.0"), chain.calls[0][0], chain.hidden[0]


def find_pairs(*first):
    found = norm_pairs(*first)
    return replace(found, pairs=found.pairs + linear_pairs(*first))


IDS = {"input_ids": torch.arange(12)[None] % 7}
NORMS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
LINKS = {"self_attn.v_proj": ("self_attn.o_proj",), "mlp.up_proj": ("mlp.down_proj",)}
GEMMA = {
    "input_layernorm": NORMS["input_layernorm"],
    "pre_feedforward_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
# experts in one kernel that knows no float64: no links
MOE = {"input_layernorm": NORMS["input_layernorm"]}
FAMILIES = [
    ("llama", {}, NORMS | LINKS, 0.0),
    ("qwen3", {}, NORMS | LINKS, 0.0),
    ("llama", {"num_key_value_heads": 2}, NORMS | {"mlp.up_proj": ("mlp.down_proj",)}, 0.0),
    ("gemma3_text", {}, GEMMA | LINKS, 1.0),
    ("olmo2", {}, LINKS, None),  # its norms stand behind the layers
    (
        "qwen2_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        MOE,
        0.0,
    ),
]


@pytest.mark.parametrize("family, changes, wanted, offset", FAMILIES)
def test_pairs_of_a_family_and_that_the_function_stays(family, changes, wanted, offset):
    model = tiny(family, **changes)
    before = model(**IDS).logits
    for at in range(2):
        chain = capture(model, [Stage("text", "model.layers", 2)], [IDS])["model.layers"]
        block = model.get_submodule(f"model.layers.{at}")
        found = find_pairs(block, chain.calls[0][at], chain.hidden[0])
        assert {pair.source: pair.readers for pair in found.pairs} == wanted
        assert {pair.offset for pair in found.pairs} - {None} == ({offset} - {None})
        for pair in found.pairs:
            channels = block.get_submodule(pair.readers[0]).in_features
            rescale(block, pair, 4 ** (torch.rand(channels) * 2 - 1))
    assert difference(model(**IDS).logits, before) < 1e-5
    if family == "qwen2_moe":
        assert found.refused["post_attention_layernorm"].startswith("also read by mlp")


def test_a_norm_that_takes_a_gate_is_tried_with_it():
    """Qwen3-Next normalizes each head of its linear attention so; the reader takes all heads, so no
    scale passes."""
    heads = {
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"], "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    }  # fmt: skip
    model = tiny("qwen3_next", **heads)
    before = model(**IDS).logits
    block, call, hidden = first_block(model, "model.layers", 2, **IDS)
    found = find_pairs(block, call, hidden)
    assert found.pairs[0] == Pair(
        "input_layernorm", ("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"), 1.0
    )
    assert found.refused["linear_attn.norm"] == "a reader takes other channels"
    for pair in found.pairs:
        rescale(
            block, pair, 4 ** (torch.rand(block.get_submodule(pair.readers[0]).in_features) * 2 - 1)
        )
    assert difference(model(**IDS).logits, before) < 1e-5


@pytest.mark.parametrize("named", [True, False])
def test_a_scale_passes_through_a_gated_norm(named):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = Qwen3NextRMSNormGated(8), nn.Linear(8, 8)

        def forward(self, hidden):
            normed = (
                self.norm(hidden_states=hidden, gate=hidden.flip(-1))
                if named
                else self.norm(hidden, hidden)
            )
            return hidden + self.fc(normed)

    torch.manual_seed(0)
    block, x = Gated().requires_grad_(False), torch.randn(1, 5, 8)
    before = block(x)
    found = norm_pairs(block, Call((), {}, 0), x)
    assert found.pairs == (Pair("norm", ("fc",), 0.0),)
    rescale(block, found.pairs[0], 4 ** (torch.rand(8) * 2 - 1))
    assert difference(block(x), before) < 1e-5


def test_pairs_of_an_encoder_and_a_decoder():
    config = WhisperConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=16, max_source_positions=20,
        vocab_size=99,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = WhisperModel(config).eval().requires_grad_(False)
    inputs = {"input_features": torch.randn(1, 16, 40), "decoder_input_ids": torch.arange(5)[None]}
    encoder = find_pairs(*first_block(model, "encoder.layers", 1, **inputs))
    assert {pair.source for pair in encoder.pairs} == {
        "self_attn_layer_norm",
        "final_layer_norm",
        "self_attn.v_proj",
    }
    decoder = find_pairs(*first_block(model, "decoder.layers", 1, **inputs))
    readers = {pair.source: pair.readers for pair in decoder.pairs}
    assert readers["encoder_attn_layer_norm"] == ("encoder_attn.q_proj",)
    assert readers["encoder_attn.v_proj"] == ("encoder_attn.out_proj",)


class Block(nn.Module):
    """norm -> fc1 -> activation -> fc2, and another reader of the norm's output where one is asked
    for."""

    def __init__(self, other: str, activation: nn.Module):
        super().__init__()
        self.other, self.act = other, activation
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, 8)
        self.router = nn.Parameter(torch.randn(1, 8))

    def forward(self, hidden):
        normed = self.norm(hidden)
        out = self.fc2(self.act(self.fc1(normed.view(-1, 8) if self.other == "view" else normed)))
        if self.other == "residual":
            return normed + out
        gate = (
            nn.functional.linear(normed, self.router).sigmoid() if self.other == "router" else 1.0
        )
        return hidden + gate * out


@pytest.mark.parametrize(
    "other, activation, wanted",
    [
        ("none", nn.GELU(), {"norm"}),
        ("none", nn.ReLU(), {"norm", "fc1"}),  # relu lets positive factors through
        ("view", nn.GELU(), {"norm"}),
        ("residual", nn.GELU(), set()),
        ("router", nn.GELU(), set()),
    ],
)
def test_a_norm_with_another_reader_is_left_alone(other, activation, wanted):
    torch.manual_seed(3)
    found = find_pairs(
        Block(other, activation).requires_grad_(False), Call((), {}, 0), torch.randn(1, 5, 8)
    )
    assert {pair.source for pair in found.pairs} == wanted
    assert ("norm" in found.refused) == ("norm" not in wanted)
    assert all(reason == "also read by the block itself" for reason in found.refused.values())


def test_how_norms_use_their_weight_is_tried():
    x = torch.randn(2, 3, 8)

    class Squared(LlamaRMSNorm):
        def forward(self, hidden):
            return super().forward(hidden) + 0.3 * hidden

    norms = [LlamaRMSNorm(8), nn.LayerNorm(8), Gemma3RMSNorm(8), Squared(8)]
    for norm in norms[:3]:
        nn.init.uniform_(norm.weight)
    kept = [norm.weight.clone() for norm in norms]
    assert [gain_offset(norm, x) for norm in norms] == [0.0, 0.0, 1.0, None]
    assert all(torch.equal(norm.weight, weight) for norm, weight in zip(norms, kept))


def test_bfloat16_norms_lose_nothing_to_their_coarse_weights():
    """The readers get the quotient of what the norm really holds."""
    torch.manual_seed(4)
    block = Block("none", nn.GELU()).requires_grad_(False)
    nn.init.zeros_(block.norm.bias)
    block.norm.to(torch.bfloat16)
    product = block.norm.weight.float() * block.fc1.weight
    (pair,) = norm_pairs(block.bfloat16(), Call((), {}, 0), torch.randn(1, 5, 8).bfloat16()).pairs
    block.fc1.float()
    start = block.fc1.weight * block.norm.weight.float()
    rescale(block, pair, torch.rand(8) + 0.5)
    assert torch.allclose(block.fc1.weight * block.norm.weight.float(), start, rtol=1e-6, atol=0)
    assert difference(start, product) < 1e-2


# --------------------------------------------------------------------------------------------------
# the run


def run(out, **changes):
    recipe = replace(FAST, output_dir=str(out), **changes)
    job = jobs.prepare(recipe, jobs.load_model(recipe))
    return job, jobs.run(job)


@pytest.mark.parametrize("method", ["smoothquant", "awq"])
def test_changed_norms_and_kept_layers_reach_the_checkpoint(method, demo, tmp_path):
    job, (folder,) = run(
        tmp_path, bits=8, equalize=method, ignore=["up_proj", "gate_proj"], format="auto_gptq"
    )
    source, written = load_file(DEMO / "model.safetensors"), load_file(folder / "model.safetensors")
    changed = {
        key for key in source.keys() & written.keys() if not torch.equal(source[key], written[key])
    }
    ends = {".".join(key.split(".")[-2:]) for key in changed}
    assert "input_layernorm.weight" in ends and "embed_tokens.weight" not in ends
    assert ("up_proj.weight" in ends) == (method == "awq")
    assert "post_attention_layernorm.weight" not in ends  # none of its readers is quantized
    tuned, decoded = job.loaded.model.state_dict(), from_quantized(folder).model.state_dict()
    assert all(torch.equal(decoded[name], tuned[name]) for name in tuned)
    (kept,) = measure([job.loaded.model], held_out(demo, "demo", limit=3), reference=demo.model)
    assert all(value < 0.01 for value in kept.kl.values())


@pytest.mark.parametrize(
    "amp, changes",
    [(False, {}), (True, {"quant_nontext_module": True, "dataset": "demo-llava", "nsamples": 3})],
)
def test_the_function_stays_in_float32(amp, changes):
    recipe = replace(
        FAST, model_dtype="float32", bits=8, amp=amp, equalize="awq", group_size=32, **changes
    )
    loaded, reference = jobs.load_model(recipe), load("demo", dtype="float32")
    job = jobs.prepare(recipe, loaded)
    from auto_mmround.run.equalize import equalize

    done = equalize(Session(loaded.model, job.recipe, job.plan, job.inputs))
    assert done and all(change.after < change.before for change in done)
    kwargs = job.inputs[0].kwargs
    assert difference(loaded.model(**kwargs).logits, reference.model(**kwargs).logits) < 1e-5


def test_the_stored_recipe_has_the_lists_and_reproduces_the_run(tmp_path):
    mappings = [[["re:.*gate_proj", "re:.*up_proj"], "re:.*post_attention_layernorm"]]
    options = {
        "equalize": "smoothquant",
        "mappings": mappings,
        "ignore": ["re:.*layers\\.0\\."],
        "targets": ["Linear"],
    }
    _, (folder,) = run(tmp_path / "one", **options)
    recipe = from_mapping(read(folder / "recipe.toml") | {"output_dir": str(tmp_path / "two")})
    assert recipe.mappings == mappings and recipe.ignore == options["ignore"]
    (again,) = jobs.run(jobs.prepare(recipe, jobs.load_model(recipe)))
    assert (folder / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    source, written = load_file(DEMO / "model.safetensors"), load_file(folder / "model.safetensors")
    changed = {
        key for key in source if key in written and not torch.equal(source[key], written[key])
    }
    assert changed and all(
        "post_attention_layernorm" in key and ".layers.0." not in key for key in changed
    )
    assert json.loads((folder / "run.json").read_text())["calibration"]["used"] == 8


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"mappings": [[["re:.*query"], "re:.*input_layernorm"]]}, "'re:.*query' matches nothing"),
        ({"mappings": [[["re:.*q_proj"], "re:.*inputnorm"]]}, "input_layernorm"),
        (
            {"mappings": [[["re:.*[qk]_proj"], "re:.*input_layernorm"]]},
            "also read by self_attn.v_proj",
        ),
        ({"mappings": [[["re:.*o_proj"], "re:.*input_layernorm"]]}, "can't be rescaled"),
        ({"mappings": [[["re:.*down_proj"], "re:.*gate_proj"]]}, "no scale passes"),
    ],
)
def test_wrong_mappings_are_one_line(changes, word, tmp_path):
    with pytest.raises(UserError) as caught:
        run(tmp_path / "out", equalize="awq", **changes)
    assert (
        word in str(caught.value)
        and "\n" not in str(caught.value)
        and not (tmp_path / "out").exists()
    )


def test_mappings_without_equalization_are_refused(tmp_path):
    with pytest.raises(UserError, match="set equalize"):
        run(tmp_path / "out", mappings=[[["re:.*q_proj"], "re:.*input_layernorm"]])
