"""Runs that are killed, run out of disk or lose part of their journal continue, and end in the same
bits."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from tiny_models import FAMILIES, TEXT, tiny_tokenizer

from auto_mmround.checkpoint.reading import read_checkpoint
from auto_mmround.errors import UserError
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs
from auto_mmround.run.finished import identity

DEEP = replace(FAMILIES["llama"], config=TEXT | {"num_hidden_layers": 4})
FOLDERS = ("model-w4g32-auto_round", "model-w4g32-auto_gptq")
UNFINISHED = "model-w4g32.unfinished"
SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["auto_mmround.run.job", "transformers.models.llama.modeling_llama"])


def run(root: Path, **changes) -> None:
    recipe = Recipe(
        model=str(root.parent / "model"), output_dir=str(root), format="auto_round,auto_gptq",
        group_size=32, iters=2,
        nsamples=4, seqlen=12, amp=False, device="cpu",
    )  # fmt: skip
    recipe = replace(recipe, **changes)
    jobs.run(jobs.prepare(recipe, jobs.load_model(recipe), dataset=DEEP.samples(4)))


def child(root: Path, before: Callable[[], None], changes: dict) -> None:
    torch.set_num_threads(1)
    # the machine stays on: what was written is there, synchronized or not
    os.fsync = lambda handle: None
    before()
    try:
        run(root, **changes)
    except UserError as error:
        print(error, file=(root.parent / "error").open("w"))
        os._exit(2)


def start(root: Path, before: Callable[[], None] = list, **changes):
    process = SPAWN.Process(target=child, args=(root, before, changes))
    process.start()
    return process


def finish(root: Path, before: Callable[[], None] = list, **changes) -> int:
    """Exit code of a run in a process of its own."""
    process = start(root, before, **changes)
    process.join()
    return process.exitcode


class DieAtFileEvent:
    """Kill the process when it is about to open for writing, rename or remove its n-th file, of
    those so named."""

    def __init__(self, count: int, name: str = ""):
        self.count, self.name = count, name

    def __call__(self) -> None:
        sys.addaudithook(self.see)

    def see(self, event: str, args: tuple) -> None:
        writes = (
            event == "open"
            and isinstance(args[1], str)
            and args[1][0] in "wa"
            and ".so" not in str(args[0])
        )
        if (writes or event in ("os.rename", "os.remove")) and self.name in str(args[0]):
            self.count -= 1
            if self.count == 0:
                os.kill(os.getpid(), signal.SIGKILL)


class SmallFiles:
    """No file may grow beyond so many bytes: writing fails as on a full disk."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


def files(root: Path) -> dict[str, bytes]:
    """Contents of all that is below, without what is measured."""
    found = {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }
    for name in found:
        if name.endswith("run.json"):
            record = json.loads(found[name])
            assert record.pop("measured")["seconds"] > 0
            found[name] = json.dumps(record).encode()
        if name.endswith("recipe.toml"):
            found[name] = b"\n".join(
                line for line in found[name].split(b"\n") if b"output_dir" not in line
            )
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(files of a run that nothing disturbed, its seconds, the folder around it, with the
    model)."""
    base = tmp_path_factory.mktemp("resume")
    DEEP.save(base / "model", tiny_tokenizer())
    warm = SPAWN.Process(target=int)  # the server reads the libraries
    warm.start()
    warm.join()
    started = time.monotonic()
    assert finish(base / "whole") == 0
    seconds = time.monotonic() - started
    assert sorted(path.name for path in (base / "whole").iterdir()) == sorted(FOLDERS)
    return files(base / "whole"), seconds, base


def nothing_looks_finished_that_is_not(root: Path, expected: dict[str, bytes]) -> None:
    for folder in FOLDERS:
        if (root / folder).exists():
            assert read_checkpoint(root / folder).files
            assert {
                f"{folder}/{name}": content for name, content in files(root / folder).items()
            } == {name: content for name, content in expected.items() if name.startswith(folder)}


def killed_again_and_again(whole, root: Path, seed: int, kills: int) -> int:
    expected, seconds, _ = whole
    draw = random.Random(seed)
    struck = 0
    for i in range(kills):
        if i % 2 == 0:
            struck += finish(root, DieAtFileEvent(draw.randint(1, 25))) == -signal.SIGKILL
        else:
            process = start(root)
            time.sleep(draw.uniform(0.2, 1.0) * seconds)
            process.kill()
            process.join()
            struck += process.exitcode == -signal.SIGKILL
        nothing_looks_finished_that_is_not(root, expected)
        if all((root / folder).exists() for folder in FOLDERS) and not (root / UNFINISHED).exists():
            break
    else:
        assert finish(root) == 0
    assert files(root) == expected
    return struck


def test_killed_four_times(whole, tmp_path_factory):
    assert killed_again_and_again(whole, whole[2] / "killed", seed=1, kills=4) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 17))
def test_killed_at_twenty_moments_and_more(whole, seed):
    assert killed_again_and_again(whole, whole[2] / f"killed{seed}", seed, kills=4) >= 1


@pytest.fixture(scope="module")
def tuned(whole):
    """A run that was killed as it began to write its first shard: all blocks are finished."""
    root = whole[2] / "tuned"
    assert finish(root, DieAtFileEvent(1, "values.partial")) == -signal.SIGKILL
    assert len(list((root / UNFINISHED).glob("*.safetensors"))) == 4
    return root


@pytest.fixture
def copy(tuned, request):
    root = tuned.parent / request.node.name.replace("[", "-").rstrip("]")
    shutil.copytree(tuned, root)
    return root


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-40] ^= 4
    path.write_bytes(content)


def gone(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    "name, damage",
    [
        ("journal", truncated),
        ("journal", flipped),
        ("00003.safetensors", flipped),
        ("00002.safetensors", gone),
    ],
)
def test_a_damaged_tail_is_seen_and_done_again(whole, copy, name, damage):
    damage(copy / UNFINISHED / name)
    assert finish(copy) == 0
    assert files(copy) == whole[0]


def error_of(root: Path) -> str:
    text = (root.parent / "error").read_text()
    assert text.count("\n") == 1
    return text


def test_a_full_disk_ends_in_one_line_and_the_run_goes_on(whole):
    expected, _, base = whole
    root = base / "full"
    assert finish(root, SmallFiles(3_000)) == 2  # not even the first block
    assert not root.exists() and "make room" in error_of(root)
    smallest = min(
        len(content) for name, content in expected.items() if name.endswith("model.safetensors")
    )
    assert finish(root, SmallFiles(smallest - 1)) == 2
    assert [path.name for path in root.iterdir()] == [UNFINISHED] and "make room" in error_of(root)
    assert finish(root) == 0
    assert files(root) == expected


@pytest.mark.parametrize(
    "changes, key", [({"seed": 7}, "seed"), ({"format": "auto_round"}, "format")]
)
def test_another_recipe_is_refused_until_asked_to_begin_anew(copy, changes, key):
    with pytest.raises(UserError, match=f"another {key} "):
        run(copy, **changes)
    assert len(list((copy / UNFINISHED).glob("*.safetensors"))) == 4
    run(copy, **changes, restart=True, iters=0)
    assert not (copy / UNFINISHED).exists() and (copy / FOLDERS[0]).exists()


def test_another_model_and_other_samples_are_refused(copy, monkeypatch):
    weights = copy.parent / "model" / "model.safetensors"
    times = weights.stat().st_atime_ns, weights.stat().st_mtime_ns
    os.utime(weights, ns=(times[0], times[1] + 10**9))
    try:
        with pytest.raises(UserError, match=r"another model\.safetensors"):
            run(copy)
    finally:
        os.utime(weights, ns=times)
    monkeypatch.setattr(
        sys.modules[__name__],
        "DEEP",
        replace(DEEP, plain=False, media={"text": DEEP.samples(4).pop}),
    )
    monkeypatch.setattr(type(DEEP), "samples", lambda self, count: [DEEP.media["text"](-1)] * 2)
    with pytest.raises(UserError, match="another calibration samples"):
        run(copy)


def test_other_code_of_the_model_is_another_run(tmp_path):
    """Blocks would be tuned for a function that is no more the model's."""
    (tmp_path / "model.safetensors").write_bytes(save({"a": torch.ones(1)}))
    code = tmp_path / "modeling_own.py"

    def known(text: str, trusted: bool) -> dict:
        code.write_text(text)
        recipe = Recipe(model=str(tmp_path), trust_remote_code=trusted)
        return identity(recipe, "{}", tmp_path, ())

    assert known("a = 1", True) != known("a = 2", True) == known("a = 2", True)
    assert known("a = 1", False) == known("a = 2", False)  # it does not run


def test_two_processes_do_not_share_a_run(copy):
    import fcntl

    handle = os.open(copy / UNFINISHED, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(UserError, match="another process"):
            run(copy)
    finally:
        os.close(handle)
