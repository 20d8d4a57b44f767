"""Families that hear, from a folder of sounds on: real processors, plan, calibrate, tune two steps,
export, read back; and one run on text, images, sounds and videos together."""

import importlib.util
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_processors
import torch
from huggingface_hub import constants
from PIL import Image
from tiny_models import FAMILIES, Tiny

from auto_mmround import cli
from auto_mmround.calibration import datasets
from auto_mmround.calibration.processor import find_processor
from auto_mmround.calibration.rows import parse_row
from auto_mmround.calibration.template import Template
from auto_mmround.checkpoint.loader import from_quantized
from auto_mmround.errors import UserError
from auto_mmround.recipe.files import read
from auto_mmround.recipe.recipe import Recipe, from_mapping
from auto_mmround.report import report
from auto_mmround.run import job as jobs

soundfile = pytest.importorskip("soundfile")
HAS = {
    name: importlib.util.find_spec(name) is not None
    for name in ("torchaudio", "mistral_common", "av")
}


def sounds(folder: Path, count: int = 3, seconds: float = 0.4) -> Path:
    """Noise of different lengths with a transcript beside each."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for i in range(count):
        noise = 0.1 * draw.normal(size=int(8000 * (seconds + 0.1 * i)))
        soundfile.write(folder / f"{i}.wav", noise, 8000)
        (folder / f"{i}.txt").write_text(" ".join(f"w{5 + i + j}" for j in range(8 + i)))
    return folder


def pictures(folder: Path, count: int = 3) -> Path:
    """Rows with one or two images and two turns."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        names = [f"{i}-{j}.png" for j in range(1 + i % 2)]
        for j, name in enumerate(names):
            Image.new("RGB", (16 + 8 * j, 24), (60 * i, 90, 200)).save(folder / name)
        turns = [
            ("human", "<image>\n" * len(names) + "w5 w6"),
            ("gpt", "w7 w8 w9"),
            ("human", "w10"),
            ("gpt", "w11 w12"),
        ]
        rows.append(
            {"image": names, "conversations": [{"from": who, "value": text} for who, text in turns]}
        )
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def configured(name: str, **changes: Any) -> Tiny:
    """A tiny family with other settings in its sub-configurations."""
    config = dict(FAMILIES[name].config)
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    return replace(FAMILIES[name], config=config)


def checkpoint(family: Tiny, processor: Any, folder: Path) -> Path:
    family.build().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def recipe(model: Path, dataset: str, folder: Path, **more: Any) -> Recipe:
    options = dict(
        group_size=32, iters=2, nsamples=6, quant_nontext_module=True, amp=False, device="cpu"
    )
    return Recipe(
        model=str(model), dataset=dataset, output_dir=str(folder / "out"), **options | more
    )


needs = {
    name: pytest.mark.skipif(not HAS[name], reason=f"needs {name.replace('_', '-')}")
    for name in HAS
}
# (model, its processor, images too, settings that fit the processor)
HEARING = [
    pytest.param("whisper", tiny_processors.whisper, False, dict(max_source_positions=50),
        id="whisper"),
    pytest.param("qwen2_audio", tiny_processors.qwen2_audio, False,
        dict(audio_config=dict(max_source_positions=50)),
                 id="qwen2_audio"),
    pytest.param("qwen2_5_omni_thinker", tiny_processors.omni, True, {}, id="qwen2_5_omni_thinker"),
    pytest.param("phi4_multimodal", tiny_processors.phi4, True,
                 dict(vision_config=dict(image_size=448, patch_size=14, crop_size=448)),
                 id="phi4_multimodal"),
    pytest.param("granite_speech", tiny_processors.granite, False,
        dict(encoder_config=dict(input_dim=160)),
                 id="granite_speech", marks=needs["torchaudio"]),
    pytest.param("voxtral", tiny_processors.voxtral, False, dict(
        text_config=dict(vocab_size=296), audio_token_id=24,
        audio_config=dict(max_source_positions=1500)),
        id="voxtral", marks=needs["mistral_common"]),
]  # fmt: skip


@pytest.mark.parametrize("name, make, sees, settings", HEARING)
def test_from_a_folder_of_sounds(name, make, sees, settings, tmp_path):
    family = configured(name, **settings)
    (tmp_path / "model").mkdir()
    processor = make(tmp_path / "model") if name == "voxtral" else make()
    model = checkpoint(family, processor, tmp_path / "model")
    dataset = str(sounds(tmp_path / "speech")) + (
        f",{pictures(tmp_path / 'seen', 1)}" if sees else ""
    )
    wanted = recipe(model, dataset, tmp_path)
    job = jobs.prepare(wanted, jobs.load_model(wanted))
    assert (
        job.calibration is not None
        and job.calibration["used"] == 3 + sees
        and not job.calibration["skipped"]
    )
    heard = [made for made in job.inputs if any("input_features" in key for key in made.kwargs)]
    assert len(heard) == 3 and all(
        0 < int(made.answer_T.sum()) < len(made.answer_T) for made in heard
    )
    if name != "whisper":  # its decoder reads text alone
        assert (
            job.calibration["tokens"]["audio"]
            == sum(int((made.modality_T == 3).sum()) for made in heard)
            > 0
        )
    (folder,) = jobs.run(job)
    assert {stage.name for stage in job.plan.stages} == set(family.stages)
    tuned = job.loaded.model
    again = from_quantized(folder)
    for key, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, tuned.state_dict()[key]), key
    assert again.processor is not None  # its files came along
    if name == "voxtral":
        assert (folder / "tekken.json").is_file()


CLIPS = """
import numpy as np

class Clips:
    \"\"\"Rows with four frames of a video each, as arrays.\"\"\"

    def __len__(self):
        return 5

    def __getitem__(self, index):
        frames = np.full((4, 16, 16 + 8 * (index % 2), 3), 40 * index, dtype=np.uint8)
        return {"id": f"clip{index}", "video": frames, "question": "w5 w6", "answer": "w7 w8"}
"""


def test_text_images_sounds_and_videos_in_one_run(tmp_path, monkeypatch, caplog):
    """Budgets by set, multi-image and multi-turn rows, tokens by modality in the log, in run.json
    and on the page."""
    caplog.set_level(logging.INFO, logger="auto_mmround")
    size = {"size": {"shortest_edge": 64, "longest_edge": 1024}}
    # else 100,000 pixels at least
    monkeypatch.setattr(tiny_processors.Qwen2_5OmniProcessor, "videos_kwargs", size)
    model = checkpoint(FAMILIES["qwen2_5_omni_thinker"], tiny_processors.omni(), tmp_path / "model")
    (tmp_path / "clips.py").write_text(CLIPS)
    (tmp_path / "texts.txt").write_text(
        "\n".join(" ".join(f"w{5 + (i + j) % 90}" for j in range(60)) for i in range(9))
    )
    speech, seen = sounds(tmp_path / "speech", 4, 0.3), pictures(tmp_path / "seen", 4)
    monkeypatch.chdir(tmp_path)
    dataset = f"{tmp_path}/texts.txt:num=4,{seen}:num=3,{speech}:num=2,clips:Clips:num=3"
    wanted = recipe(model, dataset, tmp_path, nsamples=12, seqlen=48)
    job = jobs.prepare(wanted, jobs.load_model(wanted))
    found = job.calibration
    assert [(each["asked"], each["used"]) for each in found["sets"]] == [
        (4, 4),
        (3, 3),
        (2, 2),
        (3, 3),
    ]
    by_set = [each["tokens"] for each in found["sets"]]
    assert by_set[0] == {"text": 4 * 48} and [set(tokens) for tokens in by_set[1:]] == [
        {"text", "image"}, {"text", "audio"}, {"text", "video"},
    ]  # fmt: skip
    assert found["tokens"] == {
        kind: sum(t.get(kind, 0) for t in by_set) for kind in ("text", "image", "video", "audio")
    }
    two_images = [made for made in job.inputs if len(made.kwargs.get("image_grid_thw", ())) == 2]
    # two answers
    assert two_images and all(
        int((made.answer_T.int().diff() > 0).sum()) == 2 for made in two_images
    )
    assert job.recipe.dataset == dataset  # the path as it was written: the run can be repeated
    (folder,) = jobs.run(job)
    assert from_mapping(read(folder / "recipe.toml")).dataset == dataset
    assert (
        json.loads((folder / "run.json").read_text())["calibration"]["sets"][3]["name"]
        == "clips:Clips"
    )
    assert "tokens; 4 of texts.txt (192 text), 3 of rows.json (" in caplog.text
    page = report.write(folder).read_text()
    assert all(word in page for word in ("texts.txt", "clips:Clips", "video"))


@pytest.mark.skipif(HAS["torchaudio"], reason="torchaudio is installed")
def test_a_processor_whose_package_is_absent_is_one_line(tmp_path):
    FAMILIES["granite_speech"].build().save_pretrained(tmp_path)
    parts = {"audio_processor": {"feature_extractor_type": "GraniteSpeechFeatureExtractor"}}
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"processor_class": "GraniteSpeechProcessor"} | parts)
    )
    with pytest.raises(UserError, match="requires the torchaudio library") as caught:
        jobs.load_model(recipe(tmp_path, "demo", tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(HAS["mistral_common"], reason="mistral-common is installed")
def test_voxtral_without_its_tokenizers_package_is_one_line():
    voxtral = find_processor("voxtral")(None)
    with pytest.raises(UserError, match="pip install mistral-common"):
        voxtral.encode(parse_row({"audio": "a.wav", "text": "w5"}, "s"), Template())


def test_whisper_alone_names_the_data_it_needs(tmp_path, monkeypatch, capsys):
    """Without --dataset and without a connection: one line, exit 2, nothing written."""
    model = checkpoint(
        configured("whisper", max_source_positions=50),
        tiny_processors.whisper(),
        tmp_path / "model",
    )
    monkeypatch.setattr(datasets, "hub_answers", lambda: False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    words = [
        "--model",
        str(model),
        "--device",
        "cpu",
        "--group_size",
        "32",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    for more in ([], ["--dataset", "demo-text"], ["--quant_nontext_module"]):
        assert cli.main([*words, *more]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert (
            "peoples_speech" in line
            and "--dataset FOLDER with sounds and their transcripts" in line
        )
    assert cli.main([*words, "--dataset", "demo-llava"]) == 2
    assert "this model takes audio: use --dataset FOLDER" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- video


def clip(path: Path, frames: int = 12, size: int = 32) -> Path:
    """A small mp4 whose frames grow brighter."""
    import av

    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=6)
        stream.width = stream.height = size
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(
                np.full((size, size, 3), 20 * i, dtype=np.uint8), format="rgb24"
            )
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def videos(folder: Path) -> Path:
    """Rows whose third file is no video."""
    folder.mkdir()
    for i in range(2):
        clip(folder / f"{i}.mp4", 12 + i)
    (folder / "2.mp4").write_bytes(b"no video")
    rows = [
        {"id": f"v{i}", "video": f"{i}.mp4", "question": "w5 w6", "answer": "w7 w8 w9"}
        for i in range(3)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows.jsonl"


@needs["av"]
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_video_files(name, tmp_path):
    model = checkpoint(FAMILIES[name], tiny_processors.qwen2_vl(), tmp_path / "model")
    wanted = recipe(model, str(videos(tmp_path / "clips")), tmp_path, nsamples=3)
    loaded = jobs.load_model(wanted)
    with pytest.raises(
        UserError, match=r"sample rows.jsonl#v2: video .*2\.mp4 is damaged or no video"
    ) as caught:
        jobs.prepare(wanted, loaded)
    assert "\n" not in str(caught.value)
    job = jobs.prepare(replace(wanted, on_bad_sample="skip"), loaded)
    assert job.calibration["skipped"] == {"missing or damaged media": ("rows.jsonl#v2",)}
    assert job.calibration["used"] == 2 and job.calibration["tokens"]["video"] > 0
    grids = [made.kwargs["video_grid_thw"][0].tolist() for made in job.inputs]
    assert all(frames == 4 for frames, _, _ in grids)  # eight frames, two at a time
    (folder,) = jobs.run(job)
    state = from_quantized(folder).model.state_dict()
    assert all(
        torch.equal(state[key], tensor) for key, tensor in job.loaded.model.state_dict().items()
    )


@pytest.mark.skipif(HAS["av"], reason="av is installed")
def test_video_without_pyav_is_one_line(tmp_path):
    model = checkpoint(FAMILIES["qwen2_vl"], tiny_processors.qwen2_vl(), tmp_path / "model")
    (tmp_path / "a.mp4").write_bytes(b"video")
    (tmp_path / "rows.json").write_text(
        json.dumps([{"video": "a.mp4", "question": "w5", "answer": "w6"}])
    )
    wanted = recipe(model, str(tmp_path / "rows.json"), tmp_path, on_bad_sample="skip")
    with pytest.raises(UserError, match="pip install av"):
        jobs.prepare(wanted, jobs.load_model(wanted))


def test_damaged_and_missing_sounds_are_named_and_counted(tmp_path):
    model = checkpoint(
        configured("whisper", max_source_positions=50),
        tiny_processors.whisper(),
        tmp_path / "model",
    )
    folder = sounds(tmp_path / "speech")
    (folder / "1.wav").write_bytes(b"no sound")
    rows = [{"audio": f"{name}.wav", "text": "w5 w6"} for name in ("0", "1", "gone")]
    (tmp_path / "speech" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    wanted = recipe(model, str(folder / "rows.jsonl"), tmp_path)
    loaded = jobs.load_model(wanted)
    with pytest.raises(
        UserError, match=r"sample rows.jsonl#1: audio .*1\.wav is damaged or no audio"
    ):
        jobs.prepare(wanted, loaded)
    found = jobs.prepare(replace(wanted, on_bad_sample="skip"), loaded).calibration
    assert found["used"] == 1 and found["skipped"] == {
        "missing or damaged media": ("rows.jsonl#1", "rows.jsonl#2")
    }
    (folder / "0.wav").unlink()
    with pytest.raises(UserError, match=r"no usable sample.*missing or damaged media: 3"):
        jobs.prepare(replace(wanted, on_bad_sample="skip"), loaded)
