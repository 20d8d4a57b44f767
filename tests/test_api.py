"""`AutoRoundMLLM` from plan to report: results that notebooks show, and runs that go on after a
crash."""

import errno
from pathlib import Path

import pytest
import torch

import auto_mmround
from auto_mmround import AutoRoundMLLM, UserError
from auto_mmround.model import devices
from auto_mmround.model.loading import load
from auto_mmround.run import job as jobs
from auto_mmround.run.pipeline import Watcher

SHORT = {"dataset": "demo", "iters": 1, "nsamples": 8, "seqlen": 64, "device": "cpu"}


def test_plan_evaluate_verify_report(tmp_path):
    mine = AutoRoundMLLM("demo", iters=0, group_size=32, bits=3, device="cpu")
    planned = mine.plan()
    assert planned.bits_per_weight < 4 and "3 bits, group 32, symmetric" in str(planned)
    assert "<table>" in planned._repr_html_() and len(planned.plan.all) > 30
    for what in (mine.verify, mine.report):
        with pytest.raises(UserError, match="call save_quantized"):
            what()
    before = mine.evaluate(limit=2, reference="demo")
    assert before.figures["quantized"].kl["text"] < 1e-6  # nothing is quantized yet
    mine.quantize()
    folders = mine.save_quantized(tmp_path / "out", "auto_round,fake")
    after = mine.evaluate(limit=2, reference="demo")
    assert after.figures["quantized"].kl["text"] > 1e-4
    assert "KL image" in after._repr_html_() and "reference" in str(after)
    assert all((folder / "eval.json").is_file() for folder in folders)
    checked = mine.verify([])
    assert checked.right and str(checked).count("right") == 2
    page = mine.report()
    assert page.path.is_file() and "<iframe" in page._repr_html_()
    (folders[0] / "model.safetensors").write_bytes(b"")
    broken = mine.verify([])
    assert not broken.right and "WRONG" in broken._repr_html_()
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        mine.report()


def test_what_saving_and_verifying_are_given(tmp_path):
    mine = AutoRoundMLLM("demo", iters=0, group_size=32, device="cpu")
    mine.quantize()
    for given, line in (
        ({"format": ""}, "format is empty"),
        ({"format": 4}, "format is an int, expected names with commas, or a list"),
        ({"output_dir": 4}, "output_dir is an int, expected a folder"),
        ({"format": "fake,gguf:q4_k"}, "holds one scheme"),
    ):
        with pytest.raises(UserError, match=line):
            mine.save_quantized(**{"output_dir": tmp_path / "none"} | given)
    assert not list(tmp_path.iterdir())  # neither of the two
    (folder,) = mine.save_quantized(tmp_path / "one", ["fake", "fake"])
    assert folder == tmp_path / "one" and (folder / "config.json").is_file()
    assert mine.verify("none").right
    with pytest.raises(UserError, match="unknown engine 'word'"):
        mine.verify("word")


class Crash(Exception):
    pass


def crash(report) -> None:
    if report.name.endswith("layers.2"):
        raise Crash


def test_a_crashed_run_goes_on_to_the_same_bits(tmp_path, caplog):
    """As a script would that is started again: the model is loaded anew."""
    whole, _ = AutoRoundMLLM("demo", **SHORT).quantize()
    for watcher in (Watcher(block=crash), Watcher()):
        loaded = load("demo")
        mine = AutoRoundMLLM(
            loaded.model, loaded.tokenizer, loaded.processor, output_dir=tmp_path, **SHORT
        )
        try:
            model, _ = mine.quantize(watcher)
        except Crash:
            assert list(tmp_path.glob("*.unfinished"))
    assert "continuing: 3 blocks are finished" in caplog.text
    state = whole.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert len(mine.reports) == 5 and not list(tmp_path.glob("*.unfinished"))
    assert (mine.save_quantized(tmp_path / "done")[0] / "config.json").is_file()


def test_a_run_goes_on_with_the_products_that_it_began_with(tmp_path, monkeypatch):
    """Timed anew, as by another process, they may come out otherwise."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    short = SHORT | {"model_dtype": "bfloat16"}
    for first in (True, False):
        monkeypatch.setattr(devices, "_KNOWN_BF16", [first])
        whole, _ = AutoRoundMLLM("demo", **short).quantize()
        with pytest.raises(Crash):
            AutoRoundMLLM("demo", output_dir=tmp_path, **short).quantize(Watcher(block=crash))
        monkeypatch.setattr(devices, "_KNOWN_BF16", [])
        monkeypatch.setattr(devices, "_bf16_keeps_up", lambda now=not first: now)
        model, _ = AutoRoundMLLM("demo", output_dir=tmp_path, **short).quantize()
        state = whole.state_dict()
        assert devices.timed_bf16() == first
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_full_disk_is_one_line_when_saving(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    mine = AutoRoundMLLM("demo", iters=0, group_size=32, device="cpu")
    mine.quantize()
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "write_checkpoint", full)
        with pytest.raises(UserError, match="out: No space left on device; make room"):
            mine.save_quantized(tmp_path / "out")
    assert mine.save_quantized(tmp_path / "out") == [tmp_path / "out"]


def test_a_model_that_was_changed_does_not_take_up_another_run(tmp_path):
    with pytest.raises(Crash):
        AutoRoundMLLM("demo", output_dir=tmp_path, **SHORT).quantize(Watcher(block=crash))
    other = AutoRoundMLLM("demo", output_dir=tmp_path, **SHORT)
    other.loaded.model.get_input_embeddings().weight.data[-1, -1] += 1
    with pytest.raises(UserError, match="another weights"):
        other.quantize()


def test_the_package_is_typed():
    assert (Path(auto_mmround.__file__).parent / "py.typed").is_file()
