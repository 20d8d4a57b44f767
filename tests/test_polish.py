"""KL polish: what it learns is what autograd says, and it stays only if it helps."""

import json

import pytest
import torch
from nearest import round_to_nearest
from test_journey import run
from test_start import tiny_text_model

from auto_mmround.calibration.inputs import ModelInput
from auto_mmround.checkpoint.loader import from_quantized
from auto_mmround.errors import UserError
from auto_mmround.modalities import PAD
from auto_mmround.numerics.grids import Grid
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import polish as polishing
from auto_mmround.run.plan import Plan
from auto_mmround.run.polish import PolishSteps, listen, norm_weights, polish
from auto_mmround.run.session import Session

SYM3 = Grid(3, True)


def subject(grid=SYM3):
    """A tiny model whose layers of one block were rounded to nearest, its codes, and what it said
    before."""
    torch.manual_seed(0)
    model = tiny_text_model().requires_grad_(False)
    inputs = [
        ModelInput(str(i), {"input_ids": torch.randint(0, 50, (1, 12))}, torch.zeros(12,
            dtype=torch.int8),
                   torch.zeros(12, dtype=torch.bool))
        for i in range(20)
    ]  # fmt: skip
    teacher = listen(Session(model, Recipe(amp=False), Plan((), (), ()), inputs))
    names = [
        n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n
    ]
    codes = {
        name: round_to_nearest(model.get_submodule(name).weight.data, 16, grid) for name in names
    }
    for name, leaf in leaves(model, codes, grid).items():
        leaf.refresh()
        assert torch.equal(leaf.codes().scale_OG, codes[name].scale_OG)
    return model, codes, teacher


def leaves(model, codes, grid):
    return {name: polishing._Leaf.of(model, name, codes[name], grid) for name in codes}


@pytest.mark.parametrize("grid", [SYM3, Grid(8, False), Grid(2, True)])
def test_held_out_divergence_falls_and_integers_stay(grid):
    model, codes, teacher = subject(grid)
    norms = [p.clone() for p in norm_weights(model)]
    found = polish(model, codes, dict.fromkeys(codes, grid), teacher, PolishSteps(12, 5e-3))
    assert found.after < found.before if grid.bits < 8 else found.after <= found.before
    for name in codes:
        mine = found.codes[name]
        assert torch.equal(mine.q_OI, codes[name].q_OI) and mine.scale_OG.dtype == torch.float16
        parameter = model.get_submodule(name).weight
        assert not parameter.requires_grad and parameter.grad is None
    if grid.bits == 2:
        assert any(not torch.equal(a, b) for a, b in zip(norms, norm_weights(model)))


def test_what_does_not_help_is_taken_back():
    model, codes, teacher = subject()
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = polish(model, codes, dict.fromkeys(codes, SYM3), teacher, PolishSteps(2, 30.0))
    assert found.after == found.before
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(torch.equal(found.codes[name].scale_OG, codes[name].scale_OG) for name in codes)


def test_gradients_of_factors_are_those_of_autograd():
    model, codes, teacher = subject()
    held = leaves(model, codes, SYM3)
    norms = [polishing._Norm.of(p) for p in norm_weights(model)]
    with polishing._learning([*held.values(), *norms]):
        teacher.only([3]).divergences(model, gradients=True, mean=True)
    name = next(iter(held))
    factor = torch.ones_like(held[name].factor, requires_grad=True)
    scale = codes[name].scale_OG.float() * factor
    weight = (held[name].centred_OGg * scale[..., None]).flatten(1)
    logits = torch.func.functional_call(
        model, {f"{name}.weight": weight}, kwargs=dict(teacher.inputs[3])
    ).logits[0]
    wanted = model.lm_head(teacher.hidden_TD[3]).log_softmax(-1)
    (wanted.exp() * (wanted - logits.log_softmax(-1))).sum(-1).mean().backward()
    torch.testing.assert_close(held[name].factor.grad, factor.grad, rtol=1e-3, atol=1e-6)


def test_padding_does_not_count():
    model, _, _ = subject()
    kinds = torch.tensor([0] * 8 + [PAD] * 4, dtype=torch.int8)
    kwargs = {"input_ids": torch.randint(0, 50, (1, 12))}
    padded = ModelInput("0", kwargs, kinds, torch.zeros(12, dtype=torch.bool))
    before = listen(Session(model, Recipe(amp=False), Plan((), (), ()), [padded]))
    was = model(**kwargs).logits[0].log_softmax(-1)
    model.model.layers[0].mlp.down_proj.weight.data.mul_(1.3)
    kl_T = (was.exp() * (was - model(**kwargs).logits[0].log_softmax(-1))).sum(-1)
    assert before.positions == 8
    assert before.divergences(model) == [pytest.approx(kl_T[:8].sum().item(), rel=1e-3)]


def test_the_checkpoint_holds_what_was_polished(tmp_path, monkeypatch):
    monkeypatch.setattr(
        polishing.polish, "__kwdefaults__", {**polishing.polish.__kwdefaults__, "rate": 2e-3}
    )
    job, (folder,) = run(tmp_path, polish=True, bits=3, algorithm="rtn", format="auto_round")
    polished = json.loads((folder / "run.json").read_text())["polish"]
    assert polished["after"] < polished["before"]
    tuned, decoded = job.loaded.model.state_dict(), from_quantized(folder).model.state_dict()
    assert all(torch.equal(decoded[name], tuned[name]) for name in tuned)


@pytest.mark.parametrize(
    "options", [{"stream": True}, {"data_type": "fp8", "bits": 8, "group_size": -1, "iters": 0}]
)
def test_what_can_not_be_polished_is_one_line(options):
    with pytest.raises(UserError, match="polish"):
        Recipe(polish=True, **options)
