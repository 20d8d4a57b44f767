"""Several processes on one run: the same result as one, and a clear end when one of them is
lost."""

import json
import multiprocessing
import signal
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import two_processes
from safetensors.torch import load_file
from tiny_models import tiny_tokenizer
from two_processes import RECIPE, mixed_inputs, tiny_model

from auto_mmround.errors import UserError
from auto_mmround.evaluate.evaluate import evaluate
from auto_mmround.evaluate.prompts import Data
from auto_mmround.model import devices
from auto_mmround.run.finished import Finished
from auto_mmround.run.job import load_model
from auto_mmround.run.pipeline import quantize
from auto_mmround.run.plan import make_plan
from auto_mmround.run.processes import ALONE, Processes, launched


def launch(mode, folder):
    """Exit statuses of two processes with the variables that torchrun sets; what they leave lies in
    ``folder``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    context = multiprocessing.get_context("forkserver")  # the imports happen once
    context.set_forkserver_preload(
        ["auto_mmround.run.pipeline", "transformers.models.qwen2_vl.modeling_qwen2_vl"]
    )
    started = [
        context.Process(target=two_processes.main, args=(mode, i, variables, folder))
        for i in range(2)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    return [process.exitcode for process in started]


def test_two_processes_give_what_one_gives(tmp_path):
    assert launch("tunes", tmp_path) == [0, 0], [
        path.read_text() for path in tmp_path.glob("*.txt")
    ]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert (
        first["codes"] == second["codes"]
        and len(first["codes"]) == 4
        and first["state"] == second["state"]
    )
    model = tiny_model()
    finished = Finished()
    quantize(model, RECIPE, make_plan(model, RECIPE), mixed_inputs(), finished)
    # Equal but for the order of sums; every later block inherits the few codes that fall the other
    # way.
    for report, other in zip(finished.reports.values(), first["reports"], strict=True):
        assert other["name"] == report.name and other["nearest"] == pytest.approx(
            report.nearest, rel=0.02
        )
        assert other["start"] == pytest.approx(report.start, rel=0.02)
        assert (
            other["end"] == pytest.approx(report.end, rel=0.02) and other["end"] < other["nearest"]
        )
    weights = torch.cat(
        [tensor.flatten() for name, tensor in model.state_dict().items() if name in first["state"]]
    )
    others = torch.cat([torch.tensor(values).flatten() for values in first["state"].values()])
    assert (weights - others).abs().gt(1e-4).float().mean() < 0.05


@pytest.mark.parametrize(
    "mode, word", [("dies", "another process has ended"), ("hangs", "Timed out")]
)
def test_the_loss_of_a_process_ends_the_other_with_one_line(mode, word, tmp_path):
    assert launch(mode, tmp_path) == [2, -signal.SIGKILL if mode == "dies" else 2]
    line = (tmp_path / "0.txt").read_text()
    assert (
        line.startswith("another process has ended or answers no more")
        and word in line
        and "\n" not in line
    )


def test_after_the_loss_of_a_process_the_same_command_goes_on_to_the_same_bits(tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    for folder in (whole, again):
        tiny_model().save_pretrained(folder / "model")
        tiny_tokenizer().save_pretrained(folder / "model")
    assert launch("job", whole) == [0, 0], [path.read_text() for path in whole.glob("*.txt")]
    assert launch("job dies", again) == [2, -signal.SIGKILL]
    assert "another process has ended" in (again / "0.txt").read_text()
    left = again / "model-w3g32.unfinished"
    assert [path.name for path in sorted(left.glob("*.safetensors"))] == ["00000.safetensors"]
    assert not list(again.glob("*auto_round"))  # nothing looks finished
    assert launch("job", again) == [0, 0] and not left.exists()
    results = [folder / "model-w3g32-auto_round" for folder in (whole, again)]
    one, two = (json.loads((folder / "run.json").read_text()) for folder in results)
    assert one["codes"] == two["codes"] and one["tensors"] == two["tensors"]
    weights, others = ((folder / "model.safetensors").read_bytes() for folder in results)
    assert weights == others


def ready(folder, **changes):
    """A folder with a model and a recipe for two processes."""
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "recipe.json").write_text(json.dumps(changes))
    return folder


# What two processes make of a step on the whole model, beside streaming: it works, or one line.
PAIRS = {
    "equalize": ({"equalize": "awq"}, None),
    "target_bits": ({"target_bits": 3.5, "bit_options": "2,3,4"}, None),
    "act_dynamic = false, rounded to nearest,": (
        {"data_type": "fp8", "bits": 8, "group_size": -1, "act_bits": 8, "act_dynamic": False,
         "iters": 0, "algorithm": "rtn", "format": "compressed_tensors"},
        None,
    ),
    "polish": ({"polish": True}, "polish is for one process; leave one of the two out"),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_steps_on_the_whole_model_streamed_and_in_two_processes(name, tmp_path):
    changes, refused = PAIRS[name]
    instead = f"{name} needs the whole model in memory: no streaming; .+"
    with pytest.raises(UserError, match=instead):  # before anything is loaded
        replace(RECIPE, stream=True, **changes)
    folder = ready(tmp_path / "two", **changes)
    codes = launch("job", folder)
    lines = [path.read_text() for path in sorted(folder.glob("*.txt"))]
    assert codes == ([2, 2] if refused else [0, 0]), lines
    assert lines == ([refused, f"process 1: {refused}"] if refused else [])


def test_each_of_two_processes_holds_one_block_and_the_files_are_the_same(tmp_path):
    results = []
    for name, changes in (("whole", {}), ("streamed", {"stream": True})):
        folder = ready(tmp_path / name, **changes)
        assert launch("job", folder) == [0, 0], [p.read_text() for p in folder.glob("*.txt")]
        results.append((folder / "model-w3g32-auto_round" / "model.safetensors").read_bytes())
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 4, "act_bits": 8, "algorithm": "auto"},
        {"bits": 4, "act_bits": 4, "data_type": "nvfp4", "group_size": 16, "algorithm": "gptq"},
    ],
    ids=["W4A8", "NVFP4"],
)
def test_two_processes_round_inputs_as_one_does(changes, tmp_path):
    """What is measured of inputs, keys and values is that of all samples, and codes differ where
    sums in another order fall the other way."""
    changes |= {"format": "compressed_tensors", "kv_cache_scheme": "fp8"}
    # a code that falls the other way changes nothing behind it
    changes |= {"enable_quanted_input": False}
    found = []
    for count in (1, 2):
        folder = ready(tmp_path / str(count), **changes)
        if count == 1:
            two_processes.job(ALONE, folder)
        else:
            assert launch("job", folder) == [0, 0], [p.read_text() for p in folder.glob("*.txt")]
        (made,) = folder.glob("model-*-compressed_tensors")
        found.append(load_file(made / "model.safetensors"))
    one, two = found
    assert one.keys() == two.keys() and any(name.endswith("k_scale") for name in one)
    for name, tensor in one.items():
        if tensor.dtype in (torch.int8, torch.uint8):
            assert (tensor != two[name]).float().mean() < 0.03, name
        elif name.endswith(("k_scale", "v_scale", "input_global_scale")):
            torch.testing.assert_close(tensor, two[name], rtol=0.05, atol=0)


def test_copies_of_several_processes_must_fit_together(tmp_path, monkeypatch):
    folder = ready(tmp_path)
    size = (folder / "model" / "model.safetensors").stat().st_size
    monkeypatch.setattr(devices, "free_memory", lambda device: 2 * size)
    recipe = replace(RECIPE, model=str(folder / "model"), device="cpu")
    assert not load_model(recipe).streamed
    assert load_model(recipe, processes=Processes(0, 2)).streamed
    assert not load_model(recipe, processes=Processes(0, 2, 0, 1)).streamed  # on two machines


def test_variables_of_launchers(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert launched() == ALONE
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launched() == ALONE
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert (launched().rank, launched().count, launched().local_rank, launched().first) == (
        3,
        4,
        0,
        False,
    )
    assert launched().share(range(10)) == [3, 7]


@pytest.mark.slow
def test_the_demo_by_torchrun_is_as_good_as_by_one_process(tmp_path):
    # Sums in another order flip a code here and there, all later ones follow, and two roundings
    # that are equally good differ in KL by some percent. Where few codes can, in a tiny model, they
    # are compared one by one.
    words = (
        "-m auto_mmround --model demo --model_dtype float32 --dataset demo --bits 3 --nsamples 32"
        " --iters 6"
    )
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--standalone",
    ]
    kl = []
    for name, command in (("one", [sys.executable]), ("two", launcher)):
        done = subprocess.run(
            [*command, *words.split(), "--device", "cpu", "--output_dir", str(tmp_path / name)],
            capture_output=True,
            text=True,
            timeout=1500,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("done in") == 1 and done.stderr.count("calibration: ") == 1
        findings, _ = evaluate(
            str(tmp_path / name / "demo-w3g128-auto_round"),
            Data("demo"),
            reference="demo",
            names="kl",
        )
        kl.append(sum(findings.figures["quantized"].kl.values()))
    assert kl[1] == pytest.approx(kl[0], rel=0.1)
