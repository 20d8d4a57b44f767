"""The pipeline on a strict stand-in accelerator (`accelerator/`): what a device of its own refuses is refused here."""

import json
import logging
import os
from dataclasses import replace

import pytest
import torch
from accelerate import dispatch_model
from tiny_models import FAMILIES, tiny_tokenizer

import accelerator
from accelerator import NAME, limited, memory
from auto_mmround import AutoRoundMLLM, cli
from auto_mmround.evaluation.metrics import measure
from auto_mmround.evaluation.samples import held_out
from auto_mmround.export.checkpoint import read_checkpoint
from auto_mmround.model import devices
from auto_mmround.model.loading import load
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs
from auto_mmround.run.finished import Finished
from auto_mmround.run.pipeline import Watcher, quantize

pytestmark = pytest.mark.skipif(accelerator.compiler() is None, reason="no C++ compiler: c++, or what CXX names")
SHORT = dict(model="demo", dataset="demo", bits=4, iters=2, nsamples=8, seqlen=32, dataset_seed=1)
SHORT.pop("dataset_seed")
log = logging.getLogger("auto_mmround")


@pytest.fixture(autouse=True, scope="module")
def device():
    """Two stand-ins as a row of the table of devices, and no wait for the disk."""
    with accelerator.shown(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(devices.TABLE, NAME, accelerator.ROW)
        patch.setattr(os, "fsync", lambda handle: None)
        yield


def tune(place=NAME, rows=None, **options):
    """(what was finished, the job) of a run without files; all of the model lies on the device, and all codes do not."""
    recipe = Recipe(**(SHORT | options | {"device": place}))
    job = jobs.prepare(recipe, jobs.load_model(recipe), dataset=rows)
    assert {p.device.type for p in job.loaded.model.parameters() if not p.is_meta} == {place}
    finished = Finished()
    quantize(job.loaded.model, job.recipe, job.plan, job.inputs, finished, holder=job.loaded.holder)
    assert {codes.q_OI.device.type for codes in finished.codes.values()} == {"cpu"}
    assert len(finished.codes) == sum(weight.scheme is not None for weight in job.plan.weights)
    return finished, job


def differing(one, other):
    """Share of the integers that differ."""
    assert one.codes.keys() == other.codes.keys()
    pairs = [(one.codes[name].q_OI, other.codes[name].q_OI) for name in one.codes]
    return sum((a != b).sum().item() for a, b in pairs) / sum(a.numel() for a, _ in pairs)


@pytest.fixture(scope="module")
def original():
    """(the model in float32, samples that no run calibrates on)."""
    loaded = load("demo", dtype="float32")
    return loaded.model, held_out(loaded, "demo", limit=12)


def error(job, original):
    """KL of the quantized model to the original on held-out samples, both measured on the processor in float32."""
    reference, inputs = original
    job.loaded.model.to("cpu", torch.float32)
    (found,) = measure([job.loaded.model], inputs, reference=reference)
    return sum(found.kl_sum.values()) / sum(found.positions.values())


def test_names_of_the_device():
    assert devices.resolve(NAME) == devices.resolve(f"{NAME}:0") == torch.device(NAME, 0)
    assert devices.resolve(f"{NAME}:1") == devices.resolve(NAME, 1) == torch.device(NAME, 1)
    with pytest.raises(devices.UserError, match="this machine has 2 ACCEL devices"):
        devices.resolve(f"{NAME}:2")
    with pytest.raises(devices.UserError, match="unknown: use auto, accel, cpu, cuda, hpu"):
        devices.resolve("xpu")
    if not torch.cuda.is_available():
        assert devices.resolve("auto") == devices.resolve("0") == torch.device(NAME, 0)
        assert devices.resolve("1") == torch.device(NAME, 1)


def test_in_float32_the_codes_are_those_of_the_processor():
    """The kernels are the processor's: what differs is attention, which it has a kernel of its own for."""
    exact = dict(model_dtype="float32", amp=False)
    (here, _), (there, _) = tune(**exact), tune("cpu", **exact)
    assert differing(here, there) < 0.01
    for one, other in zip(here.reports.values(), there.reports.values(), strict=True):
        assert one.end == pytest.approx(other.end, rel=0.02) and one.end < one.nearest
