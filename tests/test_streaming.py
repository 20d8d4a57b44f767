"""Models that are read block by block: the same weights, the same files; and runs that meet the end
of memory."""

import gc
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import FAMILIES, TEXT, Tiny, tiny_tokenizer

from auto_mmround import cli
from auto_mmround.cli import parse_recipe
from auto_mmround.errors import UserError
from auto_mmround.model import devices
from auto_mmround.model.loading import DEMO, load
from auto_mmround.model.spool import Spool
from auto_mmround.model.structure import find_stages
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs
from auto_mmround.run.out_of_memory import BatchSize

KINDS = ["llama", "gpt2", "qwen3_moe", "llama4", "qwen2_vl", "qwen3_vl", "whisper", "gemma4"]
pytestmark = pytest.mark.usefixtures("fast_disk")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of a saved tiny model, made when it is first asked for."""
    base = tmp_path_factory.mktemp("models")

    def of(name: str, family: Tiny | None = None) -> Path:
        if not (base / name).exists():
            (family or FAMILIES[name]).save(base / name, tiny_tokenizer())
        return base / name

    return of


@pytest.mark.parametrize("name", KINDS)
def test_blocks_hold_the_same_weights_when_and_while_they_are_asked_for(folder, name):
    whole, streamed = load(str(folder(name))), load(str(folder(name)), stream=True)
    expected, blocks = (
        whole.model.state_dict(),
        [b for stage in find_stages(whole.model) for b in stage.blocks],
    )
    buffers = dict(whole.model.named_buffers())
    assert (
        expected.keys() == streamed.model.state_dict().keys()
        and streamed.streamed
        and not whole.streamed
    )

    def resident() -> set[str]:
        found = streamed.model.state_dict()
        here = {name for name, tensor in found.items() if not tensor.is_meta}
        assert all(
            torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype
            for name in here
        )
        assert all(
            torch.equal(b, buffers[n]) for n, b in streamed.model.named_buffers() if not b.is_meta
        )
        return here

    outside = {key for key in expected if not any(key.startswith(f"{block}.") for block in blocks)}
    assert resident() == outside
    for window in (blocks[:1], blocks[-2:]):
        with streamed.holder.resident(window):
            assert resident() == outside | {
                key for key in expected if key.startswith(tuple(f"{b}." for b in window))
            }
        assert resident() == outside
    sample = FAMILIES[name].samples(1)[-1]
    assert torch.equal(streamed.model(**sample).logits, whole.model(**sample).logits)
    assert not any(p.requires_grad for p in streamed.model.parameters())
    assert len(resident() - outside) < len(expected) - len(outside)


def files(root: Path) -> dict[str, bytes]:
    kept = [
        path
        for path in root.rglob("*")
        if path.is_file() and path.name not in ("recipe.toml", "run.json")
    ]
    return {str(path.relative_to(root)): path.read_bytes() for path in kept}


def run(model: Path, root: Path, family: Tiny, **changes) -> jobs.Job:
    recipe = Recipe(
        model=str(model), output_dir=str(root), format="auto_round,fake", group_size=32, iters=2,
        nsamples=8, seqlen=12,
        quant_nontext_module=True, amp=False, device="cpu",
    )  # fmt: skip
    recipe = replace(recipe, **changes)
    job = jobs.prepare(recipe, jobs.load_model(recipe), dataset=family.samples())
    jobs.run(job)
    return job


@pytest.mark.parametrize("name", ["llama", "qwen2_vl", "qwen3_vl", "qwen3_moe", "gpt2"])
def test_a_streamed_run_writes_the_same_files(folder, tmp_path, name):
    model, family = folder(name), FAMILIES[name]
    run(model, tmp_path / "whole", family, stream=False)
    job = run(model, tmp_path / "streamed", family, stream=True, offload_states=True)
    assert all(
        p.is_meta
        for p in job.loaded.model.get_submodule(job.plan.stages[-1].blocks[0]).parameters()
    )
    expected = files(tmp_path / "whole")
    assert len([name for name in expected if name.endswith(".safetensors")]) == 2
    assert files(tmp_path / "streamed") == expected


def test_a_streamed_run_continues(folder, tmp_path, monkeypatch):
    model, family = folder("llama"), FAMILIES["llama"]
    run(model, tmp_path / "whole", family)
    from auto_mmround.run.finished import Unfinished

    add = Unfinished.add

    def add_one(self, reports, codes):
        if self.reports:
            raise KeyboardInterrupt
        add(self, reports, codes)

    with monkeypatch.context() as patch:
        patch.setattr(Unfinished, "add", add_one)
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "again", family, stream=True)
    run(model, tmp_path / "again", family, stream=True)
    assert files(tmp_path / "again") == files(tmp_path / "whole")


def test_one_block_at_a_time_whatever_the_depth(folder):
    deep = replace(FAMILIES["llama"], config=TEXT | {"num_hidden_layers": 6})
    streamed = load(str(folder("deep", deep)), stream=True).model
    most = 0

    def count(*_) -> None:
        nonlocal most
        here = [
            i
            for i, layer in enumerate(streamed.model.layers)
            if not next(layer.parameters()).is_meta
        ]
        most = max(most, len(here))

    for layer in streamed.model.layers:
        layer.register_forward_hook(count)
    streamed(**deep.samples(1)[0])
    assert most == 1


def test_equalizing_says_that_it_does_not_stream():
    with pytest.raises(UserError, match="equalize needs the whole model"):
        Recipe(equalize="awq", stream=True)
    assert (
        Recipe(low_cpu_mem_mode=1).streams
        and Recipe(low_cpu_mem_usage=True, stream=False).streams is False
    )


def test_models_are_streamed_where_they_take_most_of_the_memory(folder, monkeypatch):
    name = str(folder("llama"))
    size = sum(path.stat().st_size for path in Path(name).glob("*.safetensors"))
    for free, dtype, expected in (
        (size / 0.59, None, False),
        (size / 0.61, None, True),
        (size / 0.61, "bf16", False),
    ):
        monkeypatch.setattr(devices, "free_memory", lambda device, free=free: free)
        assert load(name, dtype=dtype, stream=None).streamed is expected
    words = {
        "--stream": True,
        "--no_stream": False,
        "--no-stream": False,
        "--seed=1": None,
        "--low_cpu_mem_mode=2": True,
    }
    assert {word: parse_recipe([word])[0].streams for word in words} == words


def test_states_in_files_vanish_with_their_tensors(tmp_path):
    spool = Spool(tmp_path)
    tensors = [torch.randn(3, 5).to(dtype) for dtype in (torch.float32, torch.bfloat16)] + [
        torch.empty(0, 4)
    ]
    kept = [spool(tensor) for tensor in tensors]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(kept, tensors))
    assert not list(tmp_path.iterdir())
    inode = [
        line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line
    ]
    assert len(inode) == 2
    del kept
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def crowd(monkeypatch, most: int, error: Exception) -> list[int]:
    """Blocks of llama raise ``error`` for more samples than ``most``; returns the sizes of all
    passes."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    seen: list[int] = []
    forward = LlamaDecoderLayer.forward

    def limited(self, hidden_states, *args, **kwargs):
        seen.append(len(hidden_states))
        if len(hidden_states) > most:
            raise error
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", limited)
    return seen


def same_length(family: Tiny, count: int) -> list:
    from tiny_models import ids

    return [ids(after=12, seed=seed) for seed in range(count)]


OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
ON_HOST = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"
)


@pytest.mark.parametrize("error", [OUT, ON_HOST, MemoryError()])
def test_fewer_samples_at_a_time_where_memory_ends(folder, tmp_path, monkeypatch, caplog, error):
    model, family = folder("llama"), FAMILIES["llama"]
    monkeypatch.setattr(type(family), "samples", lambda self: same_length(self, 8))
    sizes = crowd(monkeypatch, 8, error)
    run(model, tmp_path / "whole", family, format="auto_round", algorithm="sign_round")
    assert max(sizes) == 8
    monkeypatch.undo()
    monkeypatch.setattr(type(family), "samples", lambda self: same_length(self, 8))
    sizes = crowd(monkeypatch, 2, error)
    run(model, tmp_path / "narrow", family, format="auto_round", algorithm="sign_round")
    assert [size for size in sizes if size > 2] == [8, 4] and "2 samples at a time" in caplog.text
    from auto_mmround.checkpoint.loader import from_quantized

    whole, narrow = (
        from_quantized(tmp_path / name / "llama-w4g32-auto_round").model.state_dict()
        for name in ("whole", "narrow")
    )
    same = torch.cat([(whole[name] == narrow[name]).flatten() for name in whole])
    assert same.float().mean() > 0.98  # sums of the same gradients in another order


def test_what_nothing_helps_against_ends_in_one_line_and_keeps_what_is_finished(
    folder, tmp_path, monkeypatch
):
    model, family = folder("llama"), FAMILIES["llama"]
    from auto_mmround.numerics import tuner

    calls = []

    def fails(*args):
        calls.append(1)
        raise OUT

    monkeypatch.setattr(tuner, "_sign_descent", fails)
    with pytest.raises(UserError, match="not enough memory for a single sample"):
        run(model, tmp_path, family, batch_size=4, nsamples=4)
    assert len(calls) == 4  # 4, 2 and 1 samples, then 1 with the states moved to disk
    assert not list(tmp_path.iterdir())


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    tried = []
    with pytest.raises(RuntimeError, match="shape"):
        BatchSize(8).fitting(
            "block", lambda size: tried.append(size) or raises("shape"), lambda: True
        )
    assert tried == [8]


def raises(text: str):
    raise RuntimeError(text)


def test_float16_becomes_float32_on_a_processor_and_stays_what_it_is_in_the_checkpoint(tmp_path):
    source = tmp_path / "half"
    loaded = load("demo", dtype="bfloat16")
    loaded.model.half().save_pretrained(source)
    for path in DEMO.glob("*.json"):
        if path.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copy(path, source)
    assert (
        load(str(source)).model.dtype == load(str(source), stream=True).model.dtype == torch.float32
    )
    assert load(str(source), dtype="float16").model.dtype == torch.float32
    out = str(tmp_path / "out")
    command = (
        f"--model {source} --dataset demo --iters 2 --nsamples 8 --bits 8 --output_dir {out}"
        " --device cpu"
    )
    assert cli.main(command.split()) == 0
    (folder,) = (path for path in Path(out).iterdir() if (path / "config.json").is_file())
    before, after = (
        load_file(source / "model.safetensors"),
        load_file(next(folder.glob("*.safetensors"))),
    )
    same = [name for name in before if name in after]
    assert len(same) > 20 and all(torch.equal(before[name], after[name]) for name in same)
