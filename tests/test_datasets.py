"""Datasets: the grammar, rows of every form, local files and folders, the hub's layout, and being
offline."""

import base64
import io
import json
import time
from types import SimpleNamespace

import datasets as hf
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from rows import load_samples

from auto_mmround.calibration import datasets
from auto_mmround.calibration.datasets import load_rows
from auto_mmround.calibration.rows import BadSample, parse_row
from auto_mmround.calibration.sources import Source, parse_source, parse_spec
from auto_mmround.errors import UserError

LLAVA_ROW = {
    "id": "7",
    "image": "bus.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A bus."},
    ],
}


@pytest.mark.parametrize(
    "text, source",
    [
        ("NeelNanda/pile-10k", Source("NeelNanda/pile-10k")),
        ("a:num=64", Source("a", num=64)),
        ("mbpp:split=train+test:num=128", Source("mbpp", num=128, split="train+test")),
        ("a:concat", Source("a", concat=True)),
        ("a:concat=False:apply_chat_template", Source("a", apply_template=True)),
        ("C:/data/x.json:num=3", Source("C:/data/x.json", num=3)),
        ("https://host:8080/x.json", Source("https://host:8080/x.json")),
        ("a:system_prompt=Be brief: now", Source("a", system_prompt="Be brief: now")),
        (" a : num = 4 ", Source("a", num=4)),
    ],
)
def test_grammar(text, source):
    assert parse_source(text) == source
    assert parse_source(source.spec()) == source


@pytest.mark.parametrize(
    "text, words",
    [
        ("a:nun=4", "did you mean 'num'"),
        ("a:concatt", "did you mean 'concat'"),
        ("a:size=4", "unknown option 'size'"),
        ("a:num=-1", "num="),
        ("a:num", "num="),
        ("a:num=0", "num="),
        ("a:concat=perhaps", "true or false"),
        (":num=4", "no name"),
    ],
)
def test_wrong_grammar(text, words):
    with pytest.raises(UserError, match=words):
        parse_source(text)


def test_mixture_and_demo():
    assert parse_spec("a:num=64, b:num=32") == [Source("a", num=64), Source("b", num=32)]
    assert parse_spec("demo:num=5") == [Source("demo-text", num=3), Source("demo-llava", num=2)]
    with pytest.raises(UserError, match="empty"):
        parse_spec(" ")


def test_path_with_odd_signs_is_one_set(tmp_path):
    odd = tmp_path / "a,b:num=3.txt"
    odd.write_text("one\n\ntwo\n")
    assert [s.text for s in load_samples(str(odd))] == ["one", "two"]


def test_row_forms():
    def row(value, **kw):
        return parse_row(value, "s", **kw)

    assert (
        row("text").text == "text" == row({"text": "text"}).text == row({"whatever": "text"}).text
    )
    for ids in ([1, 2, 3], torch.tensor([1, 2, 3]), {"input_ids": [[1, 2, 3]]}):
        assert row(ids).input_ids.tolist() == [1, 2, 3]
    assert row({"input_ids": [9, 9, 1, 2], "attention_mask": [0, 0, 1, 1]}).input_ids.tolist() == [
        1,
        2,
    ]
    llava = row(LLAVA_ROW)
    assert llava.images == ("bus.png",) and llava.messages == (
        ("user", "<image>\nWhat?"),
        ("assistant", "A bus."),
    )
    assert row({"text": LLAVA_ROW["conversations"], "image": "bus.png"}).messages == llava.messages
    assert row({"text": "<image>\nWhat?", "image": "bus.png"}).messages == llava.messages[:1]
    # no marker: in front
    assert row({"text": "What?", "image": "bus.png"}).messages == llava.messages[:1]
    assert row({"messages": [{"role": "user", "content": "Hi"}]}).messages == (("user", "Hi"),)
    assert row([{"role": "user", "content": "Hi"}]).messages == (("user", "Hi"),)
    assert row("Hi", as_chat=True, system_prompt="S").messages == (("system", "S"), ("user", "Hi"))
    ready = row({"input_ids": torch.tensor([[1, 2]]), "pixel_values": torch.zeros(4, 2)})
    assert ready.has_media and ready.inputs["input_ids"].shape == (1, 2)


def test_media_of_content_lists_in_their_order():
    content = [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
        {"type": "text", "text": "and", "image": None},
        {"type": "image", "image": "b.png"},
        {"type": "image"},
        {"type": "input_audio", "input_audio": {"data": "QUJD", "format": "wav"}},
        {"type": "video", "path": "v.mp4"},
    ]
    sample = parse_row(
        {"messages": [{"role": "user", "content": content}], "images": ["c.png"]}, "s"
    )
    assert sample.images == ("data:image/png;base64,AA==", "b.png", "c.png")
    assert sample.audios == ({"data": "QUJD", "format": "wav"},) and sample.videos == ("v.mp4",)
    assert sample.messages[0].content == "<image>and<image><image><audio><video>"


@pytest.mark.parametrize(
    "value, words",
    [
        ({"ask": "a", "reply": "b"}, "ask, reply"),
        (3, "must be text"),
        ({}, "none"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "unknown role"),
        ({**LLAVA_ROW, "image": ["a.png", "b.png"]}, r"1 <image> in the text, but 2 given"),
        ({**LLAVA_ROW, "image": None}, r"1 <image> in the text, but 0 given"),
        ({"input_ids": [[1], [2]]}, "shape"),
    ],
)
def test_wrong_rows_are_named(value, words):
    rows = datasets.Rows(Source("x"), [value], name="x")
    with pytest.raises(BadSample, match=words) as caught:
        rows.sample(0)
    assert "x#" in str(caught.value)


ROWS = [{"text": "first"}, LLAVA_ROW, {"messages": [{"role": "user", "content": "Hi"}]}, "plain"]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_local_json_forms_are_told_by_content(tmp_path, suffix):
    file = tmp_path / f"x.{suffix}"
    file.write_text(json.dumps(ROWS) if suffix == "json" else "\n".join(map(json.dumps, ROWS)))
    samples = load_samples(str(file))
    assert [s.text for s in samples] == ["first", None, None, "plain"]
    assert (
        samples[1].images == ("bus.png",)
        and samples[1].base == tmp_path
        and samples[1].id == f"x.{suffix}#7"
    )
    assert len(load_samples(f"{file}:num=2")) == 2 and len(load_samples(str(file), limit=3)) == 3
    assert load_rows(str(file))[0].kinds()


@pytest.mark.parametrize(
    "data", [{"a": "one", "b": "two"}, {"data": ["one", "two"]}, ["one", "two"]]
)
def test_json_objects(tmp_path, data):
    (tmp_path / "x.json").write_text(json.dumps(data))
    assert [s.text for s in load_samples(tmp_path / "x.json")] == ["one", "two"]


def image_bytes():
    buffer = io.BytesIO()
    Image.new("RGB", (30, 30), "red").save(buffer, "PNG")
    return buffer.getvalue()


def test_parquet_file_and_hub_layout(tmp_path, monkeypatch):
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split, texts in (("train", ["one", "two"]), ("test", ["three"])):
        file = tmp_path / "copy" / "data" / f"{split}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        hf.Dataset.from_dict({"text": texts, "meta": [{"n": 1}] * len(texts)}).to_parquet(file)
    folder = tmp_path / "copy"
    assert [s.text for s in load_samples(str(folder / "data" / "test-00000-of-00001.parquet"))] == [
        "three"
    ]
    assert [s.text for s in load_samples(str(folder))] == ["one", "two"]
    assert [s.text for s in load_samples(f"{folder}:split=train+test")] == ["one", "two", "three"]
    with pytest.raises(UserError, match="can't be loaded"):
        load_samples(f"{folder}:split=nonsense")


def test_parquet_with_images(tmp_path, monkeypatch):
    """Media columns are left as stored, so that a damaged one meets our own reader."""
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}],
        }
    ]
    stored = [{"bytes": image_bytes(), "path": None}, {"bytes": b"damaged", "path": None}]
    features = hf.Features({"images": hf.List(hf.Image())})
    data = hf.Dataset.from_dict({"images": [stored[:1], stored[1:]]}, features=features)
    data = data.add_column("messages", [chat, chat])
    data.to_parquet(tmp_path / "x.parquet")
    samples = load_samples(str(tmp_path / "x.parquet"))
    assert [sample.messages[0].content for sample in samples] == ["<image>What?"] * 2
    assert [sample.images for sample in samples] == [(stored[0],), (stored[1],)]


def test_folder_of_plain_files(tmp_path):
    (tmp_path / "b.txt").write_text("two\nthree")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "picture.png").write_bytes(image_bytes())
    assert [s.text for s in load_samples(str(tmp_path))] == ["one", "two", "three"]


def test_data_loaders_and_lists():
    def texts(data):
        return [s.text for s in load_samples(data)]

    assert texts(["a", {"text": "b"}]) == ["a", "b"]
    loader = torch.utils.data.DataLoader
    assert texts(loader(["a", "b", "c"], batch_size=2)) == ["a", "b", "c"]
    assert texts(loader([{"text": "a"}, {"text": "b"}], batch_size=2)) == ["a", "b"]
    ids = [
        s.input_ids.tolist()
        for s in load_samples(loader(torch.arange(6).reshape(3, 2), batch_size=2))
    ]
    assert ids == [[0, 1], [2, 3], [4, 5]]
    batch = {
        "input_ids": torch.tensor([[0, 5], [6, 7]]),
        "attention_mask": torch.tensor([[0, 1], [1, 1]]),
    }
    assert [s.input_ids.tolist() for s in load_samples([batch])] == [[5], [6, 7]]
    assert [s.input_ids.tolist() for s in load_samples([tuple(batch.values())])] == [[5], [6, 7]]
    assert len(load_samples([[{"role": "user", "content": "Hi"}]])) == 1
    assert len(load_samples({"text": str(i)} for i in range(5))) == 5
    again = load_samples(load_samples(["a"]))
    assert again[0].text == "a"
    with pytest.raises(UserError, match="one sample at a time"):
        load_samples([{**batch, "pixel_values": torch.zeros(2, 3)}])
    with pytest.raises(UserError, match="not int"):
        load_samples(3)


def test_demo_sets():
    text, llava = load_samples("demo-text"), load_samples("demo-llava")
    assert all(s.text for s in text) and all(s.images for s in llava)
    assert len(load_samples("demo")) == len(text) + len(llava)


@pytest.mark.parametrize(
    "spec, words",
    [
        ("nonsense", r"unknown dataset 'nonsense'.*known: NeelNanda/pile-10k"),
        ("llava_conv_58", "did you mean 'llava_conv_58k'"),
        ("./none.json", "no such file"),
        ("/none/at/all", "no such file"),
        ("none.parquet", "no such file"),
    ],
)
def test_unknown_names(spec, words):
    with pytest.raises(UserError, match=words):
        load_rows(spec)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("x.json", "[", "not valid JSON"),
        ("x.json", "3", "list of rows"),
        ("x.json", "[]", "is empty"),
        ("x.jsonl", '"a"\n{', "line 2 is not valid JSON"),
        ("x.txt", b"\xff\xfe\xff", "can't be read"),
        ("x.txt", "", "is empty"),
        ("x.xyz", "a,b", "expected a file ending in"),
        ("x.csv", "a,b", "is empty"),
        ("x.csv", "a,a\n1,2", "names a column twice"),
        ("x.csv", "a,b\n1,2,3", "row 2 has more cells"),
        ("x.jsonl.gz", "no gzip", "can't be read"),
        ("x.parquet.gz", "PAR1", "expected a file ending in"),
        ("x.parquet", "no parquet", "can't be loaded"),
        ("folder/x.zip", "a", "holds no"),
    ],
)
def test_wrong_files(tmp_path, monkeypatch, name, content, words):
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=words) as caught:
        load_rows(str(file.parent if "/" in name else file))
    assert "\n" not in str(caught.value)


def test_split_of_a_single_file(tmp_path):
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(UserError, match="no splits"):
        load_rows(f"{tmp_path / 'x.txt'}:split=train")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A cache folder in the hub's layout; returns a function that puts a file of a repository
    there."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets, "hub_answers", lambda: False)

    def put(repo, name):
        folder = tmp_path / f"datasets--{repo.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text("0" * 40)
        file = folder / "snapshots" / ("0" * 40) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    return put


@pytest.mark.parametrize("name", ["llava_instruct_80k", "liuhaotian/llava_instruct_80k"])
def test_llava_from_the_hubs_cache(hub_cache, name):
    hub_cache("liuhaotian/LLaVA-Instruct-150K", "llava_instruct_80k.json").write_text(
        json.dumps([LLAVA_ROW])
    )
    (sample,) = load_samples(name)
    assert sample.images == ("bus.png",) and sample.remote.endswith("/train2017/")


def test_pile_from_the_hubs_cache(hub_cache):
    file = hub_cache("NeelNanda/pile-10k", "data/train-00000-of-00001.parquet")
    hf.Dataset.from_dict({"text": ["one", "two"], "meta": [{"set": "x"}] * 2}).to_parquet(file)
    assert [s.text for s in load_samples("NeelNanda/pile-10k")] == ["one", "two"]


def test_hub_names_go_through_the_library(monkeypatch):
    calls = []

    class Builder:
        def __init__(self, path, config):
            self.path = path
            self.config = SimpleNamespace(
                data_files={"test": [f"hf://datasets/{path}@main/x.parquet"]}
            )

        def download_and_prepare(self):
            pass

        def as_dataset(self, **kw):
            calls.append((self.path, kw))
            return hf.Dataset.from_dict({"text": ["count"], "code": ["1 + 1"]})

    monkeypatch.setattr(datasets, "hub_answers", lambda: True)
    monkeypatch.setattr(hf, "load_dataset_builder", Builder)
    assert [s.text for s in load_samples("mbpp:split=test")] == ["count\n1 + 1"]
    load_rows("NeelNanda/pile-10k")
    assert calls == [
        ("google-research-datasets/mbpp", {"split": "test"}),
        ("NeelNanda/pile-10k", {"split": "train"}),
    ]


@pytest.mark.parametrize("name", ["NeelNanda/pile-10k", "llava_conv_58k", "someone/something"])
def test_offline_is_said_at_once(hub_cache, monkeypatch, name):
    start = time.perf_counter()
    with pytest.raises(UserError, match="--dataset demo or a local") as caught:
        load_rows(name)
    assert "\n" not in str(caught.value) and time.perf_counter() - start < 5


def test_probe_ends_soon(monkeypatch):
    monkeypatch.setattr(datasets, "PROBE_SECONDS", 0.2)
    for proxy in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    # an address that answers nobody
    monkeypatch.setattr(constants, "ENDPOINT", "https://192.0.2.1")
    start = time.perf_counter()
    assert datasets.hub_answers() is False
    assert time.perf_counter() - start < 2
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    assert datasets.hub_answers() is False


def test_data_uri_sample_reads_back(tmp_path):
    uri = "data:image/png;base64," + base64.b64encode(image_bytes()).decode()
    chat = {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": uri}}]}
        ]
    }
    (tmp_path / "x.jsonl").write_text(json.dumps(chat))
    assert load_samples(str(tmp_path / "x.jsonl"))[0].images == (uri,)
