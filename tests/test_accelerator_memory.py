"""The stand-in's memory runs out in one phase of a run after the other: the run goes on with less,
or ends with one line, and the weights are as they were."""

from dataclasses import replace

import accelerator
import pytest
import torch
from accelerator import NAME, limited, memory
from tiny_models import FAMILIES, TEXT, ids, tiny_tokenizer

from auto_mmround import cli
from auto_mmround.calibration.inputs import ModelInput
from auto_mmround.errors import UserError
from auto_mmround.evaluate import metrics
from auto_mmround.model import devices, fisher
from auto_mmround.model.chains import Chain
from auto_mmround.model.head import parts
from auto_mmround.numerics import start
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs
from auto_mmround.run import pipeline
from auto_mmround.run.finished import Finished
from auto_mmround.run.output_head import HeadTuner
from auto_mmround.run.session import Session

pytestmark = [accelerator.NEEDED, accelerator.STRICT]
NOTHING = 1024  # bytes: no tensor of a model


@pytest.fixture(autouse=True, scope="module")
def device():
    with accelerator.shown(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(devices.TABLE, NAME, accelerator.ROW)
        yield


MIXED = dict(target_bits=4.0, bit_options="3,4,8")
STATIC = dict(
    data_type="fp8",
    bits=8,
    act_bits=8,
    group_size=-1,
    act_dynamic=False,
    iters=0,
    format="compressed_tensors",
)
FLOATS = dict(data_type="nvfp4", bits=4, act_bits=4, group_size=16, format="compressed_tensors")
CACHES = dict(kv_cache_scheme="fp8", format="compressed_tensors")
# phase -> (who does the work, under what name, options that ask for it, what the line says,
# whether one failure is mended)
PHASES = {
    "capture": (Session, "record", {}, "capturing inputs", False),
    "Fisher information": (Session, "fisher", {}, "Fisher information", False),
    "teacher": (Chain, "advanced", {}, "layers.0", True),
    "second moments": (Session, "moments", {}, "layers.0", True),
    "weights under rounding": (pipeline, "leaves_of", {}, "layers.0", True),
    "solve": (start, "closed_forms", {}, "layers.0", True),
    "steps": (pipeline, "tune_block", {}, "layers.0", True),
    "nearest": (pipeline, "leaves_of", dict(iters=0), "layers.0", False),
    "what the teacher says": (pipeline, "listen", dict(polish=True), "polish", False),
    "polish": (pipeline, "polish", dict(polish=True), "polish", True),
    "equalizing": (pipeline, "equalize", dict(equalize="awq"), "equalizing", False),
    "static inputs": (pipeline, "input_scales", STATIC, "static inputs", False),
    "choosing bits": (jobs, "choose_bits", MIXED, "", False),
    "scales of inputs": (pipeline, "scales_of_window", FLOATS, "layers.0", True),
    "output head": (HeadTuner, "tune", dict(quant_lm_head=True), "outside the blocks", False),
    "keys and values": (pipeline, "kv_scales", CACHES, "keys and values", False),
}
LATE = ("polish", "output head", "keys and values")  # all blocks are finished by then


def run(model, options):
    """What is finished of a run on the device."""
    recipe = Recipe(
        **(dict(group_size=32, nsamples=4, seqlen=12, iters=2, batch_size=2, amp=False) | options),
        device=NAME,
    )
    loaded = jobs.Loaded(model, tiny_tokenizer(), None, None)
    job = jobs.prepare(recipe, loaded, dataset=FAMILIES["llama"].samples(4))
    finished = Finished()
    quantize = pipeline.quantize
    quantize(model, job.recipe, job.plan, job.inputs, finished)
    return finished


def without_memory(monkeypatch, owner, name, times):
    """From now on the first ``times`` calls find no memory on the device."""
    work, calls = getattr(owner, name), []

    def starved(*args, **named):
        calls.append(1)
        if len(calls) > times:
            return work(*args, **named)
        with limited(NOTHING):
            return work(*args, **named)

    monkeypatch.setattr(owner, name, starved)
    return calls


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_without_memory_ends_the_run_with_one_line(phase, monkeypatch):
    owner, name, options, word, _ = PHASES[phase]
    model = FAMILIES["llama"].build().to(NAME)
    before = {key: value.cpu() for key, value in model.state_dict().items()}
    calls = without_memory(monkeypatch, owner, name, 1000)
    with pytest.raises(UserError) as caught:
        run(model, options)
    assert "not enough memory" in str(caught.value) and word in str(caught.value)
    assert "\n" not in str(caught.value) and calls
    if phase not in LATE:
        after = model.state_dict()
        assert all(torch.equal(value, after[key].cpu()) for key, value in before.items())
    monkeypatch.undo()


@pytest.mark.parametrize("phase", [name for name in PHASES if PHASES[name][-1]])
def test_a_phase_that_finds_no_memory_once_is_tried_again(phase, monkeypatch):
    owner, name, options, *_ = PHASES[phase]
    usual = run(FAMILIES["llama"].build().to(NAME), options)
    assert without_memory(monkeypatch, owner, name, 1) == []
    found = run(FAMILIES["llama"].build().to(NAME), options)
    monkeypatch.undo()
    for one, other in zip(usual.reports.values(), found.reports.values(), strict=True):
        assert one.end == pytest.approx(other.end, rel=0.05)


@pytest.mark.parametrize("command", ["quantize", "plan", "eval"])
def test_a_model_that_the_device_has_no_room_for_is_one_line(command, tmp_path, capsys):
    words = ["--model", "demo", "--dataset", "demo", "--device", NAME]
    words += [] if command == "eval" else ["--output_dir", str(tmp_path / "out"), "--no_stream"]
    with limited(NOTHING):
        assert cli.main([*([] if command == "quantize" else [command]), *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert "not enough memory" in line and not (tmp_path / "out").exists()


def test_fisher_information_where_its_graph_has_no_room():
    """Blocks are computed again in the backward pass, to the same sums."""
    deep = replace(FAMILIES["llama"], config=TEXT | dict(num_hidden_layers=24))
    model, rows = deep.build().to(NAME), [ids(after=200, seed=seed) for seed in range(2)]
    recipe = Recipe(group_size=32, nsamples=2, seqlen=203, amp=False, device=NAME)
    loaded = jobs.Loaded(model, tiny_tokenizer(), None, None)
    job = jobs.prepare(recipe, loaded, dataset=rows)

    def needed():
        session = Session(model, job.recipe, job.plan, job.inputs)
        before = memory().used
        accelerator.forget_peak()
        found = session.fisher(job.plan.quantized)
        return found, memory().peak - before

    whole, most = needed()
    with limited(most // 2):
        again, less = needed()
    assert less < most // 2 and whole.channels.keys() == again.channels.keys()
    for name, sums in whole.channels.items():
        torch.testing.assert_close(again.channels[name].cpu(), sums.cpu())


def test_logits_are_made_in_pieces_that_the_device_has_room_for():
    """The labels that are drawn do not depend on the pieces."""
    torch.manual_seed(0)
    head, hidden_TD = torch.nn.Linear(8, 3000).to(NAME), torch.randn(300, 8).to(NAME)

    def gradient():
        drawn = torch.Generator().manual_seed(0)
        return fisher._sampled_gradient(hidden_TD, head.requires_grad_(False), drawn).cpu()

    assert len(list(parts(head, hidden_TD))) == 1
    whole = gradient()
    with limited(8 << 20):
        pieces = [len(piece) for (piece,) in parts(head, hidden_TD)]
        assert max(pieces) * 3000 * 4 < (8 << 20) / 8 and sum(pieces) == 300
        assert torch.equal(gradient(), whole)


def test_scores_are_made_in_pieces_that_the_device_has_room_for():
    """All at once they take six times the room of the logits."""
    torch.manual_seed(0)
    logits_TV, teacher_TV = torch.randn(2, 300, 3000).to(NAME)
    text_T = torch.zeros(300, dtype=torch.int8)
    ids_BT = torch.randint(0, 3000, (1, 300))
    sample = ModelInput("a", {"input_ids": ids_BT}, text_T, torch.ones_like(text_T).bool())
    whole = metrics._scored(logits_TV, teacher_TV, sample)
    with limited(2 * logits_TV.nbytes):
        pieces = metrics._scored(logits_TV, teacher_TV, sample)
    for one, other in zip(whole, pieces, strict=True):
        assert one.is_cpu
        torch.testing.assert_close(one, other)
