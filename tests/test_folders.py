"""Local files and folders: splits and configs by names, what `save_to_disk` writes, JSON told by
content, tables."""

import gzip
import json
from contextlib import suppress

import datasets as hf
import pytest
from PIL import Image
from rows import load_samples

from auto_mmround.calibration import media, roots
from auto_mmround.calibration.datasets import load_rows
from auto_mmround.errors import UserError


def lines(folder, files):
    """Write JSON lines files, each with one row that says its name."""
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"text": name}) + "\n")
    return folder


PARTS = {"train/0.jsonl", "train/1.jsonl", "test/0.jsonl"}
SHARDS = ("data/train-00000-of-00001.jsonl", "data/x-y-00000-of-00001.jsonl")


@pytest.mark.parametrize(
    "files, options, found",
    [
        ({"a.jsonl", "b.jsonl"}, "", ["a.jsonl", "b.jsonl"]),
        ({"a.jsonl", "val.jsonl"}, "", ["a.jsonl"]),
        ({"train.jsonl", "dev.jsonl"}, ":split=validation", ["dev.jsonl"]),
        ({"train.jsonl", "dev.jsonl"}, ":split=dev+train", ["dev.jsonl", "train.jsonl"]),
        (PARTS, "", ["train/0.jsonl", "train/1.jsonl"]),
        (PARTS, ":split=train[1:]", ["train/1.jsonl"]),
        (PARTS, ":split=train[:50%]+test", ["train/0.jsonl", "test/0.jsonl"]),
        ({"clean/train.100/0.jsonl", "clean/train.360/0.jsonl"}, ":split=train.360",
            ["clean/train.360/0.jsonl"]),
        ({"a/train.jsonl", "b/train.jsonl"}, ":config=b", ["b/train.jsonl"]),
        ({"a/train.jsonl", "b/train.jsonl"}, ":config=b+a", ["a/train.jsonl", "b/train.jsonl"]),
        ({SHARDS[0], "LICENSE.txt", "dataset_infos.json"}, "", [SHARDS[0]]),
        ({*SHARDS}, ":split=x-y", [SHARDS[1]]),
        ({"test.jsonl"}, "", ["test.jsonl"]),
        ({"a.jsonl", "images/meta.jsonl", ".cache/x.jsonl"}, "", ["a.jsonl"]),
    ],
)  # fmt: skip
def test_splits_and_configs_by_names(tmp_path, files, options, found):
    assert [s.text for s in load_samples(f"{lines(tmp_path, files)}{options}")] == found


def test_what_is_not_read_of_a_folder_is_said(tmp_path, caplog):
    caplog.set_level("INFO")
    hf.Dataset.from_dict({"text": ["one"]}).to_parquet(
        lines(tmp_path, ["a.jsonl"]) / "train.parquet"
    )
    hf.Dataset.from_dict({"text": ["two"]}).to_parquet(tmp_path / "test.parquet")
    assert [s.text for s in load_samples(str(tmp_path))] == ["one"]
    assert "left out: 1 .jsonl" in caplog.text and "split train is read, not test" in caplog.text


@pytest.mark.parametrize("options, found", [("", ["one", "two"]), (":split=test", ["three"])])
def test_a_folder_of_save_to_disk(tmp_path, options, found):
    parts = {
        "train": hf.Dataset.from_dict({"text": ["one", "two"]}),
        "test": hf.Dataset.from_dict({"text": ["three"]}),
    }
    hf.DatasetDict(parts).save_to_disk(tmp_path / "both")
    assert [s.text for s in load_samples(f"{tmp_path / 'both'}{options}")] == found
    # an index of its own is flattened
    parts["train"].shuffle(seed=3).save_to_disk(tmp_path / "one", num_shards=2)
    rows = load_rows(str(tmp_path / "one"))[0]
    assert sorted(rows.sample(i).text for i in range(len(rows))) == ["one", "two"]


@pytest.mark.parametrize(
    "name",
    ["../both/train/data-00000-of-00001.arrow", "/etc/passwd", "state.json", "gone.arrow", 3],
)
def test_the_state_of_save_to_disk_names_files_beside_it(tmp_path, name):
    hf.Dataset.from_dict({"text": ["one"]}).save_to_disk(tmp_path)
    state = json.loads((tmp_path / "state.json").read_text())
    state["_data_files"] = [{"filename": name}]
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"state\.json names"):
        load_rows(str(tmp_path))


def test_a_damaged_arrow_file_is_one_line(tmp_path):
    hf.Dataset.from_dict({"text": ["one" * 99, "two"]}).save_to_disk(tmp_path)
    file = next(tmp_path.glob("*.arrow"))
    whole = file.read_bytes()
    for at in range(0, len(whole), 7):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        with suppress(UserError):
            load_samples(str(tmp_path))


@pytest.mark.parametrize(
    "content", ['{"text": "one"}\n{"text": "two"}\n', '"one"\n\n"two"', '[\n"one",\n"two"\n]']
)
@pytest.mark.parametrize("suffix", ["json", "jsonl", "ndjson"])
def test_lines_and_lists_are_told_by_content(tmp_path, content, suffix):
    (tmp_path / f"x.{suffix}").write_text("\ufeff" + content, encoding="utf-8")
    assert [s.text for s in load_samples(str(tmp_path / f"x.{suffix}"))] == ["one", "two"]


def test_a_line_of_json_may_hold_other_separators(tmp_path):
    text = "a\u2028b\x85c"
    (tmp_path / "x.jsonl").write_text(
        json.dumps({"text": text}, ensure_ascii=False) + "\r\n" + '"two"'
    )
    assert [s.text for s in load_samples(str(tmp_path / "x.jsonl"))] == [text, "two"]


def test_csv_and_gzip(tmp_path):
    (tmp_path / "x.csv").write_text('text,more\n"one, 1",\ntwo,\n')
    assert [s.text for s in load_samples(str(tmp_path / "x.csv"))] == ["one, 1", "two"]
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n"two"\n'))
    assert [s.text for s in load_samples(str(tmp_path / "x.jsonl.gz"))] == ["one", "two"]


@pytest.mark.parametrize("home", ["train", "images", ""])
def test_media_lie_beside_their_table_or_below_the_folder(tmp_path, home):
    (tmp_path / "train").mkdir()
    (tmp_path / home).mkdir(exist_ok=True)
    Image.new("RGB", (30, 30), "red").save(tmp_path / home / "a.png")
    row = {"file_name": "a.png", "text": "A red square."}
    (tmp_path / "train" / "metadata.jsonl").write_text(json.dumps(row))
    (sample,) = load_samples(str(tmp_path))
    assert media.load(
        sample.images[0], "image", roots.parse_roots(None), base=sample.base
    ).size == (30, 30)
