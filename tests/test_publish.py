"""Checkpoints to the Hub, against a stand-in of its HTTP interface on this machine."""

import shutil

import pytest
from hub_stand_in import TOKEN, Hub

from auto_mmround import cli
from auto_mmround.errors import UserError
from auto_mmround.publish import Place, push


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    found = Hub()
    yield found
    found.stop()


@pytest.fixture
def folder(demo_folder, tmp_path):
    return shutil.copytree(demo_folder, tmp_path / demo_folder.name)


def test_a_run_sends_only_when_told_and_privately(hub, tmp_path, capsys):
    words = ["--model", "demo", "--iters", "0", "--output_dir", str(tmp_path), "--overwrite"]
    asked = ["--hub_endpoint", hub.endpoint]
    assert cli.main([*words, *asked]) == 0 and not hub.asked
    formats = ["--format", "auto_round,fake", "--push_to_hub", "me/demo"]
    assert cli.main([*words, *asked, *formats]) == 0
    assert (
        capsys.readouterr().out.splitlines()[-1].startswith(f"{hub.endpoint}/me/demo-fake/commit/")
    )
    assert hub.repos.keys() == {"me/demo-auto_round", "me/demo-fake"}
    assert all(repo["private"] for repo in hub.repos.values())
    files = hub.repos["me/demo-auto_round"]["files"]
    folder = tmp_path / "demo-w4g128-auto_round"
    assert files == {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*") if path.is_file() and path.stem != "report"
    }  # fmt: skip


def test_the_card_has_damage_verdicts_and_recipe(hub, folder):
    words = ["--model", str(folder), "--reference", "demo", "--limit", "2"]
    assert cli.main(["eval", *words]) == 0
    assert cli.main(["verify", str(folder), "--engine", "transformers"]) == 0
    url = push(folder, Place("me/card", public=True, endpoint=hub.endpoint))
    assert url.startswith(hub.endpoint) and not hub.repos["me/card"]["private"]
    card = hub.repos["me/card"]["files"]["README.md"].decode()
    assert "KL" in card and "image" in card and "iters = 0" in card
    assert "transformers" in card.partition("# demo-w4g128")[2].lower()


def test_nothing_goes_to_a_public_repository_unasked(hub, folder):
    hub.repos["me/open"] = {"private": False, "files": {}}
    with pytest.raises(UserError, match="is public: add --public"):
        push(folder, Place("me/open", endpoint=hub.endpoint))
    assert not hub.repos["me/open"]["files"]


@pytest.mark.parametrize("repo", ["demo", "me/x/y", "/x", "me/", "me/a b"])
def test_wrong_names_are_refused_before_the_run(repo, hub, tmp_path, capsys):
    words = ["--model", "demo", "--output_dir", str(tmp_path / "out"), "--push_to_hub", repo]
    assert cli.main(words) == 2
    assert "write USER/NAME" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_no_token_no_hub_no_right_are_one_line(hub, folder, monkeypatch, capsys):
    words = ["push", str(folder), "me/x", "--hub_endpoint"]
    assert cli.main([*words, "http://127.0.0.1:9"]) == 2
    assert "the folder is kept" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert cli.main([*words, hub.endpoint]) == 2
    assert capsys.readouterr().err.strip().count("\n") == 0 and not hub.repos
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert cli.main([*words, hub.endpoint]) == 2
    assert "hf auth login" in capsys.readouterr().err
    assert cli.main(["push", str(folder.parent), "me/x"]) == 2
