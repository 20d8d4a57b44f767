"""Qwen2.5-Omni and Qwen3-Omni as published: thinker, talker and vocoder in one folder."""

import json
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from test_media import film
from tiny_models import FAMILIES, tiny_tokenizer
from tiny_processors import omni, omni3

from auto_mmround import AutoRoundMLLM, cli
from auto_mmround.checkpoint.loader import from_quantized
from auto_mmround.model.speaking import speaking
from auto_mmround.verify import static

WHOLE = {"qwen2_5_omni": omni, "qwen3_omni_moe": omni3}
OPTIONS = "--iters 1 --nsamples 5 --seqlen 300 --group_size 32 --device cpu --disable_amp"
OPTIONS += " --engines vllm"  # Transformers takes no experts of Qwen3-Omni in these formats


def saved(name: str, folder: Path) -> Path:
    """A folder as people download it, its voices too."""
    family = FAMILIES[name]
    family.save(folder, tiny_tokenizer())
    WHOLE[name]().save_pretrained(folder)
    if name == "qwen2_5_omni":
        config = json.loads((folder / "config.json").read_text())
        published = json.dumps(config | {"architectures": ["Qwen2_5OmniModel"]})
        (folder / "config.json").write_text(published)
        torch.save({"Chelsie": {"cond": torch.ones(1, 4)}}, folder / "spk_dict.pt")
    return folder


def rows(folder: Path) -> Path:
    """Questions about a picture, two pictures, a sound, a film, and plain text."""
    for i in range(2):
        Image.new("RGB", (24, 24), (90 * i, 40, 200)).save(folder / f"{i}.png")
    with wave.open(str(folder / "a.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        noise = np.random.default_rng(0).normal(size=6400) * 3000
        file.writeframes(noise.astype("<i2").tobytes())
    film(folder / "v.mp4")
    answer = {"from": "gpt", "value": "w30 w31 w32 w33 w34 w35"}
    found = [
        {"image": "0.png", "conversations": [{"from": "human", "value": "<image>\nw5 w6"}, answer]},
        {
            "image": ["0.png", "1.png"],
            "conversations": [{"from": "human", "value": "<image>\n<image>\nw5 w7"}, answer],
        },
        {"audio": "a.wav", "conversations": [{"from": "human", "value": "<audio>\nw8"}, answer]},
        {"video": "v.mp4", "conversations": [{"from": "human", "value": "<video>\nw8"}, answer]},
        {"conversations": [{"from": "human", "value": "w9 " * 40}, answer]},
    ]
    (folder / "rows.json").write_text(json.dumps(found))
    return folder / "rows.json"


def run(model: Path, out: Path, more: str = "") -> Path:
    data = rows(model.parent)
    words = ["--model", str(model), "--dataset", str(data), "--output_dir", str(out)]
    assert cli.main([*words, *OPTIONS.split(), *more.split()]) == 0
    return next(folder for folder in out.iterdir())


def own(name: str, folder: Path, **options):
    return getattr(transformers, FAMILIES[name].architecture).from_pretrained(folder, **options)


def check_kept(name: str, model: Path, folder: Path, tuned: set[str]) -> None:
    """Only weights of these parts of the thinker are others, and the class loads the whole."""
    before, after = load_file(model / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    blocks = ("thinker.model.layers.", "thinker.audio_tower.layers.", "thinker.visual.blocks.")
    assert changed and all(key.startswith(blocks) for key in changed)
    assert {key.split(".")[1] for key in changed} == tuned
    whole = own(name, folder)
    assert not torch.equal(
        speaking(whole)(**FAMILIES[name].samples(1)[0]).logits,
        speaking(own(name, model))(**FAMILIES[name].samples(1)[0]).logits,
    )
    if name == "qwen2_5_omni":
        assert (folder / "spk_dict.pt").read_bytes() == (model / "spk_dict.pt").read_bytes()
        assert list(whole.speaker_map) == ["Chelsie"]


@pytest.mark.parametrize("name", WHOLE)
def test_towers_too(name, tmp_path):
    model = saved(name, tmp_path / "model")
    folder = run(model, tmp_path / "out", "--format fake --quant_nontext_module")
    check_kept(name, model, folder, {"model", "audio_tower", "visual"})
    assert static.check(folder, model) == []


@pytest.mark.parametrize("name", WHOLE)
def test_the_thinker_is_tuned_and_every_format_names_the_rest(name, tmp_path):
    model = saved(name, tmp_path / "model")
    formats = ("fake", "auto_round", "auto_gptq", "auto_awq", "compressed_tensors", "mlx")
    run(model, tmp_path / "out", f"--format {','.join(formats)}")
    before = own(name, model).state_dict()
    talker = {key: value for key, value in before.items() if key.startswith("talker")}
    for fmt in formats:
        folder = tmp_path / "out" / f"model-w4g32-{fmt}"
        assert static.check(folder, model) == []
        loaded = from_quantized(folder).model
        assert type(loaded).__name__ == FAMILIES[name].architecture
        state = loaded.state_dict()
        assert talker and all(torch.equal(state[key], value) for key, value in talker.items())
    check_kept(name, model, tmp_path / "out/model-w4g32-fake", {"model"})


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_model_in_memory(name, tmp_path):
    folder = saved(name, tmp_path / "model")
    model = own(name, folder).eval()
    with torch.no_grad():
        next(model.talker.parameters()).mul_(2)  # of its owner
    processor = transformers.AutoProcessor.from_pretrained(folder)
    quantizer = AutoRoundMLLM(
        model, None, processor, dataset=FAMILIES[name].samples(), iters=1, group_size=32,
        amp=False, device="cpu", quant_nontext_module=True, engines="vllm",
    )  # fmt: skip
    quantizer.quantize()
    (out,) = quantizer.save_quantized(tmp_path / "out", format="auto_round")
    loaded = from_quantized(out).model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())


def test_streamed_is_the_same(tmp_path):
    model = saved("qwen3_omni_moe", tmp_path / "model")
    whole = run(model, tmp_path / "a", "--no_stream")
    streamed = run(model, tmp_path / "b", "--stream")
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, streamed))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", WHOLE)
def test_without_the_voice(name, tmp_path):
    """`enable_audio_output` false: the class has no talker, the folder still does."""
    model = saved(name, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"enable_audio_output": False}))
    folder = run(model, tmp_path / "out")
    before, after = load_file(model / "model.safetensors"), load_file(folder / "model.safetensors")
    spoken = [key for key in before if not key.startswith("thinker")]
    assert spoken and all(torch.equal(before[key], after[key]) for key in spoken)
    assert static.check(folder, model) == []


def test_the_thinker_alone_out_of_the_whole(tmp_path):
    """A user who has loaded the thinker's class from the whole's folder gets a thinker."""
    folder = saved("qwen2_5_omni", tmp_path / "model")
    thinker = transformers.Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder)
    quantizer = AutoRoundMLLM(
        thinker.eval(), tiny_tokenizer(), dataset=FAMILIES["qwen2_5_omni"].samples(), iters=1,
        group_size=32, amp=False, device="cpu",
    )  # fmt: skip
    quantizer.quantize()
    (out,) = quantizer.save_quantized(tmp_path / "out", format="auto_round")
    loaded = from_quantized(out).model
    assert type(loaded) is type(thinker)
    for key, value in thinker.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
