"""What would stop a run when it writes stops it before anything is loaded, in one line, and leaves
nothing."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from tiny_models import FAMILIES, tiny_tokenizer

from auto_mmround import AutoRoundMLLM, cli
from auto_mmround.checkpoint.folder import side_files
from auto_mmround.errors import UserError
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs
from auto_mmround.run.places import check_before_loading, model_label
from auto_mmround.verify.static import check

NAME, BLOCKS = "model-w4g32-auto_round", "model-w4g32.unfinished"
TRUNCATION = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}


@pytest.fixture
def model(tmp_path):
    FAMILIES["llama"].save(tmp_path / "model", tiny_tokenizer())
    return tmp_path / "model"


@pytest.fixture
def unloaded(monkeypatch):
    """Loading would be too late."""
    monkeypatch.setattr(jobs, "load", lambda *args, **kwargs: pytest.fail("the model was loaded"))


def run(model: Path, out: Path | str, *more: str) -> int:
    words = f"--model {model} --output_dir {out} --iters 0 --group_size 32 --device cpu".split()
    return cli.main([*words, *more])


def a_file(model: Path) -> Path:
    (model.parent / "file").write_text("x")
    return model.parent / "file"


def below_a_file(model: Path) -> Path:
    return a_file(model) / "deep" / "deeper"


def a_file_for_the_result(model: Path) -> Path:
    (model.parent / "out").mkdir()
    (model.parent / "out" / NAME).write_text("x")
    return model.parent / "out"


def a_file_for_the_blocks(model: Path) -> Path:
    (model.parent / "out").mkdir()
    (model.parent / "out" / "model-w4g32.unfinished").write_text("x")
    return model.parent / "out"


def a_result_is_there(model: Path) -> Path:
    (model.parent / "out" / NAME).mkdir(parents=True)
    (model.parent / "out" / NAME / "precious.txt").write_text("x")
    return model.parent / "out"


def a_link_where_it_is_written(model: Path) -> Path:
    (model.parent / "out").mkdir()
    (model.parent / "precious").mkdir()
    (model.parent / "precious" / "file").touch()
    (model.parent / "out" / f"{NAME}.partial").symlink_to(model.parent / "precious")
    return model.parent / "out"


def a_long_name(model: Path) -> Path:
    return model.parent / ("x" * 300)


def a_long_path(model: Path) -> Path:
    return model.parent.joinpath(*["x" * 200] * 21)


def read_only(model: Path) -> Path:
    if os.geteuid() == 0:
        return Path("/proc/self/nothing_is_made_here")
    (model.parent / "locked").mkdir(mode=0o500)
    return model.parent / "locked" / "out"


@pytest.mark.parametrize(
    "place, said",
    [
        (a_file, "file is a file"),
        (below_a_file, "file is a file"),
        (a_file_for_the_result, "is a file"),
        (a_file_for_the_blocks, "is a file"),
        (a_result_is_there, "not empty"),
        (a_link_where_it_is_written, "is a link, no folder"),
        (a_long_name, "too long"),
        (a_long_path, "too long"),
        (read_only, "no files can be written"),
        (lambda model: model, "lies in the model's folder"),
        (lambda model: model / "out", "lies in the model's folder"),
        (lambda model: model / "deep" / ".." / "out", "lies in the model's folder"),
    ],
)
def test_places_that_take_no_result(place, said, model, capfd, unloaded):
    out = place(model)
    before = sorted(path for path in model.parent.rglob("*"))
    assert run(model, out) == 2
    (line,) = [
        line for line in capfd.readouterr().err.splitlines() if line.startswith("auto-round-mllm:")
    ]
    assert said in line and sorted(path for path in model.parent.rglob("*")) == before


@pytest.mark.parametrize("nothing", ["", " "])
def test_an_empty_name_is_no_place(nothing, model, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = ["--model", str(model), "--iters", "0", "--output_dir", nothing]
    assert cli.main(words) == 2 and "output_dir is empty" in capfd.readouterr().err
    ours = AutoRoundMLLM(str(model), iters=0, group_size=32, device="cpu")
    with pytest.raises(UserError, match="output_dir is empty"):
        AutoRoundMLLM(str(model), iters=0, output_dir=nothing)
    ours.quantize()
    with pytest.raises(UserError, match="output_dir holds a NUL"):
        Recipe(output_dir="a\0b")
    with pytest.raises(UserError, match="output_dir is empty"):
        ours.save_quantized(nothing)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tilde_is_the_home_folder(model, tmp_path, monkeypatch):
    """The shell leaves it in --output_dir=~/out, and Python everywhere."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(model.parent)
    assert run("~/model", "~/out") == 0
    ours = AutoRoundMLLM("~/model", iters=0, group_size=32, device="cpu")
    ours.quantize()
    assert ours.save_quantized("~/mine") == [tmp_path / "mine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "model", "out"]


def test_links_out_of_the_models_folder(model, tmp_path, capfd, unloaded):
    (tmp_path / "elsewhere.jinja").write_text("x")
    (model / "chat_template.jinja").symlink_to(tmp_path / "elsewhere.jinja")
    assert run(model, tmp_path / "out") == 2
    assert "chat_template.jinja is a link out of the model's folder" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_formats_are_asked_before_anything_is_loaded(model, tmp_path, unloaded):
    assert run(model, tmp_path / "out", "--format", "auto_gtpq") == 2


@pytest.mark.parametrize(
    "family, changes, said",
    [
        ("llama", dict(layer_config={"down_proj": {"group_size": 16}}), "cannot state mixed"),
        ("llama", dict(quant_lm_head=True), "no place for a quantized output head"),
        ("whisper", dict(quant_lm_head=True, format="auto_gptq"), "know a quantized output head"),
    ],
)
def test_what_a_format_cannot_state_is_said_before_anything_is_tuned(
    family, changes, said, tmp_path
):
    FAMILIES[family].save(tmp_path / "model", tiny_tokenizer())
    values = dict(format="auto_awq", iters=0, group_size=32, device="cpu")
    values["untie_lm_head"] = "quant_lm_head" in changes
    recipe = Recipe(model=str(tmp_path / "model"), output_dir=str(tmp_path), **values | changes)
    with pytest.raises(UserError, match=said):
        jobs.prepare(recipe, jobs.load_model(recipe))
    values = values | changes | {"format": "auto_round"}
    ours = AutoRoundMLLM(str(tmp_path / "model"), dataset=FAMILIES[family].samples(), **values)
    ours.quantize()
    formats = ["fake", changes.get("format", "auto_awq")]
    with pytest.raises(UserError, match=said):
        ours.save_quantized(tmp_path / "out", format=formats)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("generation_config.json", {"eos_token_id": 500}, "eos_token_id is 500"),
        ("config.json", {"auto_map": {"AutoConfig": "own.Own"}}, "own.py: is missing"),
        ("other_config.json", None, "other_config.json: is not valid JSON"),
    ],
)
def test_faults_of_the_source_are_not_found_behind_the_run(
    name, change, said, model, tmp_path, capfd, monkeypatch
):
    before = json.loads((model / name).read_text()) if change is not None else {}
    (model / name).write_text("{" if change is None else json.dumps(before | change))
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "load", lambda *args, **kwargs: pytest.fail("the model was loaded"))
        assert run(model, tmp_path / "out") == 2
    assert said in capfd.readouterr().err and not (tmp_path / "out").exists()
    assert run(model, tmp_path / "out", "--no_check") == 0


def test_a_source_whose_tokenizer_cuts_is_a_warning_and_a_result_that_does_is_none(
    model, tmp_path, capfd
):
    """Training that cuts its texts leaves this in many models' files."""
    before = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(before | {"truncation": TRUNCATION}))
    assert run(model, tmp_path / "out") == 0
    assert "tokenizer.json: truncation is switched on" in capfd.readouterr().err
    (folder,) = (tmp_path / "out").iterdir()
    for source in (model, None):
        (found,) = [f for f in check(folder, source) if "truncation" in f.message]
        assert found.severity == "warning"
    cut = json.dumps(before | {"truncation": TRUNCATION | {"max_length": 8}})
    (folder / "tokenizer.json").write_text(cut)
    for source in (model, None):
        (found,) = [f for f in check(folder, source) if "truncation" in f.message]
        assert found.severity == "error"


def test_a_tokenizer_that_is_none_is_one_line(model, tmp_path, capfd):
    """The tokenizers library raises plain `Exception`."""
    written = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(written | {"model": {"type": "None"}}))
    assert run(model, tmp_path / "out") == 2
    assert "its tokenizer can't be read" in capfd.readouterr().err


def test_links_to_the_models_own_files_are_right(tmp_path, model):
    hub = tmp_path / "hub" / "models--a--b"
    (hub / "snapshots" / "abc").mkdir(parents=True)
    (hub / "blobs").mkdir()
    for path in model.iterdir():
        shutil.copy(path, hub / "blobs" / path.name)
        (hub / "snapshots" / "abc" / path.name).symlink_to(Path("../../blobs") / path.name)
    assert run(hub / "snapshots" / "abc", tmp_path / "out") == 0


def test_a_model_inside_the_result_is_never_replaced(model, tmp_path):
    """The folder that would be written is named as the one that holds the model."""
    holder = tmp_path / "m-w4g32-auto_round"
    holder.mkdir()
    shutil.copy(model / "config.json", holder)
    model.rename(holder / "m")
    with pytest.raises(UserError, match="holds the model's folder"):
        check_before_loading(
            Recipe(model=str(holder / "m"), output_dir=str(tmp_path), group_size=32, overwrite=True)
        )
    with pytest.raises(UserError, match="lies in the model's folder"):  # by another name
        (tmp_path / "link").symlink_to(holder / "m")
        check_before_loading(
            Recipe(model=str(holder / "m"), output_dir=str(tmp_path / "link" / "out"))
        )


def test_earlier_results_in_the_models_folder_are_not_copied(model, tmp_path):
    assert run(model, tmp_path / "first") == 0
    shutil.copytree(tmp_path / "first" / NAME, model / "results" / NAME)
    (model / "results" / "w.unfinished").mkdir()
    (model / "results" / "w.unfinished" / "journal").write_text("x")
    (model / "extra").mkdir()
    (model / "extra" / "notes.txt").write_text("x")
    assert {str(path.relative_to(model)) for path in side_files(model)} >= {
        "extra/notes.txt",
        "tokenizer.json",
    }
    assert run(model, tmp_path / "second") == 0
    copied = {
        str(path.relative_to(tmp_path / "second" / NAME))
        for path in (tmp_path / "second" / NAME).rglob("*")
    }
    assert "extra/notes.txt" in copied and not any(name.startswith("results") for name in copied)


def test_the_api_does_not_save_into_the_source(model, tmp_path):
    ours = AutoRoundMLLM(str(model), iters=0, group_size=32, device="cpu", overwrite=True)
    ours.quantize()
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    for place in (model, model / "out", tmp_path):
        with pytest.raises(UserError, match="model's folder"):
            ours.save_quantized(place)
    with pytest.raises(UserError, match="is a file"):
        ours.save_quantized(a_file(model))
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    assert ours.save_quantized(tmp_path / "out") == [tmp_path / "out"]


def test_a_mount_is_not_exchanged_for_the_result(model, tmp_path, monkeypatch):
    """A volume of a container, say: found before anything is written, not by the system after."""
    ours = AutoRoundMLLM(str(model), iters=0, group_size=32, device="cpu")
    ours.quantize()
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "out")
    with pytest.raises(UserError, match=r"is a mount, or .* choose a folder inside it"):
        ours.save_quantized(tmp_path / "out")
    assert ours.save_quantized(tmp_path / "out" / "model") == [tmp_path / "out" / "model"]


def test_a_link_to_another_file_system_is_no_mount(model, tmp_path):
    """The folder that it leads to is replaced, and the one of finished blocks is emptied."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no other file system")
    out = tmp_path / "out"
    out.mkdir()
    with tempfile.TemporaryDirectory(dir=memory) as other:
        for name in (NAME, BLOCKS):
            (Path(other) / name).mkdir()
            (out / name).symlink_to(Path(other) / name)
        assert run(model, out) == 0
        assert (out / NAME).is_symlink() and (Path(other) / NAME / "config.json").is_file()
        assert (out / BLOCKS).is_symlink() and list((Path(other) / BLOCKS).iterdir()) == []
        assert sorted(path.name for path in Path(other).iterdir()) == [NAME, BLOCKS]


def test_a_link_to_nothing_is_no_file(model, tmp_path, capfd):
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    assert run(model, tmp_path / "out") == 2
    assert "is a link to nothing, no folder" in capfd.readouterr().err


def test_a_current_folder_that_is_gone_is_one_line(model, tmp_path, monkeypatch, capfd):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    assert run(model, "out") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith("the current folder was removed: cd to another")
    assert run(model, tmp_path / "out") == 0


def test_a_model_named_by_a_dot_has_the_name_of_its_folder(model, monkeypatch):
    monkeypatch.chdir(model)
    assert [model_label(Recipe(model=name)) for name in (".", "./", str(model), "a/b")] == [
        "model"
    ] * 3 + ["b"]
    (model / "sub").mkdir()
    monkeypatch.chdir(model / "sub")
    assert model_label(Recipe(model="..")) == "model"
