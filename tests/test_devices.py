"""What differs between devices, on stand-ins: a fake package of Gaudi, blocks on two devices,
lengths in buckets."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import dispatch_model
from torch import nn
from two_processes import mixed_inputs, tiny_model

from auto_mmround.calibration.inputs import bucket, padded
from auto_mmround.modalities import PAD
from auto_mmround.model import devices
from auto_mmround.model.chains import Call, Chain
from auto_mmround.model.structure import Stage
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run.finished import Finished
from auto_mmround.run.pipeline import Watcher, quantize
from auto_mmround.run.plan import make_plan

CPU = torch.device("cpu")
HPU_PACKAGE = {
    "__init__.py": "calls = []",
    "torch/__init__.py": "",
    "torch/core.py": (
        "from habana_frameworks import calls\ndef mark_step(): calls.append('mark_step')\n"
    ),
    "torch/hpu.py": (
        """
from habana_frameworks import calls
def device_count(): return 8
def get_device_name(): return 'GAUDI2'
def synchronize(): calls.append('synchronize')
def max_memory_allocated(device): return 3 * 10**9
def mem_get_info(device): return 5 * 10**9, 96 * 10**9
"""
    ),
    "torch/distributed/__init__.py": "",
    "torch/distributed/hccl.py": "from habana_frameworks import calls\ncalls.append('hccl')\n",
}


@pytest.fixture
def gaudi(tmp_path, monkeypatch):
    """A package that answers as habana_frameworks does; the list of calls it got."""
    for name, text in HPU_PACKAGE.items():
        path = tmp_path / "habana_frameworks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield __import__("habana_frameworks").calls
    for name in [name for name in sys.modules if name.startswith("habana_frameworks")]:
        del sys.modules[name]


def test_gaudi_is_found_and_asked_by_its_own_names(gaudi, monkeypatch):
    monkeypatch.setitem(devices.TABLE, "cuda", replace(devices.TABLE["cuda"], count=lambda: 0))
    device = devices.resolve("0")
    assert device == devices.resolve("hpu") == torch.device("hpu") and gaudi == ["hccl"]
    found = devices.traits(device)
    found.mark_step(), found.synchronize(device)
    assert (
        gaudi[-2:] == ["mark_step", "synchronize"]
        and found.padded
        and found.compiler == "hpu_backend"
    )
    assert found.free(device) == 5 * 10**9 and devices.peak_memory(device)["device"] == 3.0
    assert found.backend.endswith("hpu:hccl") and devices.accelerator_name() == "GAUDI2"


def test_each_process_takes_its_own_accelerator(monkeypatch):
    monkeypatch.setitem(devices.TABLE, "cuda", replace(devices.TABLE["cuda"], count=lambda: 4))
    assert devices.resolve("0", 3) == devices.resolve("cuda", 3) == torch.device("cuda", 3)
    assert devices.resolve("cuda:2") == torch.device("cuda", 2)
    for name, rank in (("cuda:2", 1), ("cuda", 4)):
        with pytest.raises(devices.UserError):
            devices.resolve(name, rank)


def run(model, inputs, **changes):
    recipe = Recipe(
        bits=3, group_size=32, iters=2, batch_size=4, amp=False, quant_nontext_module=True
    )
    recipe = replace(recipe, **changes)
    finished = Finished()
    quantize(model, recipe, make_plan(model, recipe), inputs, finished)
    return finished.codes


def test_lengths_are_padded_to_buckets_and_change_nothing(gaudi, monkeypatch):
    inputs = mixed_inputs()
    # one code that falls the other way would change the inputs of all weights behind it
    how = dict(algorithm="gptq", enable_quanted_input=False)
    plain = run(tiny_model(), inputs, **how)
    lazy = replace(devices.TABLE["hpu"], prepare=lambda: None, peak=None)
    monkeypatch.setitem(devices.TABLE, "cpu", lazy)
    model = tiny_model()
    shapes = set()
    model.model.language_model.layers[0].register_forward_pre_hook(
        lambda layer, args: shapes.add(args[0].shape[1])
    )
    masked = run(model, inputs, **how)
    assert {len(sample.modality_T) for sample in inputs} == {24, 32, 40} and shapes == {32, 48}
    # Masked tokens are in no moment and no loss; the order of sums is another.
    same = [(plain[name].q_OI == masked[name].q_OI).float().mean().item() for name in plain]
    assert min(same) > 0.99 and sum(same) / len(same) > 0.999


def test_steps_are_marked_after_every_step_and_pass(gaudi, monkeypatch):
    lazy = replace(devices.TABLE["hpu"], prepare=lambda: None, peak=None)
    monkeypatch.setitem(devices.TABLE, "cpu", lazy)
    monkeypatch.setattr(
        devices,
        "_habana",
        lambda module: __import__(f"habana_frameworks.torch.{module}", fromlist=["x"]),
    )
    run(tiny_model(), mixed_inputs(), quant_nontext_module=False)
    blocks = "".join(
        "s" if call == "synchronize" else "m" for call in gaudi if call != "hccl"
    ).split("s")
    assert len(blocks) == 3 and blocks[2] == ""  # a report for each of two blocks, after its work
    assert all(part.count("m") > 2 for part in blocks[:2])


def test_buckets():
    lengths = range(1, 5000)
    assert all(0 <= bucket(n) - n < max(16, n / 8 + 1) for n in lengths)
    assert len({bucket(n) for n in lengths}) < 60 and bucket(16) == 16 and bucket(1025) == 1152
    sample = padded(mixed_inputs()[0], 32)
    assert sample.kwargs["input_ids"].shape == sample.kwargs["attention_mask"].shape == (1, 32)
    assert sample.kwargs["attention_mask"].sum() == 24 and (sample.modality_T[24:] == PAD).all()
    assert not sample.answer_T[24:].any() and (sample.kwargs["input_ids"] == 260).sum() == 4


def test_blocks_of_a_window_may_lie_on_several_devices():
    class Elsewhere(nn.Linear):
        def parameters(
            self, recurse=True
        ):  # those of a streamed block are on the meta device too, but not to run there
            return iter([SimpleNamespace(is_meta=False, device=torch.device("meta"))])

    blocks = [nn.Linear(4, 4), Elsewhere(4, 4, device="meta")]
    calls = [[Call((), {}, 0), Call((), {}, 0)]] * 2
    chain = Chain(
        Stage("text", "layers", 2), hidden=[torch.ones(1, 3, 4)] * 2, calls=calls, shared=[{}] * 2
    )
    assert chain.run_group(blocks, 0, [0]).device.type == "meta"
    assert chain.run_group(blocks[:1], 0, [1]).device.type == "cpu"
    assert [hidden.device.type for hidden in chain.advanced(blocks[:1], 0, 2).hidden] == [
        "cpu",
        "cpu",
    ]


def test_a_model_placed_by_accelerate_gives_the_same():
    plain, placed = tiny_model(), tiny_model()
    parts = {
        "model.visual": "cpu",
        "model.language_model.layers.0": "cpu",
        "model.language_model.layers.1": "cpu",
    }
    parts |= dict.fromkeys(
        (
            "model.language_model.embed_tokens",
            "model.language_model.norm",
            "model.language_model.rotary_emb",
            "lm_head",
        ),
        "cpu",
    )
    placed = dispatch_model(placed, parts, main_device="cpu", force_hooks=True)
    assert hasattr(placed.model.language_model.layers[0], "_hf_hook")
    one, two = (run(model, mixed_inputs()) for model in (plain, placed))
    assert all(torch.equal(one[name].q_OI, two[name].q_OI) for name in one)


def test_sums_have_a_fixed_order_while_a_run_works_where_the_device_must_be_asked_for_it(
    monkeypatch,
):
    def asked(row):
        monkeypatch.setitem(devices.TABLE, "cpu", row)
        seen, model, recipe = (
            [],
            tiny_model(),
            Recipe(bits=3, group_size=32, iters=1, batch_size=4, amp=False),
        )
        watcher = Watcher(
            step=lambda *step: seen.append(torch.get_deterministic_debug_mode()),
            captured=lambda *done: seen.append(torch.get_deterministic_debug_mode()),
        )
        quantize(model, recipe, make_plan(model, recipe), mixed_inputs(), Finished(), watcher)
        return seen

    row = devices.TABLE["cpu"]
    assert set(asked(row)) == {0}  # a processor always adds in the same order
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    seen = asked(replace(row, repeatable=devices.TABLE["cuda"].repeatable))
    assert 1 in seen and seen[-1] == 1
    assert (
        torch.get_deterministic_debug_mode() == 0
        and torch.utils.deterministic.fill_uninitialized_memory
    )


def test_a_callers_wish_for_an_error_stays(monkeypatch):
    repeatable = devices.TABLE["cuda"].repeatable
    try:
        torch.set_deterministic_debug_mode("error")
        with pytest.raises(KeyError), repeatable():
            assert torch.get_deterministic_debug_mode() == 2
            raise KeyError
        assert torch.get_deterministic_debug_mode() == 2
    finally:
        torch.set_deterministic_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_two_runs_on_cuda_give_the_same_bits():
    one, two = (run(tiny_model().cuda(), mixed_inputs()) for _ in range(2))
    assert all(torch.equal(one[name].q_OI, two[name].q_OI) for name in one)
