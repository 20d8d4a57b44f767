"""What each of two processes runs in test_processes.py, under the variables of a launcher."""

import json
import os
import signal
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from nearest import round_to_nearest
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from auto_mmround.calibration.inputs import ModelInput
from auto_mmround.errors import UserError
from auto_mmround.model.chains import Chain
from auto_mmround.model.structure import Stage
from auto_mmround.numerics.grids import Grid
from auto_mmround.numerics.moments import Moments
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs
from auto_mmround.run.finished import Finished
from auto_mmround.run.mixed import choose_bits
from auto_mmround.run.pipeline import Watcher, quantize
from auto_mmround.run.plan import make_plan
from auto_mmround.run.processes import Processes, codes_checksum, joined
from auto_mmround.run.session import Session

CPU = torch.device("cpu")
IMAGE = 260
RECIPE = Recipe(
    bits=3, group_size=32, quant_nontext_module=True, iters=3, nsamples=17, batch_size=4, amp=False
)


def tiny_model():
    """A tower of two blocks, a text model of two."""
    torch.manual_seed(0)
    text = dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=128,
        vocab_size=300, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
        rope_parameters={"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4},
    )  # fmt: skip
    vision = dict(
        depth=2, embed_dim=64, hidden_size=64, num_heads=2, mlp_ratio=2, initializer_range=0.2
    )
    config = Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE)
    return Qwen2VLForConditionalGeneration(config).eval().requires_grad_(False)


def mixed_inputs():
    """17 samples of two lengths. Images only in those of even number, so that one of two processes
    has none."""
    torch.manual_seed(1)
    inputs = []
    for i in range(17):
        ids = torch.randint(3, 250, (1, 24 + 8 * (i % 3)))
        kwargs = {}
        if i % 4 == 0:
            ids[0, 2:6] = IMAGE
            kwargs = {
                "pixel_values": torch.randn(16, 3 * 2 * 14 * 14),
                "image_grid_thw": torch.tensor([[1, 4, 4]]),
            }
        modality_T = (ids[0] == IMAGE).to(torch.int8)
        kwargs |= {"input_ids": ids, "mm_token_type_ids": modality_T[None].int()}
        inputs.append(
            ModelInput(str(i), kwargs, modality_T, torch.ones(ids.shape[1], dtype=torch.bool))
        )
    return inputs


def primitives(processes: Processes) -> None:
    """Sums, numbers and chains where one process lacks what the other has."""
    rank = processes.rank
    sums = processes.add_named(
        {"both": torch.ones(2) * (rank + 1)} | ({"one": torch.ones(3)} if rank else {}), CPU
    )
    assert {name: t.tolist() for name, t in sums.items()} == {
        "both": [3.0, 3.0],
        "one": [1.0, 1.0, 1.0],
    }

    x = torch.arange(12.0).reshape(6, 2)
    mine, whole = Moments(2), Moments(2)
    mine.add(x[rank::2])
    whole.add(x)
    found = {"q": mine, "k": mine} | ({"expert": mine} if rank else {})
    moments = processes.add_moments(found, CPU)
    torch.testing.assert_close(moments["q"].hessian(), whole.hessian())
    assert moments["k"] is moments["q"] and set(moments) == {"q", "k", "expert"}

    stages = [Stage("vision", "tower", 2), Stage("audio", "ears", 2), Stage("text", "layers", 2)]
    chains = {"layers": Chain(stages[2], hidden=[x] * 3, sample=[rank, rank + 2, rank + 4])}
    if rank:
        chains["tower"] = Chain(stages[0], hidden=[x] * 2, sample=[3, 3], live=True)
    chains = processes.complete(chains, stages)
    assert (
        list(chains) == ["tower", "layers"] and chains["tower"].live and not chains["layers"].live
    )
    assert processes.numbered(chains["layers"]) == (6, {rank: 0, rank + 2: 1, rank + 4: 2})
    assert processes.numbered(chains["tower"]) == (2, {0: 0, 1: 1} if rank else {})

    codes = {
        "w": round_to_nearest(
            torch.randn(4, 8, generator=torch.Generator().manual_seed(rank)), 4, Grid(4, True)
        )
    }
    try:
        processes.agree("layers.0", codes)
    except UserError as error:
        assert "layers.0: process 1 rounds it otherwise" in str(error)
    else:
        raise AssertionError("different codes were not seen")


def tune(processes: Processes, dies: bool) -> dict:
    """Tower and text of a tiny model; ``dies``: process 1 does that in the second block."""
    model = tiny_model()

    def step(block: str, step: int, total: int) -> None:
        if dies and processes.rank == 1 and block.endswith("blocks.1"):
            os.kill(os.getpid(), signal.SIGKILL)

    finished = Finished()
    plan = make_plan(model, RECIPE)
    quantize(model, RECIPE, plan, mixed_inputs(), finished, Watcher(step=step), processes=processes)
    reports = finished.reports.values()
    sums = {
        name: codes_checksum({w.name: finished.codes[w.name] for w in plan.of_block(name)})
        for name in finished.reports
    }
    state = {
        name: tensor.tolist()
        for name, tensor in model.state_dict().items()
        if name.endswith("proj.weight")
    }
    return {"codes": sums, "reports": [report.as_dict() for report in reports], "state": state}


class Dying(Processes):
    """The second process is lost before the second block counts as finished."""

    def agree(self, block, codes) -> None:
        if self.rank == 1 and block.endswith("blocks.1"):
            os.kill(os.getpid(), signal.SIGKILL)
        super().agree(block, codes)


def job(processes: Processes, folder: Path) -> None:
    """The whole journey from the model in ``folder`` to checkpoints beside it. Changes of the
    recipe may lie in recipe.json."""
    given = folder / "recipe.json"
    changes = json.loads(given.read_text()) if given.is_file() else {}
    recipe = replace(RECIPE, model=str(folder / "model"), output_dir=str(folder), device="cpu")
    recipe = replace(recipe, **changes)
    loaded = jobs.load_model(recipe, processes=processes)
    assert loaded.streamed == bool(recipe.stream)
    plan, inputs = make_plan(loaded.model, recipe), mixed_inputs()
    if recipe.target_bits is not None:
        recipe, plan, _ = choose_bits(Session(loaded.model, recipe, plan, inputs))
    jobs.run(jobs.Job(recipe, loaded, plan, inputs, None, ()), None, processes)


def main(mode: str, rank: int, variables: dict[str, str], folder: Path) -> None:
    """Leaves the result in RANK.json, a UserError in RANK.txt with exit status 2."""
    os.environ.update(variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    try:
        with joined(CPU, timedelta(seconds=2 if mode == "hangs" else 60)) as processes:
            if mode == "hangs":
                time.sleep(5 * rank)
            if mode in ("job", "job dies"):
                return job(
                    processes if mode == "job" else Dying(rank, processes.count, rank), folder
                )
            primitives(processes)
            (folder / f"{rank}.json").write_text(json.dumps(tune(processes, mode == "dies")))
    except UserError as error:
        (folder / f"{rank}.txt").write_text(str(error))
        sys.exit(2)
