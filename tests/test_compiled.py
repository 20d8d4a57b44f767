"""Compiled blocks: one compilation for all blocks of a class, the same outputs and gradients, eager
where it fails."""

import logging
from dataclasses import replace

import pytest
import torch
from tiny_models import FAMILIES, tiny_tokenizer
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import TorchDynamoException
from transformers import LlamaConfig, LlamaForCausalLM
from two_processes import mixed_inputs, tiny_model

from auto_mmround.model import devices
from auto_mmround.model.capture import capture
from auto_mmround.model.chains import run_plainly
from auto_mmround.model.compiled import Compiled
from auto_mmround.model.loading import load
from auto_mmround.model.structure import find_stages
from auto_mmround.numerics.float_grids import FloatGrid
from auto_mmround.numerics.grids import Grid
from auto_mmround.numerics.rounding import PLAIN, Kernels, Rounding, moved, put
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import session
from auto_mmround.run.finished import Finished
from auto_mmround.run.pipeline import quantize
from auto_mmround.run.plan import make_plan


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        vocab_size=50,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def chain_of(model, lengths):
    inputs = [{"input_ids": torch.randint(0, 50, (1, length))} for length in lengths]
    return capture(model, find_stages(model), inputs)["model.layers"]


def test_one_compilation_serves_all_blocks():
    model, made = tiny_llama(), []

    def counting(graph, inputs):
        made.append(graph)
        return graph.forward

    chain = chain_of(model, [12, 12, 12])
    compiled = replace(chain, runner=Compiled(counting))
    for index, block in enumerate(model.model.layers):
        torch.testing.assert_close(
            compiled.advanced([block], index, 1).hidden, chain.advanced([block], index, 1).hidden
        )
    assert len(made) == 1
    grads = []
    for some in (chain, compiled):
        block = model.model.layers[1]
        block.requires_grad_(True)
        some.run_group([block], 1, [0]).square().sum().backward()
        grads.append([p.grad.clone() for p in block.parameters()])
        block.requires_grad_(False).zero_grad()
    torch.testing.assert_close(grads[0], grads[1])
    assert len(made) == 2  # with gradients the code is another


def test_varying_lengths_become_symbols():
    model, made = tiny_llama(), []

    def counting(graph, inputs):
        made.append(graph)
        return graph.forward

    chain = replace(chain_of(model, range(5, 25)), runner=Compiled(counting))
    chain.advanced([model.model.layers[0]], 0, 1)
    assert 1 <= len(made) <= 3


def test_a_failure_is_said_once_and_costs_nothing_but_speed(caplog):
    model = tiny_llama()

    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    chain = chain_of(model, [6, 9])
    with caplog.at_level(logging.WARNING):
        got = replace(chain, runner=Compiled(broken)).advanced([model.model.layers[0]], 0, 1).hidden
    torch.testing.assert_close(
        got, chain.advanced([model.model.layers[0]], 0, 1).hidden, rtol=0, atol=0
    )
    assert len([r for r in caplog.records if "uncompiled" in r.message]) == 1


def test_a_failure_in_the_backward_pass_costs_a_second_try(monkeypatch, caplog):
    """Its code is made when the first one is run, far from where blocks are called."""

    def broken(graph, inputs):
        raise TorchDynamoException("no compiler for gradients")

    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=lambda graph, inputs: graph.forward, bw_compiler=broken)
    monkeypatch.setitem(devices.TABLE, "cpu", replace(devices.TABLE["cpu"], compiler=backend))
    with caplog.at_level(logging.WARNING):
        compiled = quantized(enable_torch_compile=True, quant_nontext_module=False)
    assert len([r for r in caplog.records if "uncompiled" in r.message]) == 1
    plain = quantized(quant_nontext_module=False)
    for name, report in plain.reports.items():
        assert compiled.reports[name].end == pytest.approx(report.end, rel=0.05)


RECIPE = Recipe(bits=3, group_size=32, iters=2, batch_size=4, amp=False, quant_nontext_module=True)


def quantized(**changes):
    recipe, model, finished = replace(RECIPE, **changes), tiny_model(), Finished()
    quantize(model, recipe, make_plan(model, recipe), mixed_inputs(), finished)
    return finished


@pytest.mark.parametrize(
    "changes", [{}, {"algorithm": "gptq", "true_sequential": True}, {"retarget": True}]
)
def test_a_compiled_run_gives_the_codes_of_a_plain_one(changes, monkeypatch):
    """Compiled to the same operations, so to the bit: second moments, errors of layers and steps
    are all there."""
    made = []

    def counting(graph, inputs):
        made.append(graph)
        return graph.forward

    torch.compiler.reset()
    plain = quantized(**changes)
    monkeypatch.setitem(devices.TABLE, "cpu", replace(devices.TABLE["cpu"], compiler=counting))
    compiled = quantized(enable_torch_compile=True, **changes)
    assert made and all(report.layers for report in compiled.reports.values())
    for name, codes in plain.codes.items():
        assert all(torch.equal(a, b) for a, b in zip(codes[:3], compiled.codes[name][:3])), name
    for name, report in plain.reports.items():
        assert (
            compiled.reports[name].layers == report.layers
            and compiled.reports[name].end == report.end
        )


@pytest.mark.parametrize(
    "many, asked, compiles", [(2, None, True), (3, None, False), (2, False, False), (3, True, True)]
)
def test_where_compiling_pays_off_it_is_the_default(many, asked, compiles, monkeypatch):
    row = replace(devices.TABLE["cpu"], compiler="eager", compiles=True)
    monkeypatch.setitem(devices.TABLE, "cpu", row)
    monkeypatch.setattr(session, "MANY", many)  # the text has two blocks of a class
    model, recipe = tiny_model(), replace(RECIPE, enable_torch_compile=asked)
    made = session.Session(model, recipe, make_plan(model, recipe), mixed_inputs())
    assert isinstance(made.runner, Compiled) == compiles


def test_experts_are_not_compiled_unasked(monkeypatch):
    row = replace(devices.TABLE["cpu"], compiler="eager", compiles=True)
    monkeypatch.setitem(devices.TABLE, "cpu", row)
    monkeypatch.setattr(session, "MANY", 1)
    model = FAMILIES["qwen3_moe"].build()
    made = session.Session(model, Recipe(), make_plan(model, Recipe(group_size=32)), [])
    assert made.runner is run_plainly


def test_watched_layers_are_seen_by_hooks_that_come_after_compiling():
    model, seen = tiny_llama(), []
    chain = replace(chain_of(model, [12, 12]), runner=Compiled("eager"))
    block = model.model.layers[0]
    chain.advanced([block], 0, 1)
    handle = block.mlp.down_proj.register_forward_pre_hook(
        lambda layer, args: seen.append(args[0].shape)
    )
    chain.advanced([block], 0, 1)
    handle.remove()
    chain.advanced([block], 0, 1)
    assert len(seen) == 2


def test_streamed_blocks_are_compiled_once_a_class(tmp_path):
    FAMILIES["llama"].save(tmp_path, tiny_tokenizer())
    loaded, made = load(str(tmp_path), stream=True), []

    def counting(graph, inputs):
        made.append(graph)
        return graph.forward

    torch.compiler.reset()
    chain = replace(chain_of(loaded.model, [12, 12]), runner=Compiled(counting))
    for index, name in enumerate(chain.stage.blocks):
        with loaded.holder.resident([name]):
            chain.advanced([loaded.model.get_submodule(name)], index, 1)
    assert len(made) == 1


@pytest.mark.parametrize(
    "grid, size",
    [
        (Grid(4, True), 64),
        (Grid(3, False), 64),
        (Grid(4, False, scale_range=(0, 63)), 32),
        (FloatGrid("nvfp4", whole=50.0), 16),
    ],
)
def test_what_a_step_does_with_every_element_is_compiled_once_for_all_shapes(grid, size):
    torch.compiler.reset()
    made = []

    def counting(graph, inputs):
        made.append(graph)
        return graph.forward

    runner = Compiled(counting)
    kernels = Kernels(runner.of(moved), runner.of(put), in_pieces=False)
    for rows, columns in ((6, 256), (10, 512), (4, 768), (8, 256), (12, 1024)):
        w_OI, grad_OI = torch.randn(2, rows, columns).bfloat16()
        found = []
        for how in (PLAIN, kernels):
            own, into_OI = Rounding(w_OI.clone(), size, grid), torch.empty_like(w_OI)
            for step in range(3):
                own.step(grad_OI * (step - 1.5), 0.1 / (step + 1), 0.05, into_OI, how)
            found.append((into_OI, own.offset_OGg, own.ranges.factors_2OG))
        assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    assert 2 <= len(made) <= 6


def test_inductor_gives_the_codes_of_a_plain_run():
    torch.compiler.reset()
    changes = dict(quant_nontext_module=False, algorithm="gptq")
    plain, compiled = quantized(**changes), quantized(enable_torch_compile=True, **changes)
    assert plain.codes and plain.reports
    for name, codes in plain.codes.items():  # its kernels add in another order
        assert (codes.q_OI == compiled.codes[name].q_OI).float().mean() > 0.995
    for name, report in plain.reports.items():
        assert compiled.reports[name].end == pytest.approx(report.end, rel=1e-3)
        assert compiled.reports[name].layers.keys() == report.layers.keys()
