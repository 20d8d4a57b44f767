"""Where memory ends: each phase goes on with less, or ends in one line that names it; and what is
kept where."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from test_streaming import OUT, files, run
from tiny_models import FAMILIES, tiny_texts, tiny_tokenizer

from auto_mmround import AutoRoundMLLM
from auto_mmround.cli import main
from auto_mmround.errors import UserError
from auto_mmround.model import capture as capturing
from auto_mmround.model import devices, placement
from auto_mmround.model import fisher as model_fisher
from auto_mmround.model.chains import Modalities
from auto_mmround.model.fisher import FisherPasses, SideBySide, measure_fisher
from auto_mmround.model.spool import Spool
from auto_mmround.model.streaming import Streamed
from auto_mmround.model.structure import find_stages, linears
from auto_mmround.model.visiting import visiting
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import fisher as fishing
from auto_mmround.run import job as jobs
from auto_mmround.run import out_of_memory as memory
from auto_mmround.run import pipeline, session
from auto_mmround.run import sensitivity as choosing
from auto_mmround.run.loss_weights import modalities_of
from auto_mmround.run.out_of_memory import Graph, Places

pytestmark = pytest.mark.usefixtures("fast_disk")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    FAMILIES["llama"].save(folder, tiny_tokenizer())
    rows = folder.parent / "rows.jsonl"
    texts = tiny_texts(24, 40)
    rows.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return SimpleNamespace(folder=folder, rows=rows, texts=texts)


def failing(monkeypatch, place, name: str, times: int, error: Exception = OUT) -> list[int]:
    """``place.name`` runs out of memory so many times, then works; returns a list that counts its
    calls."""
    calls, whole = [], getattr(place, name)

    def short(*args, **kwargs):
        calls.append(1)
        if len(calls) <= times:
            raise error
        return whole(*args, **kwargs)

    monkeypatch.setattr(place, name, short)
    return calls


# phase -> what runs out of memory, the flags that lead there, and a word of the line
PHASES = {
    "capture": (session, "capture", "", "capturing inputs"),
    "Fisher": (model_fisher, "_sampled_gradient", "", "Fisher information"),
    "equalize": (session, "capture", "--equalize smoothquant", "equalizing"),
    "equalize a block": ("auto_mmround.run.equalize", "_watched_pass", "--equalize awq",
        "equalizing of model.lay"),
    "equalize a pair": ("auto_mmround.run.equalize", "_apply", "--equalize awq",
        "equalizing of model.lay"),
    "bits": (session, "capture", "--target_bits 4.7", "choosing bits"),
    "bits, gradients": ("auto_mmround.model.divergence", "_divergence", "--target_bits 4.7",
        "choosing bits"),
    "bits, rounding": (choosing, "closed_form", "--target_bits 4.7", "choosing bits"),
    "listening": (pipeline, "listen", "--polish", "polish"),
    "polish": ("auto_mmround.model.divergence", "_divergence", "--polish", "polish"),
    "static": ("auto_mmround.run.static_inputs", "run_without_logits",
        "--scheme FP8_STATIC --group_size=-1 --iters 0 "
               "--format compressed_tensors", "scales of static inputs"),
    "nearest": (pipeline, "leaves_of", "--iters 0", "model.layers.0"),
    "writing": (jobs, "write_checkpoint", "--iters 0", "writing auto_round"),
}  # fmt: skip


@pytest.mark.parametrize("name", PHASES)
def test_where_nothing_helps_one_line_names_the_phase(llama, tmp_path, monkeypatch, capsys, name):
    place, function, flags, word = PHASES[name]
    path = f"{place if isinstance(place, str) else place.__name__}.{function}"

    def short(*args, **kwargs):
        raise OUT

    monkeypatch.setattr(path, short)
    command = (
        f"--model {llama.folder} --dataset {llama.rows} --nsamples 12 --seqlen 24 --group_size 32"
        f" --iters 1 {flags}"
    )
    assert main([*command.split(), "--device", "cpu", "--output_dir", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        line.startswith("auto-round-mllm: ") and word in line and "memory" in line and "; " in line
    ), line
    assert not list(tmp_path.glob("out/*auto_round*"))


def test_planning_says_so_too(llama, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "auto_mmround.run.estimate.tune_block", lambda *args, **kwargs: (_ for _ in ()).throw(OUT)
    )
    words = (
        f"plan --model {llama.folder} --dataset {llama.rows} --nsamples 8 --seqlen 24 --group_size"
        " 32 --device cpu"
    )
    assert main([*words.split(), "--output_dir", str(tmp_path)]) == 2
    assert "planning: not enough memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "name", "changes"),
    [
        (session, "capture", {}),
        (model_fisher, "_sampled_gradient", {}),
        ("auto_mmround.model.divergence", "_divergence", {"polish": True}),
        ("auto_mmround.run.equalize", "_watched_pass", {"equalize": "awq"}),
        ("auto_mmround.model.divergence", "_divergence", {"target_bits": 4.7, "group_size": 16}),
    ],
)
def test_with_less_it_is_the_same(llama, tmp_path, monkeypatch, place, name, changes):
    """The first try runs out of memory; the next one, with less in memory, writes the same
    files."""
    family = FAMILIES["llama"]
    run(llama.folder, tmp_path / "whole", family, format="auto_round", **changes)
    place = place if not isinstance(place, str) else __import__(place, fromlist=[name])
    calls = failing(monkeypatch, place, name, 1)
    run(llama.folder, tmp_path / "less", family, format="auto_round", **changes)
    assert len(calls) > 1 and files(tmp_path / "less") == files(tmp_path / "whole")


def test_polish_that_fails_leaves_the_weights_as_they_were(llama, monkeypatch):
    made = AutoRoundMLLM(str(llama.folder), dataset=llama.texts, nsamples=12, seqlen=24,
        group_size=32, iters=1,
                         polish=True, device="cpu", batch_size=4)  # fmt: skip
    from auto_mmround.run import polish as polishing

    seen, whole = [], polishing._held_out

    def third(model, *rest):
        seen.append({name: p.clone() for name, p in model.named_parameters()})
        if len(seen) == 3:
            raise OUT
        return whole(model, *rest)

    monkeypatch.setattr(polishing, "_held_out", third)
    made.quantize()
    before, moved, again = seen[0], seen[2], seen[3]
    assert any(not torch.equal(before[name], moved[name]) for name in before)
    assert all(torch.equal(before[name], again[name]) for name in before)


@pytest.mark.parametrize(
    "name", ["llama", "qwen3_moe", "qwen3_vl", "gemma4", "mistral3", "phi4_multimodal"]
)
def test_side_by_side_and_computed_again_gradients_are_the_same(name, tmp_path):
    """Towers, features added between blocks, keys that blocks share, outputs that the model takes
    by hooks."""
    torch.manual_seed(0)
    family = FAMILIES[name]
    model, inputs = family.build(), family.samples()
    modalities = [
        Modalities(torch.zeros(sample["input_ids"].shape[1], dtype=torch.int8)) for sample in inputs
    ]
    stages = find_stages(model)
    order = [block for stage in stages for block in stage.blocks]
    layers = [
        layer
        for layer, _ in linears(model)
        if any(layer.startswith(f"{block}.") for block in order)
    ]
    twice = FisherPasses(draws=2)
    whole = measure_fisher(model, stages, inputs, modalities, layers, twice)
    assert len(whole.channels) > len(stages) - 1 and whole.tokens
    graph = Graph(model)
    assert not graph.again and graph.relieve() and not graph.relieve()
    with graph():
        again = measure_fisher(model, stages, inputs, modalities, layers, twice)
    sides = [
        SideBySide(count, order, keep)
        for count, keep in ((1, torch.clone), (len(inputs), Spool(tmp_path)))
    ]
    calls: list[int] = []
    hook = model.get_submodule(order[-1]).register_forward_pre_hook(lambda *_: calls.append(0))
    by_side = [
        measure_fisher(model, stages, inputs, modalities, layers, replace(twice, side=side))
        for side in sides
    ]
    hook.remove()
    # a trial; each sample forward and once again, for both draws
    assert len(calls) == len(sides) * (1 + 2 * len(inputs))
    for found in (again, *by_side):
        assert (
            found.channels.keys() == whole.channels.keys()
            and found.tokens.keys() == whole.tokens.keys()
        )
        assert all(
            torch.equal(found.channels[block], table) for block, table in whole.channels.items()
        )
        for layer, by_sample in whole.tokens.items():
            assert all(
                torch.equal(found.tokens[layer][i], weights) for i, weights in by_sample.items()
            ), layer


@pytest.mark.parametrize("name", ["qwen3_asr", "qwen3_omni_moe_thinker"])
def test_a_block_that_stays_while_others_visit_has_its_gradients_too(name):
    """The model's first parameter lies in it, by which others see where the model is."""
    family = FAMILIES[name]
    model, inputs = family.build().requires_grad_(False), family.samples()
    modalities = [
        Modalities(torch.zeros(s["input_ids"].shape[1], dtype=torch.int8)) for s in inputs
    ]
    stages, cpu = find_stages(model), torch.device("cpu")
    whole = measure_fisher(model, stages, inputs, modalities)
    with visiting(model, cpu, whole=False) as holder:
        assert len(holder.blocks) < sum(len(stage.blocks) for stage in stages)
        found = fishing.measure_fisher(
            model, stages, inputs, modalities, [], FisherPasses(), holder,
            fishing.places_of(cpu, None, False),
        )  # fmt: skip
    assert found.channels.keys() == whole.channels.keys()
    assert all(
        torch.equal(found.channels[block], whole.channels[block]) for block in whole.channels
    )


def test_an_error_in_one_of_several_samples_ends_them_all():
    import threading

    model, before = FAMILIES["llama"].build(), threading.active_count()
    inputs = FAMILIES["llama"].samples()
    modalities = [
        Modalities(torch.zeros(sample["input_ids"].shape[1], dtype=torch.int8)) for sample in inputs
    ]
    stages, calls = find_stages(model), []
    layer = model.model.layers[1]

    def short(*args):
        calls.append(1)
        if len(calls) == 2 + 2:  # the first one tries the model
            raise OUT

    handle = layer.register_forward_pre_hook(short)
    with pytest.raises(torch.OutOfMemoryError):
        side = SideBySide(4, stages[0].blocks, torch.clone)
        measure_fisher(model, stages, inputs, modalities, how=FisherPasses(side=side, enough=10**9))
    handle.remove()
    assert threading.active_count() == before and model.model.layers[1] is layer
    assert not any(module._forward_hooks for module in model.model.layers[0].modules())


def test_blocks_are_read_a_few_times_however_many_samples(llama, monkeypatch):
    reads, read = [], Streamed._read
    monkeypatch.setattr(
        Streamed, "_read", lambda self, block: (reads.append(block), read(self, block))[1]
    )
    counts = []
    for samples in (8, 24):
        recipe = Recipe(
            model=str(llama.folder), nsamples=samples, seqlen=24, group_size=32, stream=True,
            device="cpu",
        )  # fmt: skip
        job = jobs.prepare(recipe, jobs.load_model(recipe), dataset=llama.texts)
        assert len(job.inputs) == samples
        modalities = modalities_of(job.inputs)
        reads.clear()
        found = fishing.measure_fisher(
            job.loaded.model, job.plan.stages, [one.kwargs for one in job.inputs], modalities,
            job.plan.quantized, FisherPasses(), job.loaded.holder,
            fishing.places_of(torch.device("cpu"), None, False),
        )  # fmt: skip
        assert all(len(by_sample) == samples for by_sample in found.tokens.values())
        counts.append(len(reads))
    assert counts[0] == counts[1] <= 3 * len(job.loaded.holder.blocks)


def test_as_many_side_by_side_as_memory_holds(llama, monkeypatch):
    model = FAMILIES["llama"].build()
    blocks = find_stages(model)[0].blocks
    each = len(blocks) * 10 * model.config.hidden_size * 4
    for free, count in ((0, 1), (6.1 * each, 2), (20 * each, 8), (10**12, fishing.MOST)):
        monkeypatch.setattr(devices, "free_memory", lambda device, free=free: free)
        assert fishing._side_by_side(model, blocks, 10) == count


def test_blocks_are_computed_again_where_their_graph_is_large(monkeypatch):
    """Estimate against what autograd keeps of a layer."""
    model = FAMILIES["llama"].build()
    sample = FAMILIES["llama"].samples(1)[0]
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    alive: list = []
    layers = model.model.layers
    layers[0].register_forward_pre_hook(
        lambda module, args: (args[0].clone().requires_grad_(), *args[1:])
    )
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(**sample, use_cache=False)
    guess = sum(memory.computed(layer) for layer in layers) * sample["input_ids"].numel()
    assert 0.3 < guess / sum(kept.values()) < 3
    for free, again in ((2.1 * guess, False), (1.9 * guess, True)):
        monkeypatch.setattr(devices, "free_memory", lambda device, free=free: free)
        assert Graph(model, sample["input_ids"].numel()).again is again


def test_choosing_bits_keeps_no_copy_of_all_weights(tmp_path):
    import gc

    model = torch.nn.Sequential(
        *[torch.nn.Linear(96, 96, bias=False) for _ in range(4)]
    ).requires_grad_(False)
    versions = choosing.Versions(tmp_path)
    versions.add(
        {str(i): {16: model[i].weight.clone(), 4: model[i].weight.clone() + 0.01} for i in range(4)}
    )
    trial = choosing.Trial(
        model,
        {},
        {},
        {str(i): (4,) for i in range(4)},
        versions,
        None,
        ("text",),
        [0],  # type: ignore[arg-type]
    )

    def count() -> int:
        gc.collect()
        held = [
            o
            for o in gc.get_objects()
            if type(o) in (torch.Tensor, torch.nn.Parameter) and o.shape == (96, 96)
        ]
        return len({tensor.untyped_storage().data_ptr() for tensor in held})

    sums, before = torch.zeros(1), count()
    with choosing.ExitStack() as stack:
        for i in range(4):
            stack.enter_context(trial._adding(sums, [0], str(i), 4))
        assert count() == before
        with torch.enable_grad():
            model(torch.ones(1, 96)).sum().backward()
        assert all(layer.weight.grad is None for layer in model) and sums.item() != 0
    trial.restore()


@pytest.mark.parametrize("asked", [{"offload_states": True}, {"low_gpu_mem_usage": True}, {}])
def test_states_lie_where_the_recipe_asks_in_every_phase(llama, tmp_path, monkeypatch, asked):
    device, disk = torch.device("meta"), Spool(tmp_path)
    places = Places.of(Recipe(**asked), device, disk)
    wanted = {
        "offload_states": (device, disk),
        "low_gpu_mem_usage": (devices.HOST, None),
        None: (device, None),
    }
    assert tuple(places.first.values()) == wanted[next(iter(asked), None)]
    both = Places.of(Recipe(offload_states=True, low_gpu_mem_usage=True), device, disk)
    assert tuple(both.first.values()) == (devices.HOST, disk)
    tried = []
    with pytest.raises(UserError, match="not enough memory"):
        places.fitting("x", lambda **kept: (tried.append(kept), (_ for _ in ()).throw(OUT)))
    assert tried[-1] == {"store": devices.HOST, "place": disk} and len(tried) == (
        3 if not asked else 2
    )


def test_a_live_chain_is_captured_again_to_where_it_lies(tmp_path):
    family = FAMILIES["llama"]
    model, inputs = family.build(), family.samples()
    spool = Spool(tmp_path)
    (chain,) = capturing.capture(model, find_stages(model), inputs, place=spool).values()
    plain = capturing.recapture(model, replace(chain, place=None), 1, inputs)
    again = capturing.recapture(model, chain, 1, inputs)
    maps = Path("/proc/self/maps").read_text()
    assert all(torch.equal(a, b) for a, b in zip(again.hidden, plain.hidden, strict=True))
    assert again.place is spool and maps.count(str(tmp_path)) >= 2 * len(inputs)


def test_one_expert_is_read_out_of_a_stack(tmp_path, monkeypatch):
    from auto_mmround.model.experts import separable
    from auto_mmround.model.stored import Reader
    from auto_mmround.run.names import Names

    family = FAMILIES["llama4"]
    family.save(tmp_path / "llama4", tiny_tokenizer())
    model = family.build()
    names = Names(model, tmp_path / "llama4")
    stacked = {name: expert for name, expert in separable(model).items() if expert.stacked}
    with Reader(names.stored) as reader:
        expected = {
            name: one.of(reader.tensor(names.stacks[one.parameter]))
            for name, one in stacked.items()
        }
    monkeypatch.setattr(Reader, "tensor", lambda self, key: pytest.fail(f"{key} is read whole"))
    assert expected and all(
        torch.equal(names._stored(stacked[name]), expected[name]) for name in expected
    )


def test_what_accelerate_has_offloaded_is_refused(llama):
    model = FAMILIES["llama"].build()
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"embed_tokens.weight is not in memory"):
        AutoRoundMLLM(model, tiny_tokenizer(), dataset=llama.texts)


@pytest.mark.parametrize("name", ["auto", "sequential"])
def test_a_device_map_that_spills_is_refused_before_anything_is_loaded(llama, monkeypatch, name):
    size = sum(path.stat().st_size for path in llama.folder.glob("*.safetensors"))
    monkeypatch.setattr(placement, "get_max_memory", lambda: {0: size // 2, "cpu": 100 * size})
    monkeypatch.setattr("accelerate.utils.modeling.get_max_memory", lambda given=None: given)
    monkeypatch.setattr(
        "transformers.PreTrainedModel.from_pretrained", lambda *_, **__: pytest.fail("loaded")
    )
    with pytest.raises(
        UserError, match=f"device_map {name}: the devices have no room for .*--stream"
    ):
        jobs.load_model(Recipe(model=str(llama.folder), device_map=name, device="cpu"))


def test_the_head_may_lie_on_another_device_than_the_embeddings(monkeypatch):
    """The model begins on a device that is none: what is indexed with tensors from there raises."""
    from auto_mmround.model import divergence
    from auto_mmround.model.fisher import _Passes

    for place in (model_fisher, divergence):
        monkeypatch.setattr(place, "device_of", lambda model: torch.device("meta"))
    spoken_T, head = torch.tensor([True, True, False, True]), torch.nn.Linear(8, 50)
    hidden_TD = torch.randn(4, 8, requires_grad=True)
    grad_TD = _Passes(head, {0: {}}, {0: spoken_T}, 1, 1, nullcontext)._gradient(
        (0, 0), hidden_TD, head
    )
    assert grad_TD[spoken_T].abs().sum(1).min() > 0 and not grad_TD[2].any()
    before = divergence.Before(
        [{}], [torch.randn(3, 8)], lambda model, kwargs: (hidden_TD * 1, head), nullcontext,
        [spoken_T],
    )  # fmt: skip
    (found,) = before.divergences(head, gradients=True)
    assert hidden_TD.grad is not None and hidden_TD.grad[0].any() and not hidden_TD.grad[2].any()
    assert found > 0
