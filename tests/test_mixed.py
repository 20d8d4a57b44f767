"""Mixed bits: the knapsack, what is measured, and the whole way to a recipe that says it all."""

import itertools
import json
import math
import random
import re
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from auto_mmround import AutoRoundMLLM
from auto_mmround.checkpoint.loader import from_quantized
from auto_mmround.cli import main
from auto_mmround.errors import UserError
from auto_mmround.model.chains import Modalities
from auto_mmround.model.divergence import Before
from auto_mmround.numerics.grids import Grid
from auto_mmround.numerics.moments import Moments
from auto_mmround.numerics.rounding import Rounding
from auto_mmround.numerics.start import StartConfig, closed_form
from auto_mmround.recipe.allocation import allocate
from auto_mmround.recipe.files import read
from auto_mmround.recipe.recipe import Recipe, from_mapping
from auto_mmround.run import job as jobs
from auto_mmround.run.mixed import _tried, units
from auto_mmround.run.plan import make_plan
from auto_mmround.run.sensitivity import Sets, trying
from auto_mmround.run.session import Session

FUSED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})


def tiny():
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=60, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
        tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval().requires_grad_(False)


def texts(count=24, length=32, seed=1):
    torch.manual_seed(seed)
    return [{"input_ids": torch.randint(3, 60, (length,)).tolist()} for _ in range(count)]


def mixing(model, **options):
    settings = {
        "group_size": 32,
        "nsamples": 24,
        "seqlen": 32,
        "algorithm": "gptq",
        "device": "cpu",
    } | options
    return AutoRoundMLLM(model, None, dataset=texts(), **settings)


def test_the_knapsack_is_optimal_for_the_size_it_uses():
    drawn = random.Random(0)
    for _ in range(40):
        sizes = [sorted(drawn.sample(range(1, 30), 3)) for _ in range(5)]
        damages = [sorted((drawn.random() for _ in range(3)), reverse=True) for _ in range(5)]
        budget = drawn.randint(sum(map(min, sizes)), sum(map(max, sizes)))
        picks = allocate(sizes, damages, budget)
        used = sum(size[k] for size, k in zip(sizes, picks, strict=True))
        got = sum(damage[k] for damage, k in zip(damages, picks, strict=True))
        every = itertools.product(range(3), repeat=5)
        table = [
            (sum(s[k] for s, k in zip(sizes, c)), sum(d[k] for d, k in zip(damages, c)))
            for c in every
        ]
        assert used <= budget
        # Steps that did not fit leave at most one step's gain behind.
        steps = [d[i] - d[j] for d in damages for i in range(3) for j in range(i + 1, 3)]
        assert got <= min(damage for size, damage in table if size <= budget) + max(steps)
        if picks == [2] * 5 or budget == sum(map(max, sizes)):
            assert got == pytest.approx(min(damage for _, damage in table))


def test_the_knapsack_skips_what_makes_nothing_better_and_says_what_cannot_be():
    assert allocate([[1, 2, 3]], [[1.0, 1.0, 0.9]], 2) == [0]  # 2 is no better than 1
    assert allocate([[1, 2, 3]], [[1.0, 1.2, 0.9]], 3) == [2]
    assert allocate([[1, 2], [1, 2]], [[5, 0], [1, 0]], 3) == [1, 0]
    assert allocate([[2, 3], [2, 3]], [[1, 0], [1, 0]], 3.9) is None


def test_divergence_and_its_gradient_are_those_of_the_logits():
    model = tiny()
    inputs = [{"input_ids": torch.tensor(row["input_ids"])[None]} for row in texts(3)]
    before = Before.of(model, inputs)
    was = [model(**each).logits.log_softmax(-1) for each in inputs]
    assert before.divergences(model) == [0, 0, 0]
    weight = model.model.layers[0].mlp.down_proj.weight
    weight.data += 0.1 * torch.randn_like(weight)
    weight.requires_grad_()
    found = before.divergences(model, gradients=True)
    mine, weight.grad = weight.grad, None
    wanted = [
        (p.exp() * (p - model(**each).logits.log_softmax(-1))).sum()
        for p, each in zip(was, inputs, strict=True)
    ]
    assert found == pytest.approx([each.item() for each in wanted], rel=1e-4) and min(found) > 0.01
    sum(wanted).backward()
    torch.testing.assert_close(mine, weight.grad, rtol=1e-3, atol=1e-5)
    assert before.only([2]).divergences(model) == pytest.approx(found[2:], rel=1e-5)


@contextmanager
def trial_of(model, options=(2, 3, 4, 8)):
    ours = mixing(model, target_bits=3.5)
    job = jobs.prepare(replace(ours.recipe, target_bits=None), ours.loaded, texts())
    names = dict.fromkeys(job.plan.quantized, options)
    with trying(Session(model, job.recipe, job.plan, job.inputs), names) as trial:
        yield trial


def test_shares_of_damage_add_up_to_what_all_lose_together():
    model = tiny()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with trial_of(model) as trial:
        found = trial.damage()
        for bits in (3, 4):
            truth = trial.kl(dict.fromkeys(found.of, bits))
            shares = sum(each[bits] for each in found.of.values())
            assert shares.item() == pytest.approx(truth.item(), rel=0.1)
        assert trial.kl({}).item() == pytest.approx(0, abs=1e-6)
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def floats(model, **options):
    """Options that engines read side by side, for layers whose inputs are rounded, too."""
    return mixing(model, bit_options="FP8,NVFP4", format="compressed_tensors", **options)


def test_shares_hold_what_rounded_inputs_lose():
    model = tiny()
    ours = floats(model, target_bits=5.5)
    job = jobs.prepare(replace(ours.recipe, target_bits=None), ours.loaded, texts())
    names = dict.fromkeys(job.plan.quantized, ours.recipe.mixable)
    assert ours.recipe.mixable == ("NVFP4", "FP8")
    with trying(Session(model, job.recipe, job.plan, job.inputs), names) as trial:
        found = trial.damage()
        for option in ours.recipe.mixable:
            truth = trial.kl(dict.fromkeys(found.of, option))
            shares = sum(each[option] for each in found.of.values())
            assert shares.item() == pytest.approx(truth.item(), rel=0.15)
        weights = replace(trial, served={"NVFP4": SimpleNamespace(seen_by=lambda weight, x: x)})
        alone = sum(each["NVFP4"] for each in weights.damage().of.values())
        assert alone < 0.8 * sum(each["NVFP4"] for each in found.of.values())
        assert trial.kl({}).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("options", ["FP8,NVFP4", "4,FP8", "FP8_STATIC,NVFP4"])
def test_schemes_are_chosen_written_and_read(options, tmp_path):
    ours = mixing(
        tiny(), target_bits=6.2, bit_options=options, format="compressed_tensors", iters=0
    )
    model, _ = ours.quantize()
    (folder,) = ours.save_quantized(tmp_path / "out", format="compressed_tensors")
    kinds = {layer["data_type"] for layer in ours.layer_config.values() if layer["bits"] < 16}
    assert len(kinds) == 2
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert stored["format"] == "mixed-precision" and len(stored["config_groups"]) == 2
    read_back = from_quantized(folder).model.state_dict()
    assert all(torch.equal(read_back[name], p) for name, p in model.state_dict().items())
    assert ours.verify(["transformers"]).right


def test_experts_are_measured_with_rounded_inputs_few_of_them_reached():
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, num_experts=64,
        num_experts_per_tok=1, vocab_size=60, initializer_range=0.2,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).eval().requires_grad_(False)
    rows = texts(8)  # 32 tokens, 64 experts
    options = dict(bit_options="NVFP4,FP8", format="compressed_tensors", target_bits=6, iters=0)
    ours = AutoRoundMLLM(model, None, dataset=rows, device="cpu", nsamples=8, seqlen=32, **options)
    job = jobs.prepare(ours.recipe, ours.loaded, rows)
    assert {"NVFP4", "FP8"} & {layer["bits"] for layer in job.mixed["layers"].values()}


def test_a_layer_gets_another_scheme_by_name(tmp_path):
    given = {"down_proj": {"scheme": "FP8"}, "o_proj": {"scheme": "W8A16", "group_size": 32}}
    recipe = Recipe(
        data_type="nvfp4", group_size=16, act_bits=4, layer_config=given,
        format="compressed_tensors",
    )  # fmt: skip
    plan = make_plan(tiny(), recipe)
    told = {n.rpartition(".")[2]: (s.data_type, s.act_bits) for n, s in plan.quantized.items()}
    assert told["down_proj"] == ("fp8", 8) and told["q_proj"] == ("nvfp4", 4)
    assert told["o_proj"] == ("int", 16)
    assert plan.formats[0].name == "compressed_tensors:mixed"
    with pytest.raises(UserError, match="scheme = 'FP9'; there are W2A16"):
        make_plan(tiny(), replace(recipe, layer_config={"o_proj": {"scheme": "FP9"}}))


@pytest.mark.parametrize(
    "fmt, named, said",
    [
        ("mlx", "NVFP4A16", "mlx holds integers, not nvfp4"),
        ("fake", "FP8", "fake cannot state 8-bit activations"),
        ("auto_gptq", "MXFP4A16", "integers"),
    ],
)
def test_a_scheme_that_no_format_holds_is_refused(fmt, named, said):
    """The layer stayed in 16 bits before, and only the summary said so."""
    recipe = Recipe(group_size=32, format=fmt, layer_config={"o_proj": {"scheme": named}})
    with pytest.raises(UserError, match=rf"'o_proj': .*o_proj \(and 1 more\) would stay.*{said}"):
        make_plan(tiny(), recipe)
    kept = {"o_proj": {"bits": 16}}
    assert "o_proj" not in str([*make_plan(tiny(), replace(recipe, layer_config=kept)).quantized])


def test_a_scheme_is_refused_that_no_layer_gets_but_those_of_layer_config():
    """A run with one layer in 4 bits and all others in 16 was said to be one of FP8."""
    held = {"o_proj": {"scheme": "W4A16", "group_size": 32}}
    recipe = from_mapping({"scheme": "FP8", "format": "mlx", "layer_config": held})
    with pytest.raises(UserError, match=r"scheme: .*would stay in 16 bits, mlx holds integers"):
        make_plan(tiny(), recipe)


def test_a_weight_without_an_option_stays_at_the_one_above():
    model, lacks = tiny(), "model.layers.0.mlp.down_proj"
    with trial_of(model) as trial:
        options = {name: (4, 8) if name == lacks else each for name, each in trial.options.items()}
        found = replace(trial, options=options).damage().of
    assert {*found[lacks]} == {4, 8} and all(
        {*each} == {2, 3, 4, 8} for name, each in found.items() if name != lacks
    )


def test_predicted_damage_ranks_layers_as_kl_does():
    """Each fused set of the tiny model rounded alone: predicted nats against those that the model's
    output shows."""
    model = tiny()
    ours = mixing(model, target_bits=3.5, bit_options=[2, 3, 4])
    job = jobs.prepare(ours.recipe, ours.loaded, texts())
    held = torch.tensor([row["input_ids"] for row in texts(16, seed=2)])
    before = model(input_ids=held).logits.log_softmax(-1)
    predicted, measured = [], []
    for unit in units(
        model, replace(ours.recipe, layer_config=None), make_plan(model, Recipe(group_size=32))
    ):
        for bits in (2, 3, 4):
            kept = {w.name: model.get_submodule(w.name).weight.clone() for w in unit.weights}
            for name, weight in kept.items():
                rounding = Rounding(weight, 32, Grid(bits, True))
                moments = Moments(weight.shape[1])
                moments.add(torch.eye(weight.shape[1]))
                closed_form([rounding], moments, StartConfig())
                model.get_submodule(name).weight.copy_(rounding.weight())
            after = model(input_ids=held).logits.log_softmax(-1)
            for name, weight in kept.items():
                model.get_submodule(name).weight.copy_(weight)
            measured.append((before.exp() * (before - after)).sum(-1).mean().log().item())
            layers = job.mixed["layers"]
            predicted.append(
                math.log(sum(layers[w.name]["damage"][str(bits)][0] for w in unit.weights))
            )
    assert len(predicted) == 24
    assert torch.corrcoef(torch.tensor([predicted, measured]))[0, 1] > 0.9


def test_bits_are_chosen_once_and_the_recipe_says_them(tmp_path):
    model = tiny()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    ours = mixing(model, target_bits=3.8)
    job = jobs.prepare(ours.recipe, ours.loaded, texts())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert 3.6 < job.plan.bits_per_weight() <= 3.8
    schemes = job.plan.quantized
    assert len({scheme.bits for scheme in schemes.values()}) > 1
    for name, scheme in schemes.items():
        parent, _, leaf = name.rpartition(".")
        for members in FUSED:
            if leaf in members:
                assert all(schemes[f"{parent}.{other}"] == scheme for other in members)
    record = job.mixed
    assert record["sets"] == ["text"] and set(record["layers"]) == set(schemes)
    assert (
        record["uniform"]["2"][0]
        > record["uniform"]["3"][0]
        > record["expected"][0]
        > record["uniform"]["8"][0]
    )
    measured = record["measured"]
    assert (
        measured["3"][0] > measured["line"][0] > measured["4"][0]
        and measured["mixed"][0] < measured["3"][0]
    )
    again = jobs.prepare(job.recipe, ours.loaded, texts())
    assert (
        again.mixed is None
        and again.plan == job.plan
        and again.recipe.layer_config == job.recipe.layer_config
    )
    with pytest.raises(
        UserError, match=r"layer_config names the bits of every weight, 3\.\d+ on average"
    ):
        jobs.prepare(replace(job.recipe, target_bits=3.0), ours.loaded, texts())

    ours.quantize()
    (folder,) = ours.save_quantized(tmp_path / "out", format="auto_round")
    read_back = from_quantized(folder).model.state_dict()
    assert all(torch.equal(read_back[name], p) for name, p in model.state_dict().items())
    stored = from_mapping(read(folder / "recipe.toml"))
    assert stored.target_bits == 3.8 and stored.layer_config == job.recipe.layer_config
    assert json.loads((folder / "run.json").read_text())["mixed"]["layers"] == record["layers"]
    report = json.loads((folder / "report.json").read_text())
    assert report["mixed"]["measured"] == measured
    assert report["mixed"]["counts"].keys() == {str(scheme.bits) for scheme in schemes.values()}
    assert report["mixed"]["rows"]["model.layers.*.mlp.down_proj"] == [
        schemes[f"model.layers.{i}.mlp.down_proj"].bits for i in range(2)
    ]
    worst = report["worst_layers"]
    assert len(worst) == 10 and [layer["end"] for layer in worst] == sorted(
        (w["end"] for w in worst), reverse=True
    )
    assert all(
        0 < layer["start"] < layer["nearest"] < 1 and layer["end"] == layer["start"]
        for layer in worst
    )


def test_what_the_user_names_stays_and_counts():
    model = tiny()
    pinned = {"down_proj": {"bits": 8}, "o_proj": {"group_size": 16}}
    job = jobs.prepare(
        mixing(model, target_bits=4.5, layer_config=pinned).recipe, mixing(model).loaded, texts()
    )
    schemes = job.plan.quantized
    assert all(scheme.bits == 8 for name, scheme in schemes.items() if name.endswith("down_proj"))
    assert all(
        scheme.group_size == 16 for name, scheme in schemes.items() if name.endswith("o_proj")
    )
    assert 4.2 < job.plan.bits_per_weight() <= 4.5
    assert not any(name.endswith("down_proj") for name in job.mixed["layers"])
    with pytest.raises(UserError, match=r"target_bits = 2.2: the least possible is \d"):
        jobs.prepare(mixing(model, target_bits=2.2).recipe, mixing(model).loaded, texts())


@pytest.mark.parametrize(
    "kl, best, warned",
    [((0.3, 0.2), "around", False), ((0.2, 0.3), "all", False), ((2, 3), "all", True)],
)
def test_of_several_choices_the_samples_pick_one(kl, best, warned, caplog):
    model = tiny()
    recipe = Recipe(group_size=32, algorithm="gptq", target_bits=4.1, bit_options="2,3,4,8")
    plan = make_plan(model, recipe)
    free = units(model, recipe, plan)
    names = [weight.name for unit in free for weight in unit.weights]
    # marks for the fake below
    choices = {"all": dict.fromkeys(names, 2), "around": dict.fromkeys(names, 7)}
    found = {2: kl[0], 7: kl[1], 3: 1.0, 4: 0.6}
    trial = SimpleNamespace(kl=lambda bits: torch.tensor([found[next(iter(bits.values()))]]))
    bits, seen = _tried(trial, choices, free, plan, 4.1)
    assert bits == choices[best] and seen["options"] == best and bool(caplog.records) == warned
    size = {b: make_plan(model, replace(recipe, bits=b)).bits_per_weight() for b in (3, 4)}
    line = 1 - 0.4 * (4.1 - size[3]) / (size[4] - size[3])
    assert seen["measured"] == {
        name: [pytest.approx(value)]
        for name, value in {"mixed": min(kl), "line": line, "3": 1.0, "4": 0.6}.items()
    }


def test_samples_are_told_apart_by_what_they_show():
    text, image = torch.zeros(10, dtype=torch.int8), torch.tensor([0, 1, 1, 0, 4], dtype=torch.int8)
    modalities = [Modalities(each) for each in (text, image, text, image, image)]
    sets = Sets.by_medium(modalities)
    assert sets == Sets(("text", "image"), (0, 1, 0, 1, 1))
    assert sets.choose(modalities, 20) == [0, 1, 3]  # 10 tokens of each
    assert sets.choose(modalities, 20, 1) == [0, 1]
    assert sets.choose(modalities, 20, share=0.4) == [0, 1]
    assert sets.choose(modalities, 20, without=[0, 1, 3]) == [2, 4]
    assert sets.choose(modalities, 20, without=[0, 1, 2, 3]) == [0, 4]  # no other text


@pytest.mark.parametrize(
    "words, part",
    [
        (
            ["--target_bits", "3.5", "--format", "auto_awq"],
            "format auto_awq holds 4 bits, not 2; change bit_options",
        ),
        (["--target_bits", "3.5", "--format", "auto_round,auto_awq"], "holds 4 bits, not 2"),
        (["--target_bits", "1.5"], "above 2, the least of bit_options"),
        (["--target_bits", "3.5", "--bit_options", "3,9"], "a comma list of 2 to 8"),
        (["--target_bits", "3.5", "--bit_options", "three"], "a comma list of 2 to 8"),
        (
            ["--target_bits", "6", "--data_type", "fp8", "--bits", "8", "--iters", "0"],
            "numbers are bits of integers, and data_type is fp8; name schemes",
        ),
        (["--target_bits", "6", "--bit_options", "NVFP4,FP9"], "such as NVFP4,FP8"),
        (
            ["--target_bits", "6", "--bit_options", "nvfp4,fp8", "--format", "gguf"],
            "gguf holds integers, not nvfp4",
        ),
        (["--target_bits", "6", "--bit_options", "NVFP4,FP8"], "llm_compressor holds nvfp4"),
        (
            ["--target_bits", "6", "--bit_options", "W8A8,4", "--format", "compressed_tensors"],
            "beside layers of another kind",
        ),
    ],
)
def test_what_cannot_be_mixed_is_one_line(words, part, capsys):
    assert main(["plan", "--model", "demo", "--device", "cpu", "--group_size", "32", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert part in line


@pytest.mark.slow
def test_plan_prints_the_chosen_bits(capsys, tmp_path):
    command = (
        "plan --model demo --dataset demo --nsamples 8 --seqlen 64 --device cpu --group_size 32"
        " --target_bits 4 --quant_nontext_module"
    )
    assert main(command.split()) == 0
    printed = capsys.readouterr().out
    (chosen,) = re.findall(r"mixed bits: ([^;]+);", printed)
    widths = set(re.findall(r"\d+ at (\d)", chosen))
    assert len(widths) > 1 and widths == set(re.findall(r"(\d) bits, group 32", printed))
