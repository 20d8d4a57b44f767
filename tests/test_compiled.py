"""Compiled blocks: one compilation for all blocks of a class, the same outputs and gradients, eager where it fails."""

import logging
from dataclasses import replace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from auto_mmround.model.capture import capture
from auto_mmround.model.compiled import Compiled
from auto_mmround.model.structure import find_stages


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, vocab_size=50
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
    torch.testing.assert_close(got, chain.advanced([model.model.layers[0]], 0, 1).hidden, rtol=0, atol=0)
    assert len([r for r in caplog.records if "uncompiled" in r.message]) == 1
