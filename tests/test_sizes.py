"""Models of other sizes than those of `tiny_models`: layers that do not fit, several schemes, other
samples."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import mixtures
import pytest
import torch
from tiny_models import FAMILIES, Tiny, tiny_tokenizer

from auto_mmround.model.borrowed import borrowed, made_runnable
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs
from auto_mmround.verify.proof import prove
from auto_mmround.verify.static import check
from auto_mmround.verify.values import _against_source

pytestmark = pytest.mark.usefixtures("fast_disk")


def sized(model_type: str, sizes: dict[str, Any]) -> Tiny:
    """The family with other values in its configuration; "text_config.head_dim" is deeper."""
    config = copy.deepcopy(FAMILIES[model_type].config)
    for name, value in sizes.items():
        *parts, last = name.split(".")
        place = config
        for part in parts:
            place = place[part]
        place[last] = value
    return replace(FAMILIES[model_type], config=config)


def planned(family: Tiny, folder: Path, **more: Any) -> jobs.Job:
    """A run that is ready to start; rounding to nearest, unless ``more`` says otherwise."""
    family.save(folder / "model", tiny_tokenizer())
    settings: dict[str, Any] = dict(
        model=str(folder / "model"), output_dir=str(folder / "out"), bits=4, group_size=32,
        iters=0, nsamples=2, seqlen=12, amp=False, device="cpu",
    )  # fmt: skip
    recipe = Recipe(**settings | more)
    rows = family.samples() if recipe.needs_samples else None
    return jobs.prepare(recipe, jobs.load_model(recipe), dataset=rows)


def about_names(out: Path) -> list[str]:
    """What is wrong with names in a configuration. Optimum reads one scheme for all, and is left
    out."""
    words = ("vLLM", "fits no layer")
    return [found.message for found in check(out) if any(word in found.message for word in words)]


KEPT = [
    ("whisper", "fc1"),
    ("whisper", "layers.1.fc2"),
    ("qwen3_omni_moe", "re:.*visual.blocks.0.mlp"),
    ("qwen2_vl", "re:.*visual.blocks.0.mlp"),
]


@pytest.mark.parametrize("fmt", ["compressed_tensors", "auto_gptq", "auto_round", "auto_awq"])
@pytest.mark.parametrize(("model_type", "kept"), KEPT)
def test_layers_that_stay_are_named_as_vllm_spells_them(fmt, model_type, kept, tmp_path):
    """vLLM renames Whisper's `fc1.` and Qwen3-Omni's `thinker.`, but no patterns."""
    job = planned(
        FAMILIES[model_type], tmp_path, format=fmt, quant_nontext_module=True, fp_layers=kept
    )
    (out,) = jobs.run(job, prove=prove)
    assert not about_names(out)


@pytest.mark.parametrize("fmt", ["compressed_tensors", "auto_gptq", "auto_round"])
def test_other_schemes_are_named_as_vllm_spells_them(fmt, tmp_path):
    job = planned(
        FAMILIES["whisper"], tmp_path, format=fmt, quant_nontext_module=True,
        layer_config={"fc1": {"bits": 8}},
    )  # fmt: skip
    assert {scheme.bits for scheme in job.plan.schemes} == {4, 8}
    (out,) = jobs.run(job, prove=prove)
    assert not about_names(out)


@pytest.mark.parametrize("fmt", ["auto_round", "auto_awq", "fake"])
def test_a_matrix_of_one_value_is_no_error(fmt, tmp_path):
    """Blocks that were added to a model begin with zeros; correlation says nothing there."""
    model, folder = FAMILIES["llama"].build(), tmp_path / "model"
    for parameter, value in (("self_attn.o_proj", 0.0), ("mlp.down_proj", 0.25)):
        model.get_parameter(f"model.layers.1.{parameter}.weight").fill_(value)
    model.lm_head.weight.zero_()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    recipe = Recipe(
        model=str(folder), output_dir=str(tmp_path / "out"), format=fmt, group_size=32, iters=0,
        device="cpu", amp=False, sym=fmt == "auto_round",
    )  # fmt: skip
    (out,) = jobs.run(jobs.prepare(recipe, jobs.load_model(recipe)), prove=prove)
    assert not [found for found in check(out, folder) if found.severity == "error"]


def test_a_matrix_of_one_value_must_decode_to_it():
    zero, quarter = torch.zeros(8, 16), torch.full((8, 16), 0.25)
    near = quarter + 0.02 * torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    for decoded, wanted, right in [
        (zero, zero, True), (near, quarter, True), (quarter, quarter, True),
        (quarter, zero, False), (zero, quarter, False), (torch.randn(8, 16), zero, False),
    ]:  # fmt: skip
        assert (not list(_against_source("w", decoded, wanted))) == right


@pytest.mark.parametrize("iters", [0, 1])
def test_experts_whose_rows_do_not_suit_the_grouped_product(iters, tmp_path):
    """36 channels in bfloat16 are 72 bytes; torch wants a multiple of 16, and Transformers does not
    look."""
    family = sized("qwen3_moe", {"moe_intermediate_size": 36})
    job = planned(
        family, tmp_path, iters=iters, group_size=-1, model_dtype="bfloat16", amp=True,
        format="fake",
    )  # fmt: skip
    experts = [name for name in job.plan.quantized if ".experts." in name]
    assert experts
    jobs.run(job, prove=prove)


def test_a_model_gets_its_own_experts_back(tmp_path):
    family = sized("qwen3_moe", {"moe_intermediate_size": 36})
    model = family.build().to(torch.bfloat16)
    before = model.config._experts_implementation
    with borrowed(model):
        model(torch.arange(8)[None])
    assert model.config._experts_implementation == before != "eager"


def test_the_rows_of_inputs_count_too():
    """gpt-oss keeps its matrices as (in, out): 44 channels go into a matrix of 64."""
    config = mixtures.config_of("gpt_oss")
    config.intermediate_size = 44
    model = mixtures.class_of("gpt_oss")(config).bfloat16().eval()
    with pytest.raises(RuntimeError, match="strides"):
        model(torch.arange(8)[None])
    made_runnable(model)
    model(torch.arange(8)[None])
