"""Where engines round the inputs of layers, the student is tuned on rounded inputs, and the teacher
never sees any."""

from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from test_undone import OUT, Calls, places_in, samples, tiny_llama
from tiny_models import FAMILIES, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from two_processes import mixed_inputs, tiny_model

from auto_mmround.calibration.inputs import ModelInput
from auto_mmround.checkpoint.loader import from_quantized
from auto_mmround.errors import UserError
from auto_mmround.model import devices
from auto_mmround.model.capture import capture
from auto_mmround.model.experts import separated
from auto_mmround.numerics.activations import rounded_inputs, straight_through
from auto_mmround.numerics.start import Collector
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.recipe.schemes import SCHEMES
from auto_mmround.run import job as jobs
from auto_mmround.run import pipeline as pipelines
from auto_mmround.run.finished import Finished
from auto_mmround.run.pipeline import quantize
from auto_mmround.run.plan import make_plan
from auto_mmround.verify.proof import prove
from auto_mmround.verify.static import check

W8A8 = Recipe(
    bits=8, group_size=-1, act_bits=8, format="compressed_tensors", iters=2, batch_size=4,
    gradient_accumulate_steps=1, amp=False, quant_nontext_module=True,
)  # fmt: skip
W4A8 = replace(W8A8, bits=4, group_size=16)


def tuned(model, inputs, recipe=W4A8, finished=None):
    finished = Finished() if finished is None else finished
    plan = make_plan(model, recipe)
    quantize(model, recipe, plan, inputs, finished)
    return finished, plan


def hooks_of(model):
    return [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]


@contextmanager
def served(model, plan, measured=None):
    """The model with the inputs of all quantized layers rounded, by plain hooks."""
    with ExitStack() as stack:
        stack.enter_context(separated(model))
        for name, scheme in plan.quantized.items():
            how = scheme.inputs
            if scheme.inputs_measured:
                how += (measured[name],)
            stack.callback(
                model.get_submodule(name)
                .register_forward_pre_hook(
                    lambda _, args, how=how: (rounded_inputs(args[0], *how), *args[1:])
                )
                .remove
            )
        yield


def family_inputs(name):
    found = []
    for i, kwargs in enumerate(FAMILIES[name].samples(4)):
        modality_T = torch.zeros(kwargs["input_ids"].shape[1], dtype=torch.int8)
        found.append(
            ModelInput(str(i), kwargs, modality_T, torch.ones(len(modality_T), dtype=torch.bool))
        )
    return found


@pytest.fixture
def given(monkeypatch):
    """What tuning is given: (stage, first block) -> hidden states of student and of target."""
    seen = {}
    forward_of = pipelines.forward_of

    def spy(student, blocks, first, target, *rest):
        before = [hidden.clone() for hidden in student.hidden]
        behind = [hidden.clone() for hidden in target.hidden]
        seen[student.stage.path, first] = before, behind
        return forward_of(student, blocks, first, target, *rest)

    monkeypatch.setattr(pipelines, "forward_of", spy)
    return seen


def blocks_in(model, path, inputs):
    """Block -> inputs and outputs of the model as it is, for each sample that reaches the stage."""
    found = {}

    def hook(i, _, args, kwargs, output):
        x = args[0] if args else kwargs["hidden_states"]
        y = output if isinstance(output, torch.Tensor) else output[0]
        found.setdefault(i, []).append((x, y))

    blocks = model.get_submodule(path)
    handles = [b.register_forward_hook(partial(hook, i), with_kwargs=True)
               for i, b in enumerate(blocks)]  # fmt: skip
    with torch.no_grad():
        for sample in inputs:
            model(**sample.kwargs, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def test_rounding_is_the_engines_to_the_bit_and_gradients_pass():
    x = (torch.randn(3, 40) * torch.rand(40) * 9).bfloat16().requires_grad_(True)
    for how in (("int", 8, -1), ("fp8", 8, -1), ("mxfp8", 8, 32)):
        out = straight_through(x, rounded_inputs, *how)
        assert torch.equal(out, rounded_inputs(x.detach(), *how))
        (grad,) = torch.autograd.grad((out * torch.arange(40)).sum(), x)
        assert torch.equal(grad, torch.arange(40.0).bfloat16().expand(3, 40))


@pytest.mark.parametrize(
    "changes",
    [{}, {"nblocks": 2}, {"retarget": True}, {"true_sequential": True}, {"algorithm": "gptq"},
     {"algorithm": "sign_round"}, {"enable_torch_compile": True}],
)  # fmt: skip
def test_the_student_is_given_what_the_served_model_gives_and_the_teacher_is_untouched(
    changes, given, monkeypatch
):
    row = replace(devices.TABLE["cpu"], compiler="eager")
    monkeypatch.setitem(devices.TABLE, "cpu", row)
    model, inputs = tiny_model(), mixed_inputs()
    teacher = {path: blocks_in(model, path, inputs)
               for path in ("model.visual.blocks", "model.language_model.layers")}  # fmt: skip
    _, plan = tuned(model, inputs, replace(W4A8, **changes))
    assert not hooks_of(model)
    with served(model, plan):
        student = {path: blocks_in(model, path, inputs) for path in teacher}
    width = changes.get("nblocks", 1)
    assert len(given) == 4 // width
    for (path, first), (before, behind) in given.items():
        for i, (x, y) in enumerate(zip(before, behind, strict=True)):
            wanted = student[path][first][i][0]
            torch.testing.assert_close(x.view_as(wanted), wanted, rtol=1e-3, atol=1e-3)
            plain = teacher[path][first + width - 1][i][1]
            if y.numel():  # without sign steps only some are compared with
                torch.testing.assert_close(y.view_as(plain), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma3n_text", "gpt2", "qwen3_vl", "whisper"])
def test_families_hand_on_rounded_inputs(name, given):
    """Experts, keys that later blocks read, features that join between blocks, Conv1D."""
    inputs = [
        ModelInput(str(i), kwargs, modality_T := torch.zeros(n, dtype=torch.int8), modality_T == 0)
        for i, kwargs in enumerate(FAMILIES[name].samples(4))
        for n in [next(v.shape[1] for k, v in kwargs.items() if k.endswith("input_ids"))]
    ]
    model = FAMILIES[name].build()
    _, plan = tuned(model, inputs, W4A8)
    with served(model, plan):
        chains = capture(model, plan.stages, [sample.kwargs for sample in inputs])
        for path, chain in chains.items():
            blocks = [model.get_submodule(block) for block in chain.stage.blocks]
            for first in range(len(blocks)):
                for i, x in enumerate(given[path, first][0]):
                    wanted = chain.run_group(blocks[:first], 0, [i]) if first else chain.hidden[i]
                    torch.testing.assert_close(x, wanted, rtol=2e-3, atol=2e-3)


def test_solving_for_the_teachers_outputs_reads_the_teachers_own_inputs(monkeypatch):
    kinds = {True: 0, False: 0}
    see = Collector.see

    def spy(self, name, x):
        if name.startswith("model.layers"):
            again = rounded_inputs(x, "int", 8, -1)
            rounded = torch.allclose(x, again, rtol=1e-5, atol=1e-6)
            assert rounded is not self._listening
            kinds[self._listening] += 1
        see(self, name, x)

    monkeypatch.setattr(Collector, "see", spy)
    tuned(tiny_llama(2), samples(), replace(W4A8, retarget=True, algorithm="gptq"))
    assert kinds[True] == kinds[False] > 0


def test_layers_that_read_one_tensor_share_their_moments(monkeypatch):
    seen = []
    moments = Collector.moments

    def spy(self):
        seen.append({name: id(found) for name, found in moments(self).items()})
        return moments(self)

    monkeypatch.setattr(Collector, "moments", spy)
    tuned(tiny_llama(), samples())
    assert len(seen[0]) == 7 and len(set(seen[0].values())) == 4


PASS = pipelines._Journey._pass


@pytest.mark.parametrize("error", [OUT, KeyboardInterrupt(), UserError("stop")])
@pytest.mark.parametrize("part", range(4))
def test_no_hook_is_left_whatever_happens(error, part):
    places = places_in(PASS, lambda: tuned(tiny_llama(), samples()))
    model, at = tiny_llama(), (2 * part + 1) * len(places) // 8
    with Calls(PASS, error, at):
        if error is OUT:  # tried again with fewer samples
            tuned(model, samples())
        else:
            with pytest.raises(type(error)):
                tuned(model, samples())
    assert not hooks_of(model)


def test_after_a_lack_of_memory_inputs_are_rounded_once(given, monkeypatch):
    """Codes are those of a run with fewer samples at a time from the start."""
    narrow = replace(W4A8, batch_size=2, gradient_accumulate_steps=2)
    wanted, _ = tuned(tiny_llama(2), samples(), narrow)
    places = places_in(pipelines._Journey._tune, lambda: tuned(tiny_llama(2), samples()))
    with Calls(pipelines._Journey._tune, OUT, len(places) // 2):
        found, _ = tuned(tiny_llama(2), samples())
    assert_same_codes(found, wanted)


def assert_same_codes(found, wanted):
    assert list(found.codes) == list(wanted.codes)
    for name, codes in wanted.codes.items():
        for one, other in zip(found.codes[name], codes, strict=True):
            same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
            assert same, name


def first_blocks(whole, count):
    """What a run that stopped there had finished."""
    found = Finished()
    for report in list(whole.reports.values())[:count]:
        names = [name for name in whole.codes if name.startswith(f"{report.name}.")]
        found.add([report], {name: whole.codes[name] for name in names})
    return found


@pytest.mark.parametrize("changes", [{}, {"nblocks": 2}, {"retarget": True}])
def test_a_run_that_goes_on_hands_over_rounded_inputs(changes):
    recipe = replace(W4A8, **changes)
    whole, _ = tuned(tiny_llama(4), samples(), recipe)
    half = first_blocks(whole, 2)
    tuned(tiny_llama(4), samples(), recipe, half)
    assert_same_codes(half, whole)


def test_compiled_blocks_round_their_inputs_too(monkeypatch):
    made = []

    def counting(graph, inputs):
        made.append(graph)
        return graph.forward

    torch.compiler.reset()
    plain, _ = tuned(tiny_llama(2), samples())
    row = replace(devices.TABLE["cpu"], compiler=counting)
    monkeypatch.setitem(devices.TABLE, "cpu", row)
    compiled, _ = tuned(tiny_llama(2), samples(), replace(W4A8, enable_torch_compile=True))
    assert made  # the teacher's passes
    assert_same_codes(compiled, plain)


def errors(model, teacher, inputs, kind):
    """Mean squared error behind each text block at tokens of this kind."""
    path = "model.language_model.layers"
    ours, own = (blocks_in(each, path, inputs) for each in (model, teacher))
    return [
        torch.cat([
            (x[1] - y[1])[0][sample.modality_T == kind].flatten()
            for sample, x, y in zip(inputs, ours[block], own[block], strict=True)
        ]).square().mean().item()
        for block in own
    ]  # fmt: skip


def test_an_outlier_channel_of_one_modality_is_repaired():
    """One channel of the images is so large that a token's one scale leaves the others no steps.
    SmoothQuant, which looks at each modality, moves it into the weights; tuning goes on there."""

    def model():
        made = tiny_model()
        with torch.no_grad():
            made.model.visual.merger.mlp[2].bias[7] = 100.0  # what the text is handed of images
            for layer in made.model.language_model.layers:  # which reads little of it
                mine = layer.self_attn, layer.mlp
                for part in (part for each in mine for part in each.children()):
                    if getattr(part, "in_features", 0) == 64 and part is not mine[0].o_proj:
                        part.weight[:, 7] /= 100
        return made

    recipe = replace(W8A8, quant_nontext_module=False, iters=10)
    inputs, teacher = mixed_inputs(), model()
    ways = {"nearest": {"algorithm": "rtn"}, "tuned": {"equalize": "smoothquant"}}
    found = {}
    for way, changes in ways.items():
        student = model()
        _, plan = tuned(student, inputs, replace(recipe, **changes))
        with served(student, plan):
            found[way] = [errors(student, teacher, inputs, kind) for kind in (0, 1)]
    (text, image), (text_nearest, image_nearest) = found["tuned"], found["nearest"]
    assert all(ours < 0.5 * own for ours, own in zip(image, image_nearest, strict=True))
    assert all(ours < own for ours, own in zip(text, text_nearest, strict=True))


@pytest.mark.parametrize("algorithm", ["auto", "sign_round"])
@pytest.mark.parametrize("recipe", [W8A8, W4A8])
def test_it_is_never_worse_than_where_it_starts(recipe, algorithm):
    model = tiny_llama(2)
    untouched = tiny_llama(2)
    finished, plan = tuned(model, samples(24), replace(recipe, algorithm=algorithm, iters=8))
    for report in finished.reports.values():
        assert report.end <= report.start
    # and the reports speak of rounded inputs: the last block's error is that of the served model
    inputs = [sample for i, sample in enumerate(samples(24)) if i in (0, 8, 16)]
    with served(model, plan):
        found = blocks_in(model, "model.layers", inputs)[1]
    wanted = blocks_in(untouched, "model.layers", inputs)[1]
    gaps = [(one[1] - two[1]).square() for one, two in zip(found, wanted, strict=True)]
    error = torch.cat([gap.flatten() for gap in gaps]).mean().item()
    assert report.end == pytest.approx(error, rel=0.05)


FLOATS = {
    "fp8": dict(data_type="fp8", bits=8, group_size=-1, act_bits=8),
    "static": dict(data_type="fp8", bits=8, group_size=-1, act_bits=8, act_dynamic=False),
    "blocks": dict(data_type="fp8", bits=8, group_size=128, act_bits=8),
    "mxfp8": dict(data_type="mxfp8", bits=8, group_size=32, act_bits=8),
    "mxfp4": dict(data_type="mxfp4", bits=4, group_size=32, act_bits=4),
    "nvfp4": dict(data_type="nvfp4", bits=4, group_size=16, act_bits=4),
    "tensor": dict(data_type="fp8", bits=8, group_size=0, act_bits=8, act_dynamic=False),
    "w4afp8": dict(bits=4, group_size=128, act_bits=8, act_data_type="fp8"),
}


def float_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=128, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.mark.parametrize("name", FLOATS)
def test_floats_are_tuned_on_their_rounded_inputs(name, given):
    """Scales of static inputs are there before a block is tuned, and a run that goes on has them
    too."""
    recipe = replace(W8A8, **FLOATS[name])
    model = float_llama()
    finished, plan = tuned(model, samples(16), recipe)
    assert not hooks_of(model)
    measured = {layer: codes.input_scale for layer, codes in finished.codes.items()}
    assert all(
        (scale is not None) == (name in ("static", "tensor", "nvfp4"))
        for scale in measured.values()
    )
    with served(model, plan, measured):
        student = blocks_in(model, "model.layers", samples(16))
    for (_, first), (before, _) in given.items():
        for i, x in enumerate(before):
            torch.testing.assert_close(x, student[first][i][0], rtol=1e-3, atol=1e-3)
    for report in finished.reports.values():
        assert report.end <= report.start
    half, (first, *_) = Finished(), finished.reports.values()
    half.add([first], {n: c for n, c in finished.codes.items() if n.startswith(f"{first.name}.")})
    tuned(float_llama(), samples(16), recipe, half)
    assert_same_codes(half, finished)


def test_a_static_scale_is_that_of_the_students_own_inputs():
    model, inputs = float_llama(), samples(16)
    finished, plan = tuned(model, inputs, replace(W8A8, **FLOATS["static"]))
    measured = {layer: codes.input_scale for layer, codes in finished.codes.items()}
    first = [w.name for w in plan.of_block("model.layers.0")]
    assert measured[first[0]] == measured[first[1]] == measured[first[2]]  # q, k, v
    with served(model, plan, measured):
        seen = blocks_in(model, "model.layers", inputs)[1]
    norm = model.model.layers[1].input_layernorm
    peak = max(norm(x).abs().max().item() for x, _ in seen)
    scale = measured["model.layers.1.self_attn.q_proj"].item()
    assert scale == pytest.approx(peak / 448, rel=1e-5)


def q_k_v(tensors):
    """First scale of each of the matrices that engines fuse."""
    names = (f"model.layers.0.self_attn.{x}_proj.weight_scale" for x in "qkv")
    return [tensors[name].flatten()[0].item() for name in names]


@pytest.mark.parametrize("name", ["static", "tensor", "mxfp4", "nvfp4", "w4afp8"])
@pytest.mark.parametrize("algorithm", ["auto", "rtn"])
def test_files_of_floats_with_rounded_inputs_are_read_back(name, algorithm, tmp_path):
    FAMILIES["llama"].save(tmp_path / "model", tiny_tokenizer())
    float_llama().save_pretrained(tmp_path / "model")
    recipe = replace(
        W8A8, **FLOATS[name], algorithm=algorithm, model=str(tmp_path / "model"),
        output_dir=str(tmp_path), device="cpu", nsamples=4, seqlen=12, quant_nontext_module=False,
    )  # fmt: skip
    job = jobs.prepare(recipe, jobs.load_model(recipe), dataset=FAMILIES["llama"].samples(4))
    (made,) = jobs.run(job, prove=prove)
    assert not [finding for finding in check(made) if finding.severity == "error"]
    model = from_quantized(made, activations=True).model
    tensors = load_file(made / "model.safetensors")
    part = {"nvfp4": "input_global_scale"}.get(name, "input_scale")
    part = part if recipe.scheme.inputs_measured else None
    measured = {layer: tensors[f"{layer}.{part}"] for layer in job.plan.quantized if part}
    ids = FAMILIES["llama"].samples(1)[0]["input_ids"]
    with torch.no_grad(), served(job.loaded.model, job.plan, measured):
        wanted = job.loaded.model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, wanted)
    if name in ("tensor", "w4afp8"):  # also by compressed-tensors, with its own rounding
        with torch.no_grad():
            theirs = AutoModelForCausalLM.from_pretrained(made)(input_ids=ids).logits
        torch.testing.assert_close(theirs, wanted, rtol=0, atol=2e-2 * wanted.std().item())
        assert len({*q_k_v(tensors)}) == (1 if name == "tensor" else 3)


@pytest.mark.parametrize("scheme", ["W8A8", "FP8", "MXFP8"])
def test_eight_bits_of_layers_that_hold_their_weight_transposed_are_read_back(scheme, tmp_path):
    """GPT-2's Conv1D is (in, out), the file's weight (out, in), whose name is the same."""
    FAMILIES["gpt2"].save(tmp_path / "model", tiny_tokenizer())
    recipe = Recipe(
        **SCHEMES[scheme], format="compressed_tensors", iters=0, model=str(tmp_path / "model"),
        output_dir=str(tmp_path), device="cpu",
    )  # fmt: skip
    job = jobs.prepare(recipe, jobs.load_model(recipe))
    (made,) = jobs.run(job, prove=prove)
    read, tuned = from_quantized(made).model.state_dict(), job.loaded.model.state_dict()
    assert all(torch.equal(read[name], tensor) for name, tensor in tuned.items())


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_vl_moe"])
def test_streamed_experts_round_their_inputs_while_the_whole_model_runs(name, tmp_path):
    """Scales of keys and values, and the output head's inputs, are those of the model in memory."""
    FAMILIES[name].save(tmp_path / "model", tiny_tokenizer())
    found = []
    for stream in (False, True):
        recipe = replace(
            W4A8, model=str(tmp_path / "model"), output_dir=str(tmp_path / str(stream)),
            device="cpu", nsamples=4, seqlen=12, kv_cache_scheme="fp8", quant_lm_head=True,
            algorithm="gptq", stream=stream,
        )  # fmt: skip
        job = jobs.prepare(recipe, jobs.load_model(recipe), dataset=FAMILIES[name].samples(4))
        assert job.loaded.streamed == stream
        assert any("experts.0" in layer for layer in job.plan.quantized)
        (made,) = jobs.run(job)
        found.append(load_file(made / "model.safetensors"))
    memory, streamed = found
    assert any(part.endswith("k_scale") for part in memory) and memory.keys() == streamed.keys()
    assert [part for part in memory if not torch.equal(memory[part], streamed[part])] == []
