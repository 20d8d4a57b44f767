"""Every family through the whole journey: plan, calibrate, tune two steps, export twice, read back, compare."""

import json
import os
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, Tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from auto_mmround.evaluation.loader import from_quantized
from auto_mmround.model.capture import capture, recapture
from auto_mmround.model.chains import difference
from auto_mmround.model.structure import find_stages, linears
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2", pad_token="w0")


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def journey(family: Tiny, tokenizer, folder: Path) -> tuple[jobs.Job, list[Path]]:
    family.save(folder / "model", tokenizer)
    recipe = Recipe(
        model=str(folder / "model"), output_dir=str(folder / "out"), format="auto_round,auto_gptq", bits=4,
        group_size=32, iters=2, nsamples=16, seqlen=12, quant_nontext_module=True, amp=False, device="cpu",
        trust_remote_code=bool(family.standin),
    )  # fmt: skip
    job = jobs.prepare(recipe, jobs.load_model(recipe), dataset=family.samples())
    return job, jobs.run(job)


def logits(model, job) -> list[torch.Tensor]:
    return [model(**sample.kwargs, use_cache=False).logits for sample in job.inputs]


@pytest.mark.parametrize("name", FAMILIES)
def test_journey(name, tokenizer, tmp_path):
    family = FAMILIES[name]
    job, folders = journey(family, tokenizer, tmp_path)
    assert tuple(stage.name for stage in job.plan.stages) == family.stages
    assert job.plan.quantized and len(job.inputs) == len(family.samples())
    journal = json.loads((folders[0] / "run.json").read_text())
    assert len(journal["blocks"]) == sum(stage.depth for stage in job.plan.stages)
    assert all(block["end"] <= block["start"] for block in journal["blocks"])
    tuned = job.loaded.model
    untouched, expected = logits(family.build(), job), logits(tuned, job)
    assert not any(torch.equal(one, two) for one, two in zip(untouched, expected, strict=True))
    for folder in folders:
        model = from_quantized(folder, remote_code=bool(family.standin)).model
        state = model.state_dict()
        for key, tensor in tuned.state_dict().items():
            assert torch.equal(state[key], tensor), (folder.name, key)
        for ours, wanted in zip(logits(model, job), expected, strict=True):
            assert torch.equal(ours, wanted)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.standin])
def test_the_student_sees_what_the_changed_model_sees(name):
    """Blocks change one after the other, as quantizing does; the chain must end where the changed model ends."""
    family = FAMILIES[name]
    model, inputs = family.build(), family.samples()
    for stage in find_stages(model):
        chain = capture(model, [stage], inputs)[stage.path]
        for index, path in enumerate(stage.blocks):
            block = model.get_submodule(path)
            for _, layer in linears(block):
                layer.weight.data *= 1.1
            chain = chain.advanced([block], index, 4)
            if chain.live and index + 1 < stage.depth:
                chain = recapture(model, chain, index + 1, inputs)
        fresh = capture(model, [stage], inputs)[stage.path]
        blocks = [model.get_submodule(path) for path in stage.blocks]
        for i, hidden in enumerate(chain.hidden):
            assert difference(hidden, fresh.run_group(blocks, 0, [i])) < 1e-5
