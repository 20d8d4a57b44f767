"""Where rows come from besides our own files: folders of speech, public sets in local copies, code
of the user's."""

import io
import json
import sys
from types import SimpleNamespace

import datasets as hf
import numpy as np
import pytest
import torch
from doc_blocks import ROOT, blocks
from huggingface_hub import constants
from PIL import Image
from rows import load_samples

from auto_mmround import cli
from auto_mmround.calibration import datasets, dotted, media, roots
from auto_mmround.calibration.datasets import load_rows
from auto_mmround.errors import UserError
from auto_mmround.recipe.files import read, to_toml
from auto_mmround.recipe.recipe import Recipe, from_mapping
from auto_mmround.run import job as jobs

soundfile = pytest.importorskip("soundfile")


def flac(seconds=0.2):
    buffer = io.BytesIO()
    soundfile.write(
        buffer,
        0.1 * np.random.default_rng(0).normal(size=int(16000 * seconds)),
        16000,
        format="FLAC",
    )
    return buffer.getvalue()


def put(folder, files):
    """Write files; sounds are given as None, images as a colour in a tuple."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.write_bytes(flac())
        elif isinstance(content, tuple):
            Image.new("RGB", (28, 28), content).save(path)
        else:
            path.write_text(content)
    return folder


def spoken(samples):
    """(sound, transcript) of samples, whose sound must be found and read."""
    for sample in samples:
        (audio,) = sample.audios
        sound = media.load(audio, "audio", roots.parse_roots(None), base=sample.base)
        assert sound.dtype == np.float32 and len(sound) == 3200
        assert [turn.role for turn in sample.messages] == ["user", "assistant"]
        assert sample.messages[0].content == "<audio>"
    return [sample.messages[-1].content for sample in samples]


# ---- folders of sounds

LIBRISPEECH = {
    "dev-clean/84/121123/84-121123-0000.flac": None,
    "dev-clean/84/121123/84-121123-0001.flac": None,
    "dev-clean/84/121123/84-121123.trans.txt": (
        "84-121123-0000 GO DO YOU HEAR\n84-121123-0001 BUT IN LESS\n"
    ),
    "dev-other/7/1/7-1-0000.flac": None,
    "dev-other/7/1/7-1.trans.txt": "7-1-0000 OTHER WORDS\n",
    "README.TXT": "This is no list of sounds\n",
}


def test_librispeech_as_its_archives_unpack(tmp_path):
    folder = put(tmp_path / "LibriSpeech", LIBRISPEECH)
    assert spoken(load_samples(str(folder))) == ["GO DO YOU HEAR", "BUT IN LESS", "OTHER WORDS"]
    assert spoken(load_samples(str(folder / "dev-clean"))) == ["GO DO YOU HEAR", "BUT IN LESS"]
    assert spoken(load_samples(f"{folder}:split=dev-other")) == ["OTHER WORDS"]
    assert spoken(load_samples(f"{folder}:split=dev-other+dev-clean:num=3"))[0] == "OTHER WORDS"


@pytest.mark.parametrize(
    "files",
    [
        {"a.wav": None, "a.txt": "one two", "sub/b.wav": None, "sub/b.txt": "three\nfour\n"},
        {"a.wav": None, "sub/b.wav": None,
            "transcripts.txt": "a.wav one two\nsub/b.wav three four\n"},
        {"wavs/a.wav": None, "wavs/b.wav": None,
            "metadata.csv": "a|One, 2|one two\nb|Three|three four\n"},
        {"a.flac": None, "b.flac": None,
            "metadata.csv": 'file_name,text\na.flac,one two\nb.flac,"three four"\n'},
        {"clips/a.wav": None, "clips/b.wav": None,
         "validated.tsv": "client_id\tpath\tsentence\n1\ta.wav\tone two\n2\tb.wav\tthree four\n"},
        {"a.wav": None, "b.wav": None,
         "metadata.jsonl": '{"file_name": "a.wav", "transcription": "one two"}\n'
                           '{"file_name": "b.wav", "sentence": "three four"}\n'},
    ],
    ids=["beside", "list", "bars", "csv", "tsv", "jsonl"],
)  # fmt: skip
def test_sounds_with_transcripts(tmp_path, files):
    samples = load_samples(str(put(tmp_path / "speech", files)))
    assert spoken(samples) == ["one two", "three four"]


def test_sounds_without_transcripts_are_said(tmp_path, caplog):
    folder = put(tmp_path / "speech", {"a.wav": None, "b.wav": None})
    with pytest.raises(UserError, match=r"2 sounds but no transcripts: put a\.txt beside a\.wav"):
        load_rows(str(folder))
    put(folder, {"a.txt": "one"})
    assert (
        spoken(load_samples(str(folder))) == ["one"]
        and "1 of 2 sounds have no transcript" in caplog.text
    )


def test_a_folder_of_texts_is_still_text(tmp_path):
    assert [s.text for s in load_samples(str(put(tmp_path / "t", {"a.txt": "one\ntwo"})))] == [
        "one",
        "two",
    ]


# ---- public sets, copied to this machine or streamed


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def speech_table(extra, texts=("one two", "three four")):
    rows = [
        {"id": f"x{i}", "audio": {"bytes": flac(), "path": f"x{i}.flac"}, "text": text} | extra
        for i, text in enumerate(texts)
    ]
    return hf.Dataset.from_list(rows).cast_column("audio", hf.Audio(sampling_rate=16000))


def peoples_speech(folder):
    """The layout of the hub: a config a folder, declared in the card."""
    for config, split in (("clean", "train"), ("test", "test")):
        file = folder / config / f"{split}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True)
        speech_table({"duration_ms": 200}).to_parquet(file)
    configs = [f"- config_name: {c}\n  data_files:\n  - split: {s}\n    path: {c}/{s}-*" for c, s in
               (("clean", "train"), ("test", "test"))]  # fmt: skip
    (folder / "README.md").write_text("---\nconfigs:\n" + "\n".join(configs) + "\n---\n")
    return folder


def librispeech(folder):
    file = folder / "all" / "train.clean.100-00000-of-00001.parquet"
    file.parent.mkdir(parents=True)
    speech_table(
        {"file": "84-121123-0000.flac", "speaker_id": 84, "chapter_id": 121123}
    ).to_parquet(file)
    return folder


def test_a_copy_of_peoples_speech(cache):
    folder = peoples_speech(cache / "peoples_speech")
    with pytest.raises(UserError, match="several configs, choose with config=: clean, test"):
        load_rows(str(folder))
    assert spoken(load_samples(f"{folder}:config=clean")) == ["one two", "three four"]
    # its only split is taken
    assert spoken(load_samples(f"{folder}:config=test:num=1")) == ["one two"]
    assert spoken(load_samples(f"{folder}:config=test:split=test[1:2]")) == ["three four"]
    with pytest.raises(UserError, match=r"nonsense.*Available: .*clean"):
        load_rows(f"{folder}:config=nonsense")


def test_a_copy_of_librispeech(cache):
    rows = load_rows(str(librispeech(cache / "librispeech_asr")))[0]
    assert spoken([rows.sample(i) for i in range(2)]) == ["one two", "three four"]
    assert (
        rows.rows[0]["speaker_id"] == 84
        and rows.kinds() == {"audio"}
        and rows.sample(1).id.endswith("#x1")
    )


@pytest.mark.parametrize("name", ["peoples_speech", "MLCommons/peoples_speech"])
def test_peoples_speech_by_name_from_the_hubs_cache(cache, monkeypatch, name):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(datasets, "hub_answers", lambda: False)
    folder = cache / "datasets--MLCommons--peoples_speech"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    peoples_speech(folder / "snapshots" / ("0" * 40))
    assert spoken(load_samples(name)) == ["one two", "three four"]  # its usual config and split


def test_large_sets_are_streamed(cache, monkeypatch):
    """What is asked of `datasets`, which reads the local copy in the hub's place."""
    folder, calls, load = peoples_speech(cache / "copy"), [], hf.load_dataset_builder

    def load_dataset_builder(path, config):
        def stream(split):
            calls.append((path, config, split))
            return load(str(folder), config).as_streaming_dataset(split=split)

        files = {"train": [f"hf://datasets/{path}@main/x.parquet"]}
        return SimpleNamespace(
            config=SimpleNamespace(data_files=files), as_streaming_dataset=stream
        )

    monkeypatch.setattr(hf, "load_dataset_builder", load_dataset_builder)
    monkeypatch.setattr(datasets, "hub_answers", lambda: True)
    assert spoken(load_samples("peoples_speech")) == ["one two", "three four"]
    assert spoken(load_samples("peoples_speech:num=1:config=test:split=test")) == ["one two"]
    assert calls == [
        ("MLCommons/peoples_speech", "clean", "train"),
        ("MLCommons/peoples_speech", "test", "test"),
    ]


def test_forms_of_public_image_sets(cache):
    """Messages with image parts, LLaVA conversations, question pairs, captions: as their Parquet
    files hold them."""
    buffer = io.BytesIO()
    Image.new("RGB", (28, 28)).save(buffer, "PNG")
    stored = {"bytes": buffer.getvalue(), "path": None}
    chat = [{"role": "user", "content": [{"index": 0, "type": "image", "text": None},
        {"type": "text", "text": "Q?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A."}]}]  # fmt: skip
    turns = [{"from": "human", "value": "<image>\nQ?"}, {"from": "gpt", "value": "A."}]
    forms = [
        {"messages": chat, "images": [stored]},
        {"id": "1", "image": stored, "conversations": turns, "data_source": "x"},
        {"images": [stored], "texts": [{"user": "Q?", "assistant": "A.", "source": "x"}]},
        {"image": stored, "question": "Q?", "answers": ["A.", "B."], "question_id": "7"},
        {"image": stored, "caption": ["A.", "B."], "img_id": "3"},
    ]
    for i, row in enumerate(forms):
        file = cache / f"{i}.parquet"
        hf.Dataset.from_list([row]).to_parquet(file)
        (sample,) = load_samples(str(file))
        assert [turn.role for turn in sample.messages] == ["user", "assistant"], row
        assert (
            sample.messages[0].content.startswith("<image>") and sample.messages[1].content == "A."
        )
        assert ("Q?" in sample.messages[0].content) == ("caption" not in row)
        assert media.load(sample.images[0], "image", roots.parse_roots(None)).size == (28, 28)


def test_a_llava_folder_with_images(tmp_path):
    turns = [{"from": "human", "value": "<image>\nQ?"}, {"from": "gpt", "value": "A."}]
    rows = [{"id": "1", "image": "train2017/1.png", "conversations": turns}]
    put(tmp_path / "llava", {"train2017/1.png": (9, 9, 9), "llava_instruct.json": json.dumps(rows)})
    (sample,) = load_samples(str(tmp_path / "llava"))
    assert media.load(
        sample.images[0], "image", roots.parse_roots(None), base=sample.base
    ).size == (28, 28)


# ---- code of the user's

MODULE = """
import torch

ROWS = ["first text", {"text": "second text"}]

class Texts:
    def __init__(self, split="train"):
        self.split = split
    def __iter__(self):
        yield from (f"{self.split} {i} " + "words and more words " * 30 for i in range(6))

class Indexed:
    def __len__(self):
        return 6
    def __getitem__(self, index):
        if index == 4:
            raise KeyError("no such clip")
        return {"words": [3 + index] * 5 + list(range(40))}

def pairs(batch):
    (row,) = batch
    ids = torch.tensor([row["words"]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

def wrong(batch):
    return [1, 2]

def other(batch):
    return {"pixels": 1}

NUMBER = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    (tmp_path / "my_module.py").write_text(MODULE)
    return tmp_path


def test_rows_by_dotted_path(module):
    before = list(sys.path)
    assert [s.text for s in load_samples("my_module:ROWS")] == ["first text", "second text"]
    assert load_samples("my_module:Texts:num=2")[1].text.startswith("train 1 ")
    assert load_samples("my_module:Texts:split=test:num=1")[0].text.startswith("test 0 ")
    assert sys.path == before
    (module / "pile:extra.txt").write_text("a file")  # what exists here is read, not imported
    assert load_samples("pile:extra.txt")[0].text == "a file"
    assert (
        dotted.is_dotted("a.b:C.d")
        and not dotted.is_dotted("a")
        and not dotted.is_dotted("C:/data/x.json")
    )


@pytest.mark.parametrize(
    "path, words",
    [
        ("no_such_module:Rows", r"importing no_such_module failed: ModuleNotFoundError"),
        ("my_module:Text", r"my_module has no 'Text'; did you mean 'Texts'"),
        ("my_module:NUMBER", "gives a int, which can't be iterated over"),
        ("my_module:ROWS:split=test", "no class or function"),
        ("my_module:Indexed:split=test", r"calling it failed.*TypeError"),
        ("broken:Rows", r"importing broken failed \(broken.py line 2\): ZeroDivisionError"),
        ("odd:Rows", "SyntaxError"),
    ],
)
def test_wrong_dotted_paths_are_one_line(module, path, words):
    (module / "broken.py").write_text("\n1 / 0\n")
    (module / "odd.py").write_text("def (")
    with pytest.raises(UserError, match=words) as caught:
        load_rows(path)
    assert "\n" not in str(caught.value)


def test_a_row_that_fails_is_named(module):
    with pytest.raises(
        UserError, match=r"row 4 failed \(my_module.py line 17\): KeyError"
    ) as caught:
        load_rows("my_module:Indexed")[0].rows[4]
    assert "\n" not in str(caught.value)


def test_collator(module):
    (rows,) = load_rows("my_module:Indexed", dotted.collator("my_module:pairs"))
    sample = rows.sample(2)
    assert sample.input_ids.tolist() == [5] * 5 + list(range(40)) and not rows.kinds()
    ready = {"input_ids": torch.ones(1, 4), "pixel_values": torch.zeros(1, 3)}
    (rows,) = load_rows(["any row"], lambda batch: ready)
    assert rows.sample(0).inputs["pixel_values"].shape == (1, 3) and rows.kinds() == {"ready"}


@pytest.mark.parametrize(
    "path, words",
    [
        ("my_module:wrong", "gave a list, not a mapping"),
        ("my_module:NUMBER", "can't be called"),
        ("my_module", "must read module:name"),
        ("my_module:other", "expected text, messages|must give input_ids"),
    ],
)
def test_wrong_collators_are_one_line(module, path, words):
    with pytest.raises(UserError, match=words) as caught:
        load_rows("my_module:Indexed", dotted.collator(path))[0].sample(0)
    assert "\n" not in str(caught.value)


def test_recipe_file_with_own_data_and_collator(module, capsys):
    """The journey through the command line; the recipe beside the result names both paths."""
    keys = {"model": "demo", "dataset": "my_module:Indexed", "collator": "my_module:pairs",
        "nsamples": 4, "iters": 1,
            "batch_size": 2, "output_dir": "out", "group_size": 32, "device": "cpu",
            "on_bad_sample": "skip",
            "seqlen": 48}  # fmt: skip
    (module / "mine.toml").write_text(
        "\n".join(f"{key} = {json.dumps(value)}" for key, value in keys.items())
    )
    assert cli.main(["mine.toml"]) == 0
    folder = module / "out" / "demo-w4g32-auto_round"
    stored = from_mapping(read(folder / "recipe.toml"))
    assert (stored.dataset, stored.collator) == ("my_module:Indexed", "my_module:pairs")
    assert from_mapping(read(folder / "recipe.toml")) == stored == from_mapping(dict(vars(stored)))
    assert json.loads((folder / "run.json").read_text())["calibration"]["used"] == 4
    assert (
        cli.main(["--model", "demo", "--dataset", "my_module:Indxed", "--output_dir", "out2"]) == 2
    )
    assert "did you mean 'Indexed'" in capsys.readouterr().err


def test_the_name_of_other_tools(module):
    recipe = from_mapping({"data_collator": "my_module:pairs"})
    assert recipe.collator == "my_module:pairs" and 'collator = "my_module:pairs"' in to_toml(
        recipe
    )


def test_own_texts_tune_the_demo_model(module):
    recipe = Recipe(model="demo", dataset="my_module:Texts:num=4", iters=1, group_size=32,
        seqlen=64, device="cpu",
                    nsamples=4, output_dir=str(module / "out"))  # fmt: skip
    job = jobs.prepare(recipe, jobs.load_model(recipe))
    assert (
        job.calibration["tokens"] == {"text": 4 * 64}
        and job.recipe.dataset == "my_module:Texts:num=4"
    )


def test_own_data_snippet(module):
    """docs/calibration.md as written."""
    code, _ = (
        block.code
        for block in blocks(ROOT / "docs" / "calibration.md")
        if block.language == "python"
    )
    put(module, {"page_data.py": code} | {f"images/{i}.png": (i, 90, 90) for i in range(100)})
    command = (
        "--model demo --dataset page_data:MyData:num=8 --iters 1 --nsamples 8 --output_dir out"
        " --device cpu"
    )
    assert cli.main(command.split()) == 0
    (rows,) = load_rows([{"input_ids": [[5, 6, 7]]}], dotted.collator("page_data:collate"))
    assert rows.sample(0).input_ids.tolist() == [5, 6, 7]
