"""What the report says of layers, and what errors weigh: as exact as it says, and without large
tensors."""

import pytest
import torch

from auto_mmround.model.chains import Chain, Modalities
from auto_mmround.model.fisher import Fisher
from auto_mmround.model.squares import ROWS, rows_of
from auto_mmround.model.structure import Stage
from auto_mmround.numerics.grids import Grid
from auto_mmround.numerics.moments import Moments, output_error
from auto_mmround.numerics.rounding import Rounding
from auto_mmround.numerics.start import StartConfig, closed_form
from auto_mmround.numerics.tuner import TunedWeight
from auto_mmround.run import layers
from auto_mmround.run.layers import LayerErrors
from auto_mmround.run.loss_weights import Weights

THREE_BITS = Grid(3, True)


def layer(rows, columns, grid=THREE_BITS):
    torch.manual_seed(0)
    weight_OI = torch.randn(rows, columns) * 0.02
    moments = Moments(columns)
    moments.add(
        torch.randn(3 * columns, columns) @ torch.randn(columns, columns), torch.rand(3 * columns)
    )
    parameter = torch.nn.Parameter(weight_OI.clone(), requires_grad=False)
    return TunedWeight(parameter, Rounding(weight_OI, 32, grid)), moments, weight_OI


@pytest.mark.parametrize(
    ("rows", "columns", "within"), [(96, 600, 3e-3), (512, 64, 3e-3), (1300, 300, 0.05)]
)
@pytest.mark.parametrize("grid", [Grid(3, True), Grid(4, False)])
def test_errors_of_layers_are_those_under_their_second_moments(
    rows, columns, within, grid, monkeypatch
):
    leaf, moments, weight_OI = layer(rows, columns, grid)
    hessian_II, zero_OI = moments.hessian(), torch.zeros_like(weight_OI)
    whole = output_error(weight_OI, zero_OI, hessian_II)
    errors, wanted = LayerErrors({"a": leaf, "unreached": leaf}, {"a": moments}), {}
    for when in ("nearest", "start"):
        if when == "start":
            closed_form([leaf.rounding], moments, StartConfig())
        wanted[when] = output_error(weight_OI, leaf.rounding.weight(), hessian_II) / whole
        with monkeypatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
            patch.setattr(Moments, "hessian", None)  # not made for this
            errors.note(when)
    errors.note("end", "start")
    found = errors.of({"a": leaf, "unreached": leaf})
    assert found == {"a": {**found["a"], "end": found["a"]["start"]}}
    assert wanted["start"] < 0.8 * wanted["nearest"]
    for when, value in wanted.items():
        assert found["a"][when] == pytest.approx(value, rel=within), when


def test_few_outputs_of_a_large_layer_are_looked_at(monkeypatch):
    leaf, moments, _ = layer(5 * layers.ROWS + 3, 32)
    sizes = []
    monkeypatch.setattr(Moments, "error", lambda self, error_OI: sizes.append(len(error_OI)) or 1.0)
    LayerErrors({"a": leaf}, {"a": moments}).note("nearest")
    assert len(sizes) == 2 and all(0.8 * layers.ROWS < size <= layers.ROWS for size in sizes)


@pytest.mark.parametrize("known", [True, False])
def test_weights_of_errors_are_rows_of_a_small_table(known):
    stage, channels = Stage("text", "layers", 1), 256
    tokens = [40, 64, 40, 9]
    torch.manual_seed(0)
    kinds = [Modalities(torch.randint(0, 5, (n,)).to(torch.int8)) for n in tokens]
    fisher = Fisher({"layers.0": torch.rand(ROWS, channels)} if known else {})
    weights = Weights(kinds, fisher)
    hidden = [torch.zeros(1, n, channels) for n in tokens]
    chain = Chain(stage, hidden, [[]] * 4, [{}] * 4, [0, 1, 2, 3])
    found = weights.of_errors(chain, "layers.0")
    assert sum(part.nbytes for part in found) < 4 * ROWS * channels + 16 * sum(tokens)
    table_RD = weights._table(stage, "layers.0")
    for group in ([1], [0, 2], [3]):
        rows = [rows_of(stage, kinds[i], tokens[i]) for i in group]
        expected = torch.cat([table_RD[row[None]] for row in rows])
        assert torch.equal(found.of(group, expected.shape[:2]), expected)
    assert (expected[kinds[3].text_T[None] == 4] == 0).all()
