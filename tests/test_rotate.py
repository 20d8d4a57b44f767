"""Hidden states turned by a Hadamard matrix: who takes part, that the function stays, and that
inputs of few bits lose less."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, ids, tiny_texts, tiny_tokenizer

from auto_mmround.calibration.inputs import ModelInput
from auto_mmround.checkpoint.loader import from_quantized
from auto_mmround.errors import UserError
from auto_mmround.model.chains import difference
from auto_mmround.model.head import untie
from auto_mmround.numerics import rotation
from auto_mmround.recipe.recipe import Recipe, from_mapping
from auto_mmround.run import job as jobs
from auto_mmround.run import rotate as rotating
from auto_mmround.run.plan import make_plan
from auto_mmround.run.rotate import rotate
from auto_mmround.run.session import Session
from auto_mmround.verify.static import check

MEDIA = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id")


def session_of(name: str, samples=None) -> Session:
    """A tiny model of a family in float32, and its samples."""
    model = FAMILIES[name].build().float()
    untie(model)
    inputs = []
    for kwargs in FAMILIES[name].samples() if samples is None else samples:
        seen = kwargs.get("input_ids", kwargs.get("decoder_input_ids"))[0]
        of = {getattr(model.config, key, None) for key in MEDIA} - {None}
        kinds = torch.tensor([int(token in of) for token in seen.tolist()], dtype=torch.int8)
        inputs.append(ModelInput("", kwargs, kinds, kinds == 0))
    recipe = Recipe(equalize="hadamard", untie_lm_head=True, group_size=32, device="cpu")
    return Session(model, recipe, make_plan(model, recipe), inputs)


def test_turning_keeps_lengths_and_can_be_undone():
    torch.manual_seed(0)
    x, sign = torch.randn(3, 5, 96), rotation.signs(96)
    there = rotation.turned(x, sign)
    torch.testing.assert_close(there.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotation.turned_back(there, sign), x)
    one = torch.zeros(96)
    one[40] = 1.0  # one channel spreads evenly over its block, and no further
    spread = rotation.turned(one, sign)
    assert spread[32:64].abs().allclose(torch.full((32,), 32**-0.5))
    assert not spread[:32].any() and not spread[64:].any()
    assert set(sign.tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize(
    "name, makers",
    [
        ("llama", []),
        ("qwen2", []),  # biases
        ("phi3", []),  # fused layers
        ("qwen2_vl", ["model.visual.merger.mlp.2"]),
        ("llava", ["model.multi_modal_projector.linear_2"]),
        ("mllama", []),  # blocks that read images directly
        ("qwen2_audio", ["model.multi_modal_projector.linear"]),
    ],
)
def test_the_function_of_a_family_stays(name, makers):
    session = session_of(name)
    before = [session.model(**kwargs).logits for kwargs in session.batches]
    state = {key: value.clone() for key, value in session.model.state_dict().items()}
    stream = rotate(session)
    assert [writer for writer in stream.writers if "layers" not in writer][1:] == makers
    for kwargs, logits in zip(session.batches, before):
        assert difference(session.model(**kwargs).logits, logits) < 1e-5
    changed = {
        key for key, value in session.model.state_dict().items() if not value.equal(state[key])
    }
    turned = {f"{writer}.weight" for writer in stream.writers}
    assert turned | {f"{norm}.weight" for norm in stream.norms} <= changed
    assert any(key.endswith("q_proj.weight") or "qkv" in key for key in changed)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("gemma3_text", "change the output of model.layers.0"),  # norms behind the layers
        ("gpt2", "takes their mean off"),
        ("qwen3_vl", "the model itself changes them before"),  # features added between blocks
        ("qwen3_next", "also read by mlp.gate"),  # a router
        ("llava_next", "no layer was found that makes 4 tokens"),  # a parameter
        ("whisper", "takes their mean off"),
    ],
)
def test_other_families_are_refused_and_left_alone(name, reason):
    session = session_of(name)
    state = {key: value.clone() for key, value in session.model.state_dict().items()}
    session.model(**session.batches[-1])  # some classes leave hooks of their own
    hooks = sum(len(module._forward_hooks) for module in session.model.modules())
    with pytest.raises(UserError, match=f"equalize = hadamard .*{reason}.*; leave equalize"):
        rotate(session)
    assert all(value.equal(state[key]) for key, value in session.model.state_dict().items())
    assert hooks == sum(len(module._forward_hooks) for module in session.model.modules())


def test_images_that_no_sample_shows_are_no_silent_gap():
    session = session_of("qwen2_vl", [ids(after=12)])
    with pytest.raises(UserError, match=r"no calibration sample reaches model\.visual"):
        rotate(session)


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (64,)])
def test_what_no_sample_runs_may_belong_to_the_hidden_states(shape):
    """A projector may be a parameter, a reader any layer as wide as they are."""
    session = session_of("llama")
    session.model.model.aside = torch.nn.Module()
    session.model.model.aside.matrix = torch.nn.Parameter(torch.ones(shape))
    with pytest.raises(UserError, match=r"no calibration sample reaches model\.aside"):
        rotate(session)


def test_a_speaker_reads_the_hidden_states_of_the_thinker(monkeypatch):
    """No layer of it writes them, and logits of text do not tell."""
    config = dict(FAMILIES["qwen2_5_omni"].config)
    config["talker_config"] = config["talker_config"] | dict(
        hidden_size=48, num_attention_heads=3, head_dim=16, intermediate_size=80
    )
    narrow = replace(FAMILIES["qwen2_5_omni"], config=config)
    monkeypatch.setitem(FAMILIES, "qwen2_5_omni", narrow)
    session = session_of("qwen2_5_omni")
    with pytest.raises(UserError, match=r"talker\..* takes no part in making text"):
        rotate(session)


def test_a_head_that_is_the_embedding_is_refused():
    session = session_of("llama")
    head, words = session.model.get_output_embeddings(), session.model.get_input_embeddings()
    head.weight = words.weight
    with pytest.raises(UserError, match=r"shares its weight .* untie_lm_head"):
        rotate(session)


def test_a_failure_halfway_leaves_the_originals(monkeypatch):
    session = session_of("qwen2")
    state = {key: value.clone() for key, value in session.model.state_dict().items()}
    plain, seen = rotating._gained, []

    def failing(*args, **kwargs):
        seen.append(0)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    monkeypatch.setattr(rotating, "_gained", failing)
    with pytest.raises(KeyboardInterrupt):
        rotate(session)
    assert all(value.equal(state[key]) for key, value in session.model.state_dict().items())


def test_recipes_that_do_not_go_together():
    with pytest.raises(UserError, match="equalize needs the whole model in memory"):
        Recipe(equalize="hadamard", stream=True)
    with pytest.raises(UserError, match="untie_lm_head is for a head that is quantized"):
        Recipe(equalize="awq", untie_lm_head=True)
    Recipe(equalize="hadamard", untie_lm_head=True)


def job_of(folder, out, **changes):
    keys = dict(
        model=str(folder), output_dir=str(out), device="cpu", nsamples=4, seqlen=24, batch_size=2,
        **{"scheme": "MXFP4", "format": "compressed_tensors", "iters": 1} | changes,
    )  # fmt: skip
    recipe = from_mapping(keys)
    rows = [{"text": text} for text in tiny_texts(4, 30)]
    return jobs.prepare(recipe, jobs.load_model(recipe), dataset=rows)


def test_a_channel_that_sticks_out_is_spread_and_the_checkpoint_holds_it(tmp_path):
    """One channel of every group is thirty times as large: the others round to nothing."""
    model = FAMILIES["llama"].build()
    large = torch.ones(model.config.hidden_size)
    large[::32] = 30.0
    model.get_input_embeddings().weight.mul_(large)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    damage = {}
    for equalize in ("none", "hadamard"):
        job = job_of(tmp_path / "model", tmp_path / equalize, equalize=equalize)
        inputs = [sample.kwargs for sample in job.inputs]
        before = [job.loaded.model(**kwargs).logits for kwargs in inputs]
        (folder,) = jobs.run(job)
        loaded = from_quantized(folder)
        after = [loaded.model(**kwargs).logits for kwargs in inputs]
        damage[equalize] = sum(map(difference, after, before))
        written = load_file(folder / "model.safetensors")
        source = load_file(tmp_path / "model" / "model.safetensors")
        same = written["model.embed_tokens.weight"].equal(source["model.embed_tokens.weight"])
        assert same == (equalize == "none")
    assert damage["hadamard"] < 0.85 * damage["none"]


@pytest.mark.parametrize("fmt", ["auto_round", "mlx"])
def test_a_turned_checkpoint_is_right_beside_its_source(fmt, tmp_path):
    """No weight is like the source's any more; what was tuned is still compared."""
    folder = tmp_path / "model"
    FAMILIES["llama"].save(folder, tiny_tokenizer())
    (out,) = jobs.run(job_of(folder, tmp_path / "out", equalize="hadamard", scheme="W4A16",
                             format=fmt, group_size=32))  # fmt: skip
    assert not check(out, source=folder)
    tensors = load_file(out / "model.safetensors")
    scale = next(name for name in tensors if name.endswith("scales"))
    save_file(tensors | {scale: tensors[scale] * 2}, out / "model.safetensors", {"format": "pt"})
    assert "tuned" in check(out, source=folder)[0].message


def test_two_runs_turn_alike(tmp_path):
    folder = tmp_path / "model"
    FAMILIES["llama"].save(folder, tiny_tokenizer())
    made = []
    for out in ("one", "two"):
        job = job_of(folder, tmp_path / out, equalize="hadamard", scheme="W4A16", format="fake",
                     group_size=32, untie_lm_head=True)  # fmt: skip
        (made_folder,) = jobs.run(job)
        made.append(load_file(made_folder / "model.safetensors"))
    assert all(value.equal(made[1][key]) for key, value in made[0].items())
