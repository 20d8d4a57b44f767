"""The closed-form start and the Fisher weights: that they say what their formulas say."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nearest import round_to_nearest
from tiny_models import FAMILIES
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from auto_mmround.calibration.inputs import ModelInput
from auto_mmround.model import head as head_module
from auto_mmround.model.chains import Modalities, token_modalities
from auto_mmround.model.fisher import (
    FisherPasses,
    _sampled_gradient,
    draws_of,
    measure_fisher,
    spread,
)
from auto_mmround.model.labels import drawn
from auto_mmround.model.squares import BOUNDS, rows_of
from auto_mmround.model.structure import find_stages
from auto_mmround.numerics import gptq, grids, start
from auto_mmround.numerics.float_grids import FloatGrid
from auto_mmround.numerics.grids import Grid
from auto_mmround.numerics.moments import Moments, output_error
from auto_mmround.numerics.rounding import Rounding
from auto_mmround.numerics.start import StartConfig, closed_form, closed_forms, collecting, in_turn
from auto_mmround.recipe.algorithms import PRESETS
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run.finished import Finished
from auto_mmround.run.pipeline import quantize
from auto_mmround.run.plan import make_plan


class Attention(nn.Module):
    """q and k read one tensor, o another."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(16, 16, bias=False) for _ in range(3))

    def forward(self, x):
        return self.o(self.q(x) * self.k(x).tanh())


def test_moments_are_those_of_the_inputs_and_shared_where_inputs_are():
    torch.manual_seed(0)
    block = Attention()
    xs = [torch.randn(1, n, 16) for n in (3, 5)]
    masks = [torch.tensor([1.0, 1.0, 0.0]), torch.ones(5)]
    current = [masks[0]]
    with (
        torch.no_grad(),
        collecting(dict(block.named_children()), lambda name: current[0]) as collected,
    ):
        for x, current[0] in zip(xs, masks):
            collected.next_pass()
            block(x)
    moments = collected.moments()
    rows = torch.cat([xs[0][0, :2], xs[1][0]])
    torch.testing.assert_close(moments["q"].hessian(), rows.t() @ rows / 7)
    assert moments["q"] is moments["k"] and moments["o"] is not moments["q"]
    inner = (rows @ block.q.weight.t()) * (rows @ block.k.weight.t()).tanh()
    torch.testing.assert_close(moments["o"].hessian(), inner.t() @ inner / 7)


@pytest.mark.parametrize(
    "grid", [Grid(2, True), Grid(3, True), Grid(3, False, min_zero=1), Grid(4, False)]
)
@pytest.mark.parametrize("order", ["none", "weight", "group"])
def test_start_is_the_solution_and_far_better_than_nearest(grid, order):
    torch.manual_seed(1)
    mix = torch.randn(64, 64) * torch.linspace(2, 0.1, 64)
    x = torch.randn(500, 64) @ mix
    w = torch.randn(24, 64)
    moments = Moments(64)
    moments.add(x)
    nearest = output_error(w, grids.dequantize(round_to_nearest(w, 32, grid)), moments.hessian())
    rounding = Rounding(w, 32, grid)
    closed_form([rounding], moments, StartConfig(order=order))
    assert output_error(w, rounding.weight(), moments.hessian()) < 0.5 * nearest
    assert rounding.codes().zero_OG.min() >= grid.min_zero
    assert torch.equal(rounding.weight(), grids.dequantize(rounding.codes()))


def test_groups_are_taken_whole_those_with_most_input_first():
    diagonal = torch.tensor([1.0, 2.0, 9.0, 0.5, 4.0, 4.0, 7.0])
    assert gptq.column_order(diagonal, "group", 3).tolist() == [2, 1, 0, 4, 5, 3, 6]
    assert gptq.column_order(diagonal, "weight", 3).tolist() == [2, 6, 4, 5, 1, 0, 3]


def test_layers_run_in_turns():
    shared, other, mlp, down = (Moments(4) for _ in range(4))
    layers = {
        "q": shared,
        "k": shared,
        "o": other,
        "mlp.experts.0.gate": mlp,
        "mlp.experts.0.up": mlp,
    }
    layers |= {
        "mlp.experts.0.down": down,
        "mlp.experts.1.gate": Moments(4),
        "mlp.experts.1.down": Moments(4),
    }
    named = {f"{block}.{name}": found for block in ("layers.0",) for name, found in layers.items()}
    named["layers.1.q"] = Moments(4)
    turns = in_turn(named, ["layers.0", "layers.1"])
    assert [[name.removeprefix("layers.") for name in turn] for turn in turns] == [
        ["0.q", "0.k"], ["0.o"], ["0.mlp.experts.0.gate", "0.mlp.experts.0.up",
            "0.mlp.experts.1.gate"],
        ["0.mlp.experts.0.down", "0.mlp.experts.1.down"], ["1.q"],
    ]  # fmt: skip


def test_true_sequential_changes_what_comes_after_the_first_turn():
    inputs = [
        ModelInput(
            str(i),
            {"input_ids": torch.randint(0, 50, (1, 24))},
            torch.zeros(24, dtype=torch.int8),
            torch.ones(24),
        )
        for i in range(8)
    ]
    codes = []
    for changes in ({}, {"true_sequential": True}, {"sequential_targets": ["Linear"]}):
        model = tiny_text_model()
        recipe = Recipe(
            bits=2, group_size=16, algorithm="gptq", amp=False, format="fake", **changes
        )
        finished = Finished()
        quantize(model, recipe, make_plan(model, recipe), inputs, finished)
        codes.append({name: code.q_OI for name, code in finished.codes.items()})
    once, turns, by_name = codes
    same = {name for name in once if torch.equal(once[name], turns[name])}
    assert {"q_proj", "k_proj", "v_proj"} == {
        name.rpartition(".")[2] for name in same if ".0." in name
    }
    assert all(torch.equal(turns[name], by_name[name]) for name in turns)


def test_stacked_weights_are_solved_as_alone():
    torch.manual_seed(2)
    moments = Moments(32)
    moments.add(torch.randn(200, 32) @ torch.randn(32, 32))
    weights = [torch.randn(rows, 32) for rows in (6, 3)]
    stacked, alone = ([Rounding(w, 16, Grid(3, True)) for w in weights] for _ in range(2))
    closed_form(stacked, moments, StartConfig())
    for each in alone:
        closed_form([each], moments, StartConfig())
    for a, b in zip(stacked, alone, strict=True):
        assert torch.equal(a.codes().q_OI, b.codes().q_OI)
        torch.testing.assert_close(a.weight(), b.weight(), rtol=1e-3, atol=0)


def tiny_text_model():
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=50, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval().requires_grad_(False)


def test_the_start_is_the_same_under_autocast():
    """A model stored in float32 or float16 is tuned under autocast; the solve must not notice."""
    torch.manual_seed(0)
    w_OI, x_TI = torch.randn(8, 320), torch.randn(400, 320)  # wider than one block of columns
    moments = Moments(320)
    moments.add(x_TI)
    one, two = (Rounding(w_OI, 32, Grid(4, True)) for _ in range(2))
    closed_form([one], moments, StartConfig())
    with torch.autocast("cpu", torch.bfloat16):
        closed_form([two], moments, StartConfig())
    assert torch.equal(one.weight(), two.weight())


def test_fisher_is_the_curvature_of_kl():
    """For a small change d of one block output, KL is about the sum over tokens and channels of F
    d^2 / 2."""
    model = tiny_text_model()
    inputs = [{"input_ids": torch.randint(0, 50, (1, 24))} for _ in range(200)]
    modalities = [Modalities(torch.zeros(24, dtype=torch.int8))] * len(inputs)
    fisher = measure_fisher(model, find_stages(model), inputs, modalities).channels
    assert set(fisher) == {"model.layers.0", "model.layers.1"}
    table = fisher["model.layers.1"]
    assert table.shape == (9, 32) and (table[[0, 5, 6, 7, 8]] > 0).all() and (table[1:5] == 0).all()
    before = [model(**kwargs).logits[0].log_softmax(-1) for kwargs in inputs]
    for channel in (3, 17):

        def shift(module, args, output, channel=channel):
            output = output.clone() if isinstance(output, torch.Tensor) else output
            output[..., channel] += 0.05 * torch.randn(output.shape[:-1])
            return output

        handle = model.model.layers[1].register_forward_hook(shift)
        after = [model(**kwargs).logits[0].log_softmax(-1) for kwargs in inputs]
        handle.remove()
        kl = sum((p.exp() * (p - q)).sum(-1).mean() for p, q in zip(before, after)) / len(inputs)
        assert kl.item() == pytest.approx(0.5 * table[0, channel].item() * 0.05**2, rel=0.25)


def test_fisher_tells_modalities_apart_and_leaves_no_gradients():
    model = tiny_text_model()
    modalities = Modalities(torch.tensor([0] * 6 + [1] * 6, dtype=torch.int8))
    fisher = measure_fisher(
        model, find_stages(model), [{"input_ids": torch.randint(0, 50, (1, 12))}], [modalities]
    ).channels
    table = fisher["model.layers.0"]
    assert (
        (table[[0, 1, 5, 6, 7, 8]].sum(1) > 0).all()
        and (table[2:5] == 0).all()
        and not torch.equal(table[0], table[1])
    )
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_tokens_weigh_what_their_gradients_say_and_layers_of_one_input_alike():
    torch.manual_seed(0)
    model = tiny_text_model()
    layers = [f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj",
        "self_attn.v_proj",
              "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")]  # fmt: skip
    inputs = [{"input_ids": torch.randint(0, 50, (1, n))} for n in (12, 9)]
    modalities = [Modalities(torch.zeros(n, dtype=torch.int8)) for n in (12, 9)]
    found = measure_fisher(
        model, find_stages(model), inputs, modalities, [*layers, "model.layers.0.experts.0"]
    ).tokens
    assert set(found) == set(layers) and [len(found[layers[0]][i]) for i in (0, 1)] == [12, 9]
    assert found[layers[0]] is found[layers[1]] and found[layers[3]] is found[layers[4]]
    assert found[layers[2]] is not found[layers[0]]
    # The last token's query and value serve nothing but its own prediction; all of them together
    # weigh 1 on average.
    for name in layers:
        every = torch.cat(list(found[name].values()))
        assert (
            every.min() >= BOUNDS[0]
            and every.mean().item() == pytest.approx(1, abs=0.3)
            and every.std() > 0.1
        )
    alone = measure_fisher(model, find_stages(model), inputs, modalities, layers[2:3]).tokens[
        layers[2]
    ]
    torch.testing.assert_close(alone[1], found[layers[2]][1])


def test_several_draws_a_sample_are_the_mean_of_as_many_passes():
    torch.manual_seed(0)
    model = tiny_text_model()
    layers = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    inputs = [{"input_ids": torch.randint(0, 50, (1, n))} for n in (12, 9)]
    modalities = [Modalities(torch.zeros(n, dtype=torch.int8)) for n in (12, 9)]

    def found(seed=42, draws=1):
        how = FisherPasses(seed=seed, draws=draws)
        return measure_fisher(model, find_stages(model), inputs, modalities, layers, how)

    one, other, both = found(), found(42 + 2**24), found(draws=2)
    for block, table in both.channels.items():
        pair = one.channels[block], other.channels[block]
        assert not torch.equal(*pair)
        # the first tokens' rows are products of two means
        torch.testing.assert_close(table[0], sum(pair)[0] / 2)
    assert set(both.tokens) == set(layers)
    # a plain layer has a single pass a sample, however many draws
    assert [len(tokens) for tokens in both.tokens.values()] == [2, 2]


@pytest.mark.parametrize(
    ("samples", "draws"), [(1, 4), (32, 4), (33, 3), (64, 2), (65, 1), (128, 1), (0, 4)]
)
def test_few_samples_draw_several_times(samples, draws):
    assert draws_of(samples, 128) == draws


def test_presets_draw_more_the_longer_they_take():
    """37 samples of 2,048 tokens are those of a model with 18,944 columns."""
    presets = [draws_of(37, Recipe(preset=name).gradients) for name in PRESETS]
    assert presets == [1, 2, 3] and Recipe(algorithm="gptq").gradients == 128


def test_moments_pair_the_students_inputs_with_the_teachers():
    """Layers of one input share their moments; a pass of the teacher comes before each of the
    student's."""
    torch.manual_seed(0)
    layers = nn.ModuleDict({"q": nn.Linear(8, 4), "k": nn.Linear(8, 4), "o": nn.Linear(4, 4)})
    student, teacher = torch.randn(2, 1, 5, 8), torch.randn(2, 1, 5, 8)
    with torch.no_grad(), collecting(dict(layers), lambda name: None, cross=True) as collected:
        for mine, other in zip(student, teacher, strict=True):
            for x, given in ((other, True), (mine, False)):
                collected.next_pass(teacher=given)
                layers["o"](layers["q"](x) + layers["k"](x))
    moments = collected.moments()
    assert moments["q"] is moments["k"] and moments["q"] is not moments["o"]
    wanted = torch.einsum("bnti,bntj->ij", student, teacher) / 10
    torch.testing.assert_close(moments["q"].cross(), wanted, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(
        moments["q"].hessian(),
        torch.einsum("bnti,bntj->ij", student, student) / 10,
        rtol=1e-2,
        atol=1e-2,
    )


@pytest.mark.parametrize("words", [3, 64, 200])
@pytest.mark.parametrize("kind", ["logits", "head", "head with a bias"])
def test_labels_are_drawn_as_predicted(words, kind, monkeypatch):
    """Whatever the size of the pieces; words that a model rules out are never drawn."""
    monkeypatch.setattr(head_module, "LOGITS", 20_000 * 100)  # pieces of 64 words
    torch.manual_seed(0)
    logits = 2 * torch.randn(words)
    logits[1] = -torch.inf
    hidden, head = logits[None], nn.Identity()
    if kind != "logits":
        head = nn.Linear(1, words, bias=kind != "head").requires_grad_(False)
        head.weight[:, 0] = logits.clamp(min=-200.0)
        hidden = torch.ones(1, 1)
        logits = head(hidden)[0]
    shares = logits.softmax(-1)
    found = drawn(hidden.expand(20_000, -1), head, torch.Generator().manual_seed(0), 2)
    assert found.shape == (20_000, 2) and (shares[found] > 0).all()
    for label in found.unbind(1):
        assert (label.bincount(minlength=words) / 20_000 - shares).abs().max() < 0.02
    assert drawn(hidden[:0], head, torch.Generator(), 2).shape == (0, 2)
    both = (found[:, 0] == found[:, 1]).float().mean()  # independent of one another
    assert both.item() == pytest.approx(shares.square().sum().item(), abs=0.02)


@pytest.mark.parametrize("whole", [False, True])
def test_gradients_of_drawn_labels_have_the_fisher_information(whole):
    """Mean square of random gradients against the exact sum over all labels; of the hidden state,
    and of the logits."""
    torch.manual_seed(0)
    head = nn.Identity() if whole else nn.Linear(4, 9)
    hidden = torch.randn(1, 9 if whole else 4)
    rows = torch.eye(9) if whole else head.weight.detach()  # d logit / d hidden
    shares = head(hidden).detach().softmax(-1)[0]
    centred = rows - shares @ rows
    exact = centred.t() @ (shares[:, None] * centred)
    got = _sampled_gradient(hidden.expand(100_000, -1), head, torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        got.t() @ got / len(got), exact, atol=0.02 * exact.abs().max().item(), rtol=0
    )


def test_a_tower_with_as_many_tokens_as_the_text_has_no_modalities_of_its_own():
    model = tiny_text_model()
    modalities = Modalities(torch.tensor([0] * 5 + [1] * 7))
    inputs = [{"input_ids": torch.randint(0, 50, (1, 12))}]
    (text,) = find_stages(model)
    tower = replace(text, name="vision")
    table = measure_fisher(model, [tower], inputs, [modalities]).channels["model.layers.0"]
    assert table[0].min() > 0 and not table[1:].any()
    assert token_modalities(text, modalities, 12).tolist() == modalities.text_T.tolist()
    assert (
        not token_modalities(tower, modalities, 12).any()
        and len(token_modalities(text, modalities, 9)) == 9
    )


def test_a_sample_that_reaches_no_watched_tower_has_no_say():
    family = FAMILIES["qwen2_vl"]
    model, inputs = family.build(), family.samples()
    (tower, _), with_image = (
        find_stages(model),
        [sample for sample in inputs if "pixel_values" in sample],
    )
    modalities = [Modalities(torch.zeros(sample["input_ids"].shape[1])) for sample in inputs]
    found = measure_fisher(model, [tower], inputs, modalities)
    assert set(found.channels) == set(tower.blocks) and 0 < len(with_image) < len(inputs)
    assert all(table.sum() > 0 for table in found.channels.values())


def test_fisher_samples_are_spread_evenly():
    lengths = [Modalities(torch.zeros(100))] * 40
    assert spread(lengths, 1000) == [0, 4, 8, 12, 16, 20, 24, 28, 32, 36]
    assert spread(lengths, 10**6) == list(range(40)) and spread(lengths, 1) == [0]


def test_first_tokens_and_silent_frames_have_rows_of_their_own():
    """A tower's frames count by their kinds; the first tokens of a text by place, unless they are
    padding."""
    model = tiny_text_model()
    (text,) = find_stages(model)
    tower = replace(text, name="audio")
    frames_F = torch.tensor([3] * 8 + [4] * 4)
    modalities = Modalities(torch.tensor([4, 0, 0, 0, 0, 1, 1]), frames_F)
    assert (
        rows_of(tower, modalities, 12).tolist() == frames_F.tolist()
        and not rows_of(tower, modalities, 7).any()
    )
    assert (
        rows_of(text, modalities, 7).tolist() == [4, 6, 7, 8, 0, 1, 1]
        and not rows_of(text, modalities, 12).any()
    )
    table = measure_fisher(
        model, [tower], [{"input_ids": torch.randint(0, 50, (1, 12))}], [modalities]
    ).channels["model.layers.1"]
    assert (table[3:5].sum(1) > 0).all() and not table[:3].any() and not table[5:].any()


def test_a_sink_of_attention_weighs_what_its_gradient_says():
    """The size of a first token's row is its own mean gradient, its channels are those of all
    tokens."""
    model = tiny_text_model()
    sample = {"input_ids": torch.randint(0, 50, (1, 12))}
    modalities = Modalities(torch.zeros(12, dtype=torch.int8))
    table = measure_fisher(model, find_stages(model), [sample] * 40, [modalities] * 40).channels[
        "model.layers.0"
    ]
    shares = table / table.mean(1, keepdim=True).clamp(min=1e-30)
    torch.testing.assert_close(shares[5], shares[8])
    assert not torch.allclose(table[5], table[8]) and not torch.allclose(shares[5], shares[0])


def experts_of(count: int) -> tuple[dict[str, Rounding], dict[str, Moments], Moments]:
    """Experts of which the even ones got tokens; and the moments of all tokens."""
    torch.manual_seed(0)
    roundings, moments, whole = {}, {}, Moments(64)
    for i in range(count):
        reads, inner = Moments(64), Moments(32)
        tokens = torch.randn(40 + 8 * i, 64) * torch.linspace(0.1, 3, 64)
        reads.add(tokens)
        inner.add(torch.randn(40, 32) * torch.linspace(3, 0.1, 32))
        for leaf, rows, columns in (("gate", 16, 64), ("up", 16, 64), ("down", 64, 32)):
            name = f"model.layers.0.mlp.experts.{i}.{leaf}_proj"
            roundings[name] = Rounding(torch.randn(rows, columns), 32, Grid(3, True))
            if i % 2 == 0:
                moments[name] = inner if leaf == "down" else reads
        if i % 2 == 0:
            whole.add(tokens)
    return roundings, moments, whole


@pytest.mark.parametrize("most", [start.MOST, 1000])
def test_experts_without_tokens_are_solved_under_those_of_all_others(monkeypatch, most):
    monkeypatch.setattr(start, "MOST", most)
    roundings, moments, whole = experts_of(4)
    same, _, _ = experts_of(4)
    closed_forms(roundings, moments, StartConfig())
    alike = Moments(32)
    alike.add(torch.eye(32))
    for name, rounding in same.items():
        own = moments.get(name, alike if "down" in name else whole)
        closed_form([rounding], own, StartConfig())
        found, wanted = roundings[name].codes(), rounding.codes()
        assert (found.q_OI != wanted.q_OI).float().mean() < 0.01, name  # sums in another order
        torch.testing.assert_close(found.scale_OG.float(), wanted.scale_OG.float(), rtol=0.01,
                                   atol=1e-3)  # fmt: skip
    one = "model.layers.0.mlp.experts.1.gate_proj"
    errors = [output_error(r.w_OGg.flatten(1), grids.dequantize(r.codes()), whole.hessian())
              for r in (roundings[one], _under_identity(same[one]))]  # fmt: skip
    assert errors[0] < 0.9 * errors[1]


def _under_identity(rounding: Rounding) -> Rounding:
    alike = Moments(rounding.columns)
    alike.add(torch.eye(rounding.columns))
    closed_form([rounding], alike, StartConfig())
    return rounding


@pytest.mark.parametrize("grid", [Grid(3, False), FloatGrid("fp8", 128)], ids=str)
def test_a_large_weight_is_solved_some_rows_at_a_time_under_one_factor(grid, monkeypatch):
    factors, plain = [], gptq.factor
    monkeypatch.setattr(gptq, "factor", lambda *a: factors.append(a) or plain(*a))
    torch.manual_seed(0)
    own, w_OI = Moments(256), torch.randn(500, 256)
    own.add(torch.randn(600, 256) * torch.linspace(0.1, 3, 256))
    found = []
    for most in (start.MOST, 100 * 256):
        monkeypatch.setattr(start, "MOST", most)
        found.append(Rounding(w_OI, 128, grid))
        closed_form([found[-1]], own, StartConfig())
    assert len(factors) == 2
    whole, parts = (rounding.codes() for rounding in found)
    assert (whole.q_OI != parts.q_OI).float().mean() < 0.01  # sums in another order
    torch.testing.assert_close(whole.scale_OG, parts.scale_OG, rtol=0.01, atol=1e-3)


WIDE = """
import torch
from auto_mmround.numerics.grids import Grid
from auto_mmround.numerics.moments import Moments
from auto_mmround.numerics.rounding import Rounding
from auto_mmround.numerics.start import StartConfig, closed_form

def kilobytes(of):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(of))

def solve(columns):
    own, rounding = Moments(columns), Rounding(torch.randn(64, columns), 32, Grid(4, True))
    own.add(torch.randn(64, columns))
    open("/proc/self/clear_refs", "w").write("5")
    before = kilobytes("VmRSS")
    closed_form([rounding], own, StartConfig())
    return kilobytes("VmHWM") - before

solve(256)  # what libraries take once
print(solve(6144))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
def test_second_moments_of_a_wide_layer_are_not_made_whole():
    ran = subprocess.run([sys.executable, "-c", WIDE], capture_output=True, text=True, check=True)
    factor = 6144**2 * 4 / 1024
    assert factor < int(ran.stdout) < 1.6 * factor


def test_moments_of_experts_without_tokens_are_made_once():
    roundings, moments, _ = experts_of(6)
    found = start._for_all(roundings, moments)
    assert found.keys() == roundings.keys()
    unreached = {id(found[name]) for name in roundings if name not in moments}
    assert len(unreached) == 2  # what gate and up read, and what down does
