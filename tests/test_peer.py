"""Our published SignRound against auto-round's own, on the same rows: the same damage to every
block, within noise."""

import copy

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from auto_mmround import AutoRoundMLLM
from auto_mmround.model.loading import DEMO

pytest.importorskip("auto_round")


def first_block_error(model, reference, rows):
    """Mean squared error of the first block's output on the rows, relative to the output's mean
    square."""
    with torch.no_grad():
        got = model(rows, output_hidden_states=True).hidden_states[1]
        want = reference(rows, output_hidden_states=True).hidden_states[1]
    return ((got - want).square().mean() / want.square().mean()).item()


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 3])
def test_published_sign_round_does_what_auto_round_does(bits):
    from auto_round import AutoRound

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=2000,
        initializer_range=0.1,
    )  # fmt: skip
    reference = LlamaForCausalLM(config).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    errors = {"nearest": [], "ours": [], "auto-round": []}
    for seed in range(2):
        drawn = torch.randint(0, 2000, (80, 64), generator=torch.Generator().manual_seed(seed))
        rows, fresh = drawn[:64], drawn[64:]  # both are judged on rows that neither has seen
        common = dict(
            bits=bits,
            group_size=32,
            sym=True,
            iters=200,
            nsamples=64,
            seqlen=64,
            batch_size=8,
            seed=seed,
        )
        peer = AutoRound(
            copy.deepcopy(reference),
            tokenizer,
            dataset=[row[None] for row in rows],
            device_map="cpu",
            enable_torch_compile=False,
            **common,
        )
        data = [{"input_ids": row.tolist()} for row in rows]
        for name, options in (
            ("ours", {"algorithm": "sign_round"}),
            ("nearest", {"algorithm": "rtn"}),
        ):
            model = AutoRoundMLLM(
                copy.deepcopy(reference),
                tokenizer,
                dataset=data,
                device="cpu",
                amp=False,
                **common | options,
            ).quantize()[0]
            errors[name].append(first_block_error(model, reference, fresh))
        errors["auto-round"].append(first_block_error(peer.quantize()[0].float(), reference, fresh))
    means = {name: sum(found) / 2 for name, found in errors.items()}
    print(bits, means)
    assert means["ours"] < 1.05 * means["auto-round"] and means["ours"] < 0.9 * means["nearest"]
