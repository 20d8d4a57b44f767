"""`eval` and `verify` of models that are decoded block by block: the same figures and verdicts, and
how much of a model is in memory at a time."""

import ctypes
import json
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benches import bench
from nearest import round_to_nearest
from tiny_models import FAMILIES, tiny_tokenizer

from auto_mmround import cli
from auto_mmround.checkpoint.loader import from_quantized, load_any
from auto_mmround.errors import UserError
from auto_mmround.evaluate.held_out import held_out
from auto_mmround.evaluate.metrics import logits_in_turn, logits_of, measure
from auto_mmround.export import packing
from auto_mmround.model import devices, lockstep
from auto_mmround.model.loading import DEMO
from auto_mmround.model.lockstep import in_turn
from auto_mmround.model.streaming import Streamed
from auto_mmround.model.structure import find_stages
from auto_mmround.numerics import grids, pieces
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs
from auto_mmround.verify import values
from auto_mmround.verify.agreement import greedy
from auto_mmround.verify.verify import verify

KINDS = ["llama", "gpt2", "qwen3_moe", "llama4", "qwen2_vl", "qwen3_vl", "whisper", "gemma4"]
pytestmark = pytest.mark.usefixtures("fast_disk")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A tiny model rounded to nearest, and the folder of its source; made when first asked for."""
    base = tmp_path_factory.mktemp("quantized")

    def of(name: str, fmt: str = "auto_round", **changes):
        source, out = base / name, base / f"{name}-{fmt}"
        if not source.exists():
            FAMILIES[name].save(source, tiny_tokenizer())
        if not out.exists():
            recipe = Recipe(model=str(source), output_dir=str(out), format=fmt, group_size=32,
                            iters=0, quant_nontext_module=True, device="cpu")  # fmt: skip
            recipe = replace(recipe, **changes)
            jobs.run(jobs.prepare(recipe, jobs.load_model(recipe)))
        (found,) = (path for path in out.iterdir() if path.is_dir())
        return found, source

    return of


@pytest.fixture
def held(monkeypatch):
    """What lies in memory after each reading of a block: (block, values of the model)."""
    seen: list[tuple[str, int]] = []
    read = Streamed._read

    def counting(self, block):
        read(self, block)
        here = {id(p): p.numel() for p in self._model.parameters() if not p.is_meta}
        seen.append((block, sum(here.values())))

    monkeypatch.setattr(Streamed, "_read", counting)
    return seen


def parts(model) -> tuple[int, int]:
    """(values outside of blocks, those of the largest block)."""
    blocks = [block for stage in find_stages(model) for block in stage.blocks]
    sizes = [sum(p.numel() for p in model.get_submodule(b).parameters()) for b in blocks]
    return sum(p.numel() for p in model.parameters()) - sum(sizes), max(sizes)


@pytest.mark.parametrize("name", KINDS)
def test_decoded_block_by_block_a_checkpoint_computes_the_same(quantized, held, name):
    folder, _ = quantized(name)
    whole, streamed = from_quantized(folder), from_quantized(folder, stream=True)
    assert streamed.streamed and not whole.streamed
    inputs = FAMILIES[name].samples(5)
    found = list(logits_in_turn(streamed.model, inputs, streamed.holder.blocks))
    assert all(map(torch.equal, found, (logits_of(whole.model, kwargs) for kwargs in inputs)))
    outside, block = parts(whole.model)
    assert max(values for _, values in held) <= outside + block
    # all samples of a kind go through a block together; a tower may run once a kind
    assert set(Counter(block for block, _ in held).values()) == {1}


@pytest.mark.parametrize("fmt", ["auto_gptq", "compressed_tensors", "mlx", "fake"])
def test_every_format_is_decoded_block_by_block(quantized, fmt):
    changes = {"sym": False} if fmt == "mlx" else {}
    folder, _ = quantized("llama", fmt, quant_nontext_module=False, **changes)
    whole, streamed = load_any(str(folder)), load_any(str(folder), stream=True)
    assert streamed.streamed and not whole.streamed
    for name in streamed.holder.blocks:
        with streamed.holder.resident([name]):
            assert equal(streamed.model.get_submodule(name), whole.model.get_submodule(name))


def equal(one, other) -> bool:
    """Whether two modules hold the same."""
    found, wanted = one.state_dict(), other.state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


def test_gguf_files_are_decoded_block_by_block(tmp_path):
    recipe = Recipe(model="demo", output_dir=str(tmp_path), format="gguf", iters=0, device="cpu")
    (folder,) = jobs.run(jobs.prepare(recipe, jobs.load_model(recipe)))
    whole, streamed = from_quantized(folder), from_quantized(folder, stream=True)
    name = streamed.holder.blocks[-1]
    with streamed.holder.resident([name]):
        assert equal(streamed.model.get_submodule(name), whole.model.get_submodule(name))


def test_large_weights_are_decoded_and_packed_some_rows_at_a_time(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    w_OI = torch.randn(24, 96, generator=draw)
    for grid in (grids.Grid(3, True), grids.Grid(5, False)):
        codes = round_to_nearest(w_OI, 32, grid)
        whole = grids.dequantize(codes), packing.pack_bits(codes.q_OI, grid.bits)
        correlation = values._correlation(codes, w_OI)
        with monkeypatch.context() as patch:
            patch.setattr(pieces, "PIECE", 500)
            patch.setattr(packing, "PIECE", 50)
            assert torch.equal(grids.dequantize(codes), whole[0])
            assert torch.equal(packing.pack_bits(codes.q_OI, grid.bits), whole[1])
            assert torch.equal(packing.unpack_bits(whole[1], grid.bits, 96), codes.q_OI)
            assert values._correlation(codes, w_OI) == pytest.approx(correlation)
        pair = torch.stack([whole[0].flatten(), w_OI.flatten()])
        assert correlation == pytest.approx(float(torch.corrcoef(pair)[0, 1]), abs=1e-5)
    assert values._correlation(torch.zeros(2, 3), torch.ones(2, 3)) < values.LEAST_CORRELATION


@pytest.mark.parametrize("source", [True, False])
def test_eval_tells_the_same_figures(quantized, held, capsys, demo_folder, source, tmp_path):
    folder = shutil.copytree(demo_folder, tmp_path / demo_folder.name)
    command = ["eval", "--model", str(folder), "--limit", "4", "--device", "cpu", "--json",
               "--tasks", "kl,ppl,vqa" if source else "ppl"]  # fmt: skip
    if source:
        command += ["--reference", str(DEMO)]
    found = []
    for flag in ("--no_stream", "--stream"):
        assert cli.main([*command, flag]) == 0
        made = json.loads(capsys.readouterr().out)
        found.append({k: v for k, v in made.items() if k not in ("seconds", "command")})
    assert found[0] == found[1]
    sizes = parts(load_any(str(DEMO)).model)
    assert held and max(values for _, values in held) <= sum(sizes)


def test_a_reference_that_is_measured_too_runs_once_a_sample(demo, held):
    inputs = held_out(demo, "demo", limit=3)
    streamed = load_any(str(DEMO), stream=True)
    blocks = {streamed.model: streamed.holder.blocks}
    same, again = measure([streamed.model] * 2, inputs, reference=streamed.model, blocks=blocks)
    (wanted,) = measure([demo.model], inputs, reference=demo.model)
    assert same == again == wanted
    assert set(Counter(block for block, _ in held).values()) == {1}


def test_verify_comes_to_the_same_verdict(demo_folder, held):
    options = {"stream": False}, {"stream": True}
    whole, streamed = (verify(demo_folder, ["transformers"], **each) for each in options)
    assert held and whole == streamed and whole.right and whole.verdicts[0].gap >= 0
    held.clear()
    verify(demo_folder, ["transformers"], stream=None)
    assert not held  # there is room for all of it


def test_it_streams_by_itself_where_there_is_no_room(demo_folder, monkeypatch):
    assert not from_quantized(demo_folder, stream=None).streamed
    monkeypatch.setattr(devices, "free_memory", lambda device: 10**7)
    assert from_quantized(demo_folder, stream=None).streamed
    assert load_any(str(demo_folder), stream=None).streamed
    assert load_any(str(DEMO), stream=None).streamed


def test_greedy_tokens_are_the_same_side_by_side(quantized, held, monkeypatch):
    folder, _ = quantized("whisper")
    whole, streamed = from_quantized(folder), from_quantized(folder, stream=True)
    inputs = FAMILIES["whisper"].samples(4)
    works = [lambda kwargs=kwargs: greedy(streamed.model, kwargs, 3) for kwargs in inputs]
    monkeypatch.setattr(lockstep, "MOST", 3)
    found = list(in_turn(streamed.model, streamed.holder.blocks, works, inputs))
    assert found == [greedy(whole.model, kwargs, 3) for kwargs in inputs]
    text = find_stages(whole.model)[-1].blocks
    assert all(Counter(block for block, _ in held)[block] == 2 * 3 for block in text)


def test_what_passes_draw_is_theirs_alone(quantized):
    folder, _ = quantized("llama")
    streamed = from_quantized(folder, stream=True)
    inputs, model = FAMILIES["llama"].samples(3), streamed.model

    def drawing(seed: int):
        torch.manual_seed(seed)
        model(**inputs[seed])
        return torch.rand(2)

    torch.manual_seed(7)
    before = torch.get_rng_state()
    works = [lambda i=i: drawing(i) for i in range(3)]
    found = list(in_turn(model, streamed.holder.blocks, works, inputs))
    assert torch.equal(torch.get_rng_state(), before)
    for i, drawn in enumerate(found):
        torch.manual_seed(i)
        assert torch.equal(drawn, torch.rand(2))


@pytest.mark.parametrize("at", [0, 1])
def test_a_failing_pass_ends_all_of_them(quantized, at):
    folder, _ = quantized("llama")
    streamed = from_quantized(folder, stream=True)
    inputs = FAMILIES["llama"].samples(3)

    def work(i: int):
        logits_of(streamed.model, inputs[i])
        if i == at:
            raise UserError("no")
        logits_of(streamed.model, inputs[i])

    works = [lambda i=i: work(i) for i in range(3)]
    with pytest.raises(UserError, match="no"):
        list(in_turn(streamed.model, streamed.holder.blocks, works, inputs))
    assert list(logits_in_turn(streamed.model, inputs, streamed.holder.blocks))  # as before


def test_who_stops_asking_leaves_no_thread_behind(quantized):
    folder, _ = quantized("llama")
    streamed = from_quantized(folder, stream=True)
    made = logits_in_turn(streamed.model, FAMILIES["llama"].samples(3), streamed.holder.blocks)
    next(made)
    made.close()
    block = streamed.model.get_submodule(streamed.holder.blocks[0])
    assert len(block._forward_pre_hooks) == 1  # the one that reads it


def test_a_damaged_block_is_one_line(quantized, tmp_path, capsys):
    folder, _ = quantized("llama")
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (file,) = broken.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    assert cli.main(["eval", "--model", str(broken), "--stream", "--device", "cpu"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_fewer_samples_side_by_side_where_memory_is_short(quantized, held, monkeypatch):
    folder, _ = quantized("llama")
    streamed = from_quantized(folder, stream=True)
    inputs = FAMILIES["llama"].samples(4)
    room = 2 * 12 * (lockstep.COPIES * 64 * 4 + 12) / lockstep.SHARE + 1
    longest = max(kwargs["input_ids"].shape[1] for kwargs in inputs)
    monkeypatch.setattr(devices, "free_memory", lambda device: int(room * longest**2 / 144))
    with suppress(StopIteration):
        list(logits_in_turn(streamed.model, inputs, streamed.holder.blocks))
    assert set(Counter(block for block, _ in held).values()) <= {2, 3, 4}


COMMAND = """
import resource, sys
import torch
from auto_mmround import cli, console  # what every command imports
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
status = cli.main(sys.argv[1:])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(f"PEAK {1024 * start} {1024 * peak}")
sys.exit(status)
"""
ROOM = 700e6  # bytes above a block, and above Python with its libraries


@pytest.fixture(scope="module")
def two_gigabytes(tmp_path_factory):
    """A random model of 2 GB, and folders of it rounded to nearest: (its folder's parent, packed,
    plain, bytes of a block)."""
    base = tmp_path_factory.mktemp("large")
    _, size, block = bench("scale").make(base / "model", 2.0)
    assert size > 1.9e9
    command = ["--model", str(base / "model"), "--iters", "0", "--format", "auto_round,fake",
               "--output_dir", str(base / "out"), "--stream", "--device", "cpu"]  # fmt: skip
    subprocess.run([sys.executable, "-m", "auto_mmround", *command], check=True)
    rows = [{"text": " ".join(f"w{(7 * i + j) % 120 + 4}" for j in range(48))} for i in range(4)]
    (base / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    packed, plain = (next((base / "out").glob(f"*-{name}")) for name in ("auto_round", "fake"))
    yield base, packed, plain, block
    shutil.rmtree(base)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["eval", "static", "engine"])
def test_a_model_of_two_gigabytes_takes_the_memory_of_a_block(two_gigabytes, what):
    base, packed, plain, block = two_gigabytes
    source = str(base / "model")
    arguments, wide = {
        "eval": (["eval", "--model", str(packed), "--reference", source, "--device", "cpu",
                  "--dataset", str(base / "rows.jsonl"), "--stream"], 1),
        "static": (["verify", str(packed), "--source", source, "--engine", "none"], 1),
        "engine": (["verify", str(plain), "--engine", "transformers", "--stream"], 2),
    }[what]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", COMMAND, *arguments], capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    start, peak = map(int, done.stdout.split("PEAK ")[1].split())
    print(what, f"{start / 1e6:.0f} -> {peak / 1e6:.0f} MB, a block {wide * block / 1e6:.0f}")
    assert peak - start <= wide * block + ROOM  # decoded to float32 a block is twice as large


def test_threads_of_passes_compute_on_as_many_cores_as_the_caller():
    """Products in a new thread go to all cores else, and their last bits may differ."""
    places = (Path(torch.__file__).parent / "lib").glob("libgomp*")
    openmp = ctypes.CDLL(str(next(iter(places), "") or pytest.skip("torch with another OpenMP")))
    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            with lockstep.threads_of(1) as threads:
                assert threads.submit(openmp.omp_get_max_threads).result() == count
    finally:
        torch.set_num_threads(before)
