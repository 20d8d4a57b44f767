from dataclasses import replace

import pytest
import torch
from tiny_models import FAMILIES
from torch import nn
from transformers.pytorch_utils import Conv1D

from auto_mmround.calibration.inputs import ModelInput
from auto_mmround.numerics.grids import Grid, dequantize
from auto_mmround.numerics.rounding import Rounding
from auto_mmround.numerics.tuner import (
    TuneConfig,
    TunedWeight,
    held_out_split,
    mean_error,
    squared_error,
    tune_block,
)
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run.finished import Finished
from auto_mmround.run.pipeline import quantize
from auto_mmround.run.plan import make_plan


def problem(seed=0, lengths=(5, 9, 5, 7) * 8, bits=2, pads=0):
    torch.manual_seed(seed)
    block = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32)).requires_grad_(False)
    mix = torch.randn(32, 32) / 6
    inputs = [torch.randn(1, n, 32) @ mix for n in lengths]
    targets = [block(x) for x in inputs]
    weights = [torch.ones(1, n, 1) for n in lengths]
    if pads:
        inputs = [torch.cat([x, 9 * torch.randn(1, pads, 32)], 1) for x in inputs]
        targets = [torch.cat([y, torch.zeros(1, pads, 32)], 1) for y in targets]
        weights = [torch.cat([w, torch.zeros(1, pads, 1)], 1) for w in weights]
    tuned = [
        TunedWeight(m.weight, Rounding(m.weight.clone(), 16, Grid(bits, True)))
        for m in (block[0], block[2])
    ]

    def forward(indices):
        for i in indices:
            yield block(inputs[i]), targets[i], weights[i]

    return tuned, forward, len(lengths)


def test_tuning_lowers_the_held_out_error_and_codes_equal_the_weights():
    tuned, forward, count = problem()
    result = tune_block(tuned, forward, count, TuneConfig(iters=60, batch_size=4))
    assert result.end < 0.6 * result.start
    for weight in tuned:
        assert torch.equal(weight.parameter, dequantize(weight.rounding.codes()))
        assert weight.parameter.grad is None and not weight.parameter.requires_grad
    assert mean_error(forward, held_out_split(count)[1], 4) == result.end


def test_zero_iterations_round_to_nearest():
    tuned, forward, count = problem()
    result = tune_block(tuned, forward, count, TuneConfig(iters=0))
    assert result.start == result.end > 0
    assert all((w.rounding.offset_OGg == 0).all() for w in tuned)


def test_never_worse_than_the_start():
    tuned, forward, count = problem()
    result = tune_block(tuned, forward, count, TuneConfig(iters=4, lr=50.0))
    assert result.end == result.start and result.best_iter == 0


def test_keep_last_when_asked():
    tuned, forward, count = problem()
    result = tune_block(tuned, forward, count, TuneConfig(iters=4, lr=50.0, keep_best=False))
    assert result.best_iter == 4 and result.end > result.start


def test_same_seed_same_bits_and_accumulation_is_one_batch():
    def offsets(**options):
        tuned, forward, count = problem()
        tune_block(tuned, forward, count, TuneConfig(iters=8, **options))
        return [w.rounding.offset_OGg for w in tuned]

    once, again = offsets(batch_size=4), offsets(batch_size=4)
    assert all(torch.equal(a, b) for a, b in zip(once, again))
    split = offsets(batch_size=1, samples=4)
    agreement = [(a.sub(b).abs() < 1e-6).float().mean() for a, b in zip(once, split)]
    assert min(agreement) > 0.98  # up to the order of float sums


PARTS = [(8, 1), (4, 2), (2, 4), (1, 8)]  # samples at a time, parts a step


def with_steps_counted(tuned):
    counts = [0] * len(tuned)

    def counted(i, step):
        def take(*args):
            counts[i] += 1
            step(*args)

        return take

    for i, weight in enumerate(tuned):
        weight.rounding.step = counted(i, weight.rounding.step)
    return counts


@pytest.mark.parametrize("kind", ["dense", "used twice", "experts"])
def test_a_step_gives_the_same_codes_in_one_part_and_in_many(kind):
    """In float64, where the order of sums does not turn signs. Each sample reaches one expert of
    four, or none."""

    def tune(batch_size, accumulate):
        torch.manual_seed(0)
        layers = [
            nn.Linear(32, 32, bias=False, dtype=torch.float64).requires_grad_(False)
            for _ in range(4)
        ]
        inputs = [torch.randn(1, 6, 32, dtype=torch.float64) for _ in range(40)]

        def run(i):
            if kind == "experts":
                return layers[i % 3](inputs[i])
            if kind == "used twice":
                return layers[3](layers[0](layers[0](inputs[i])).tanh())
            return layers[1](layers[0](inputs[i]).tanh())

        targets = [run(i) for i in range(40)]
        tuned = [
            TunedWeight(m.weight, Rounding(m.weight.clone(), 16, Grid(3, True))) for m in layers
        ]
        counts = with_steps_counted(tuned)

        def forward(indices):
            for i in indices:
                yield run(i), targets[i], torch.ones(1, 6, 1)

        config = TuneConfig(
            iters=12, batch_size=batch_size, samples=batch_size * accumulate, keep_best=False
        )
        result = tune_block(tuned, forward, 40, config)
        return [weight.rounding.codes() for weight in tuned], counts, result

    whole, steps, result = tune(*PARTS[0])
    assert result.best_iter == 12 and steps[0] > 10 and min(steps) == 0  # one layer is in no step
    for parts in PARTS[1:]:
        codes, counts, _ = tune(*parts)
        assert counts == steps, parts
        assert all(
            torch.equal(a, b) for one, two in zip(codes, whole) for a, b in zip(one[:3], two[:3])
        ), parts


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_models_codes_are_the_same_in_one_part_and_in_many(name):
    inputs, codes = [], []
    for i in range(24):
        words = torch.randint(3, 100, (1, 5), generator=torch.Generator().manual_seed(i))
        modalities, answers = torch.zeros(5, dtype=torch.int8), torch.ones(5, dtype=torch.bool)
        inputs.append(ModelInput(str(i), {"input_ids": words}, modalities, answers))
    for batch_size, accumulate in PARTS:
        model = FAMILIES[name].build().double()
        if name == "qwen3_moe":
            model.set_experts_implementation("eager")  # Transformers' faster ones know no float64
        recipe = Recipe(
            bits=3, group_size=32, algorithm="sign_round", iters=6, amp=False, not_use_best_mse=True
        )
        recipe = replace(recipe, batch_size=batch_size, gradient_accumulate_steps=accumulate)
        finished = Finished()
        quantize(model, recipe, make_plan(model, recipe), inputs, finished)
        assert {report.best_iter for report in finished.reports.values()} == {6}
        codes.append(finished.codes)
    for parts, other in zip(PARTS[1:], codes[1:]):
        differ = [
            n
            for n in other
            if not all(torch.equal(a, b) for a, b in zip(other[n][:3], codes[0][n][:3]))
        ]
        assert not differ, parts


def test_masked_tokens_weigh_nothing():
    plain = problem()
    padded = problem(pads=3)
    a = tune_block(*plain, TuneConfig(iters=6, batch_size=4))
    b = tune_block(*padded, TuneConfig(iters=6, batch_size=4))
    assert abs(a.start - b.start) < 1e-6 * a.start + 1e-9 and abs(a.end - b.end) < 1e-3 * a.end


def test_patience_stops_early():
    tuned, forward, count = problem()
    steps = []
    config = TuneConfig(iters=100, lr=50.0, patience=20, checks=100)
    tune_block(tuned, forward, count, config, on_step=steps.append)
    assert len(steps) == 20


def test_few_samples_are_used_for_both():
    assert held_out_split(3) == ([0, 1, 2], [0, 1, 2])
    train, held = held_out_split(128)
    assert len(held) == 8 and len(train) == 120 and not set(train) & set(held)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Conv2d(3, 24, 4, stride=4), (1, 3, 16, 16)),
        (lambda: nn.Conv3d(3, 24, (2, 4, 4), stride=(2, 4, 4)), (1, 3, 2, 16, 16)),
        (lambda: Conv1D(24, 48), (1, 10, 48)),
    ],
)
def test_patch_embeddings_and_transposed_layers_are_tuned_like_linear_ones(layer, shape):
    """Any parameter whose rows are outputs: the module stays as it is, its own parameter holds
    W~."""
    torch.manual_seed(0)
    block = layer().requires_grad_(False)
    # alike, or nearest is best
    inputs = [torch.randn(1) + 0.3 * torch.randn(shape) for _ in range(32)]

    def run(x):
        y = block(x)
        return y if y.ndim == 3 else y.flatten(2).transpose(1, 2)

    targets = [run(x) for x in inputs]
    transposed = isinstance(block, Conv1D)
    rows = block.weight.t() if transposed else block.weight.flatten(1)
    tuned = TunedWeight(block.weight, Rounding(rows.clone(), 16, Grid(2, True)), transposed)

    def forward(indices):
        for i in indices:
            yield run(inputs[i]), targets[i], torch.ones(*targets[i].shape[:2], 1)

    result = tune_block([tuned], forward, 32, TuneConfig(iters=40, batch_size=8))
    assert result.end < 0.9 * result.start
    decoded = dequantize(tuned.rounding.codes())
    assert torch.equal(block.weight, decoded.t() if transposed else decoded.view_as(block.weight))


def test_trimmed_errors_leave_out_the_largest():
    torch.manual_seed(0)
    output, target, weight = torch.randn(2, 50, 40), torch.randn(2, 50, 40), torch.ones(2, 50, 1)
    output[0, 3, 5] += 1e4
    errors = (output - target).square().flatten().sort().values
    trimmed = squared_error(output, target, weight, trim=0.001)
    torch.testing.assert_close(trimmed, errors[: int(4000 * 0.999)].sum(), rtol=1e-3, atol=0)
    assert squared_error(output, target, weight) > 1e8
    leaf = output.clone().requires_grad_()
    squared_error(leaf, target, weight, trim=0.001).backward()
    assert leaf.grad[0, 3, 5] == 0 and (leaf.grad != 0).sum() >= 3990
