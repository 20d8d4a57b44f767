"""Every family through the whole journey: plan, calibrate, tune two steps, export twice, read back, compare."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, Tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from auto_mmround.evaluation.loader import from_quantized
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs

TYPES = [name for name, family in FAMILIES.items()]


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2", pad_token="w0")


def journey(family: Tiny, tokenizer, folder: Path) -> tuple[jobs.Job, list[Path]]:
    family.build().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    recipe = Recipe(
        model=str(folder / "model"), output_dir=str(folder / "out"), format="auto_round,auto_gptq", bits=4,
        group_size=32, iters=2, nsamples=16, seqlen=12, quant_nontext_module=True, amp=False, device="cpu",
        trust_remote_code=family.remote,
    )  # fmt: skip
    job = jobs.prepare(recipe, jobs.load_model(recipe), dataset=family.samples())
    return job, jobs.run(job)


def logits(model, samples) -> Iterator[torch.Tensor]:
    for sample in samples:
        yield model(**sample, use_cache=False).logits


@pytest.mark.parametrize("name", TYPES)
def test_journey(name, tokenizer, tmp_path):
    family = FAMILIES[name]
    job, folders = journey(family, tokenizer, tmp_path)
    assert tuple(stage.name for stage in job.plan.stages) == family.stages
    assert job.plan.quantized and len(job.inputs) == len(family.samples())
    journal = json.loads((folders[0] / "run.json").read_text())
    assert len(journal["blocks"]) == sum(stage.depth for stage in job.plan.stages)
    assert all(block["end"] <= block["start"] for block in journal["blocks"])
    tuned = job.loaded.model
    untouched = list(logits(family.build(), family.samples()))
    expected = list(logits(tuned, family.samples()))
    assert not any(torch.equal(one, two) for one, two in zip(untouched, expected))
    for folder in folders:
        model = from_quantized(folder, remote_code=family.remote).model
        state = model.state_dict()
        for key, tensor in tuned.state_dict().items():
            assert torch.equal(state[key], tensor), (folder.name, key)
        for ours, wanted in zip(logits(model, family.samples()), expected, strict=True):
            assert torch.equal(ours, wanted)
