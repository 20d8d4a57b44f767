"""Scales of keys and values: measured where engines apply them, written where they look, read back,
and judged."""

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from auto_mmround import AutoRoundMLLM, cli
from auto_mmround.checkpoint.loader import from_quantized
from auto_mmround.errors import UserError
from auto_mmround.model.kv_cache import cached_attention, changing
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs
from auto_mmround.verify.proof import prove
from auto_mmround.verify.static import check

CONFIG = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


def run(folder: Path, name: str = "llama", model=None, **changes) -> tuple[Path, jobs.Job]:
    FAMILIES[name].save(folder / "model", tiny_tokenizer())
    if model is not None:
        model.save_pretrained(folder / "model")
    values = dict(
        model=str(folder / "model"), output_dir=str(folder), format="compressed_tensors",
        group_size=32, iters=2, nsamples=4, seqlen=12, amp=False, device="cpu",
        kv_cache_scheme="fp8",
    )  # fmt: skip
    recipe = Recipe(**values | changes)
    job = jobs.prepare(recipe, jobs.load_model(recipe), dataset=FAMILIES[name].samples(4))
    (made,) = jobs.run(job, prove=prove)
    return made, job


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return run(tmp_path_factory.mktemp("kv"))


def test_from_python_they_are_the_same(made, tmp_path):
    folder, job = made
    names = ("format", "group_size", "iters", "nsamples", "seqlen", "amp", "kv_cache_scheme")
    options = {name: getattr(job.recipe, name) for name in names}
    samples = FAMILIES["llama"].samples(4)
    mine = AutoRoundMLLM(job.recipe.model, dataset=samples, device="cpu", **options)
    mine.quantize()
    (out,) = mine.save_quantized(tmp_path / "out", format="compressed_tensors")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"] == CONFIG
    wanted, got = (load_file(each / "model.safetensors") for each in (folder, out))
    assert wanted.keys() == got.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())
    with pytest.raises(UserError, match="has no place for scales of keys and values"):
        mine.save_quantized(tmp_path / "other", format="auto_round")


def seen(model, inputs):
    """Attention -> largest key and value that go into the cache."""
    peaks = {}

    def watch(name):
        def see(key, value):
            old = peaks.get(name, (0.0, 0.0))
            peaks[name] = tuple(
                max(peak, x.abs().max().item()) for peak, x in zip(old, (key, value))
            )
            return key, value

        return see

    changes = {name: watch(name) for name in cached_attention(model)}
    with torch.no_grad(), changing(model, changes):
        for sample in inputs:
            model(**sample.kwargs, use_cache=False)
    return peaks


def test_scales_are_those_of_what_the_quantized_model_caches(made):
    folder, job = made
    tensors = load_file(folder / "model.safetensors")
    peaks = seen(job.loaded.model, job.inputs)
    assert len(peaks) == 2
    for name, both in peaks.items():
        for part, peak in zip(("k_scale", "v_scale"), both, strict=True):
            scale = tensors[f"{name}.{part}"]
            assert scale.shape == (1,) and scale.item() == pytest.approx(peak / 448, rel=1e-5)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"] == CONFIG
    assert check(folder, Path(job.recipe.model)) == []


def test_our_reader_rounds_keys_and_values_as_compressed_tensors_does(made):
    folder, job = made
    plain, ours = from_quantized(folder).model, from_quantized(folder, activations=True).model
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    attention = theirs.model.layers[0].self_attn
    assert attention.k_scale.item() == pytest.approx(
        load_file(folder / "model.safetensors")["model.layers.0.self_attn.k_scale"].item()
    )
    ids = job.inputs[0].kwargs["input_ids"]
    with torch.no_grad():
        got, wanted, exact = (model(input_ids=ids).logits for model in (ours, theirs, plain))
        step = ours(input_ids=ids[:, -1:], past_key_values=ours(ids[:, :-1]).past_key_values)
    assert (got - exact).norm() > 1e-3 * exact.norm()
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(step.logits[0, -1], got[0, -1], rtol=1e-4, atol=1e-4)


def test_attention_with_a_scheme_for_its_cache_is_no_quantized_layer(made):
    """`verify` counted it, and called checkpoints wrong that have a layer more by that."""
    place = Path(__file__).parents[1] / "engines" / "engine_transformers.py"
    counting = spec_from_file_location("engine_transformers", place)
    program = module_from_spec(counting)
    counting.loader.exec_module(program)
    theirs = AutoModelForCausalLM.from_pretrained(made[0])
    assert hasattr(theirs.model.layers[0].self_attn, "quantization_scheme")
    assert program.linear_classes(theirs)[1] == len(made[1].plan.quantized)


@pytest.mark.parametrize("changes", [{"algorithm": "rtn"}, {"stream": True}, {"act_bits": 8}])
def test_other_ways_to_it(changes, tmp_path):
    folder, _ = run(tmp_path, "qwen2_vl", **changes)
    names = [n for n in load_file(folder / "model.safetensors") if n.endswith("_scale")]
    assert {n.rpartition(".")[2] for n in names} >= {"k_scale", "v_scale"}
    # where the source's attention lies
    assert "model.layers.0.self_attn.v_scale" in names
    assert not any("visual" in n for n in names if n.endswith(("k_scale", "v_scale")))
    assert not [f for f in check(folder) if f.severity == "error"]
    from_quantized(folder, activations=True)


def test_a_scale_for_each_head(tmp_path):
    config = FAMILIES["llama"].build().config
    config.num_key_value_heads = 2
    torch.manual_seed(0)
    folder, job = run(tmp_path, model=LlamaForCausalLM(config), kv_cache_scheme="fp8_head")
    tensors = load_file(folder / "model.safetensors")
    heads, found = job.loaded.model.config.num_key_value_heads, {}

    def watch(name):
        def see(key, value):
            for part, x in (("k_scale", key), ("v_scale", value)):
                peak, place = x.abs().amax((0, 2, 3)), f"{name}.{part}"
                found[place] = torch.maximum(found.get(place, peak), peak)
            return key, value

        return see

    changes = {name: watch(name) for name in cached_attention(job.loaded.model)}
    with torch.no_grad(), changing(job.loaded.model, changes):
        for sample in job.inputs:
            job.loaded.model(**sample.kwargs, use_cache=False)
    for place, peak_H in found.items():
        assert tensors[place].shape == (heads, 1, 1) and heads > 1
        torch.testing.assert_close(tensors[place].flatten(), peak_H / 448, rtol=1e-5, atol=0)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"] == CONFIG | {"strategy": "attn_head"}
    assert check(folder, Path(job.recipe.model)) == []
    ours = from_quantized(folder, activations=True).model
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    ids = job.inputs[0].kwargs["input_ids"]
    with torch.no_grad():
        got, wanted = (model(input_ids=ids).logits for model in (ours, theirs))
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
    line = damaged((folder, job), tmp_path, lambda t: t.update({NAME: torch.ones(3, 1, 1)}))
    assert "is for 3 heads, which" in line
    (tmp_path / "b").mkdir()
    line = damaged((folder, job), tmp_path / "b", lambda t: t.update({NAME: torch.ones(1)}))
    assert "no number for each head" in line
    with pytest.raises(UserError, match="of one number for each head"):
        from_quantized(tmp_path / "b" / "copy", activations=True)


def damaged(made, tmp_path, change, config=lambda options: options):
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in made[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "run.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    text = json.loads((folder / "config.json").read_text())
    config(text["quantization_config"])
    (folder / "config.json").write_text(json.dumps(text))
    found = [finding for finding in check(folder) if finding.severity == "error"]
    assert len(found) == 1, found
    return found[0].line()


NAME = "model.layers.1.self_attn.k_scale"


@pytest.mark.parametrize(
    "value, message",
    [(0.0, "is 0, no positive number"), (-1.0, "is -1"), (float("nan"), "is nan"),
     (float("inf"), "is inf")],
)  # fmt: skip
def test_scales_that_are_no_scales_are_found(made, tmp_path, value, message):
    line = damaged(made, tmp_path, lambda tensors: tensors[NAME].fill_(value))
    assert line.startswith(f"error: {NAME}: {message}")


def test_scales_that_are_missing_or_say_nothing_are_found(made, tmp_path_factory):
    one = damaged(made, tmp_path_factory.mktemp("a"), lambda tensors: tensors.pop(NAME))
    assert one == f"error: {NAME}: is missing, quantization_config has a kv_cache_scheme"

    def none(tensors):
        for name in [name for name in tensors if name.endswith(("k_scale", "v_scale"))]:
            del tensors[name]

    folder = tmp_path_factory.mktemp("b")
    with pytest.raises(AssertionError, match=r"layers\.1\.self_attn\.v_scale', message='is"):
        damaged(made, folder, none)  # of every layer
    with pytest.raises(UserError, match="has no k_scale and v_scale of one number"):
        from_quantized(folder / "copy", activations=True)
    left = damaged(
        made, tmp_path_factory.mktemp("c"), lambda tensors: None,
        lambda options: options.update(kv_cache_scheme=None),
    )  # fmt: skip
    assert "but quantization_config has no kv_cache_scheme" in left
    shape = damaged(
        made, tmp_path_factory.mktemp("d"),
        lambda tensors: tensors.update({NAME: torch.ones(2)}),
    )  # fmt: skip
    assert "no number" in shape


@pytest.mark.parametrize("name", ["auto_round", "auto_gptq", "auto_awq", "mlx", "gguf", "fake"])
def test_other_formats_refuse_before_a_model_is_loaded(name, tmp_path, capsys):
    command = ["--model", str(tmp_path / "nowhere"), "--kv_cache_scheme", "fp8", "--format", name,
               "--output_dir", str(tmp_path)]  # fmt: skip
    assert cli.main(command) == 2
    error = capsys.readouterr().err.strip()
    assert "has no place for scales of keys and values, compressed_tensors has" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "name", ["llama", "phi3", "gemma3_text", "gemma3n_text", "qwen3_moe", "qwen3_5", "qwen3_vl"]
)
def test_watching_changes_nothing(name):
    """Whatever attention asks of a cache, with one and without."""
    model, kwargs = FAMILIES[name].build(), FAMILIES[name].samples(1)[-1]
    changes = {layer: lambda key, value: (key, value) for layer in cached_attention(model)}
    for cached in (False, True):
        with torch.no_grad():
            wanted = model(**kwargs, use_cache=cached).logits
            with changing(model, changes):
                assert torch.equal(model(**kwargs, use_cache=cached).logits, wanted)


@pytest.mark.parametrize(
    "name, message",
    [("whisper", "an encoder and a decoder"), ("gpt2", "no attention in GPT2LMHeadModel")],
)
def test_models_without_a_place_are_one_line(name, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(tmp_path, name)
    assert not list(tmp_path.glob("model-*/config.json"))
