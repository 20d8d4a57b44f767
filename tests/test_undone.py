"""Work on weights in memory that fails halfway, for lack of memory or by Ctrl-C, leaves them as
they were."""

import inspect
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, ids
from transformers import LlamaConfig, LlamaForCausalLM

import auto_mmround
from auto_mmround.calibration.inputs import ModelInput
from auto_mmround.errors import UserError
from auto_mmround.model import pairs
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import equalize, polish, sensitivity
from auto_mmround.run import pipeline as pipelines
from auto_mmround.run.finished import Finished
from auto_mmround.run.mixed import choose_bits
from auto_mmround.run.pipeline import quantize
from auto_mmround.run.plan import make_plan
from auto_mmround.run.session import Session

PACKAGE = str(Path(auto_mmround.__file__).parent)
RECIPE = Recipe(
    bits=2,
    group_size=16,
    iters=2,
    batch_size=4,
    gradient_accumulate_steps=1,
    amp=False,
    fisher=False,
)
OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def tiny_llama(layers=1):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=2,
        vocab_size=128,
        initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def samples(count=8):
    """Of different lengths, so that none run together and a smaller batch gives the same bits."""
    found = []
    for seed in range(count):
        kwargs = ids(after=6 + seed, seed=seed)
        tokens = kwargs["input_ids"].shape[1]
        found.append(
            ModelInput(
                str(seed),
                kwargs,
                torch.zeros(tokens, dtype=torch.int8),
                torch.ones(tokens, dtype=torch.bool),
            )
        )
    return found


def codes_of(model, recipe=RECIPE, finished=None):
    finished = Finished() if finished is None else finished
    quantize(model, recipe, make_plan(model, recipe), samples(), finished)
    return finished.codes


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


# What ends a `with` or stands in a `finally`: it allocates nothing. The last is hypothesis' own,
# called by the garbage collector, where no error gets through.
LEAVING = ("__exit__", "remove", "requires_grad_", "set_float32_matmul_precision", "pop_all",
    "gc_callback")  # fmt: skip


def resumed(frame):
    """Whether a generator goes on, or is closed: there Python swallows errors."""
    code = frame.f_code
    return bool(code.co_flags & inspect.CO_GENERATOR) and frame.f_lineno != code.co_firstlineno


class Calls:
    """Every call that the package's code makes while a function runs, by the place it is made at.

    At the ``fails_at``-th of these places, when it is come to for the first time, ``error`` is
    raised.
    """

    def __init__(self, where, error=OUT, fails_at=None):
        self.where, self.error, self.fails_at = where.__code__, error, fails_at
        self.places: dict[tuple, None] = {}
        self.depth = 0

    def __enter__(self):
        sys.setprofile(self.see)
        return self

    def __exit__(self, *failure):
        sys.setprofile(None)

    def see(self, frame, event, arg):
        if frame.f_code is self.where and event in ("call", "return"):
            self.depth += 1 if event == "call" else -1
        caller = frame if event == "c_call" else frame.f_back
        if (
            not self.depth
            or event not in ("call", "c_call")
            or not caller.f_code.co_filename.startswith(PACKAGE)
        ):
            return
        called = arg.__name__ if event == "c_call" else frame.f_code.co_name
        if called in LEAVING or (event == "call" and resumed(frame)):
            return
        place = (caller.f_code.co_filename, caller.f_lineno, called)
        if place not in self.places:
            self.places[place] = None
            if len(self.places) - 1 == self.fails_at:
                raise self.error


def places_in(where, work):
    with Calls(where) as seen:
        work()
    return list(seen.places)


TUNE = pipelines._Journey._tune
PLACES = 12  # of all, those that the quick tests try


@pytest.fixture(scope="module")
def expected():
    """Codes of an undisturbed run of two samples at a time, and the number of places where calls
    are made."""
    found = {}

    def of(name, build):
        if name not in found:
            narrow = replace(RECIPE, batch_size=2, gradient_accumulate_steps=2)
            places = places_in(TUNE, lambda: codes_of(build()))
            found[name] = codes_of(build(), narrow), places
        return found[name]

    return of


@pytest.mark.parametrize("part", range(PLACES))
def test_memory_that_ends_anywhere_in_a_block_gives_what_half_as_many_samples_give(
    expected, part, caplog
):
    wanted, places = expected("llama", tiny_llama)
    assert len(places) > 200
    at = (2 * part + 1) * len(places) // (2 * PLACES)
    with Calls(TUNE, fails_at=at):
        found = codes_of(tiny_llama())
    assert "2 samples at a time" in caplog.text, places[at]
    assert all(
        torch.equal(a, b) for name in wanted for a, b in zip(found[name][:3], wanted[name][:3])
    ), places[at]


def test_it_does_at_the_places_that_write_weights(expected):
    wanted, places = expected("llama", tiny_llama)
    writing = [
        i
        for i, (file, _, called) in enumerate(places)
        if called in ("refresh", "copy_", "note", "codes", "add")
    ]
    assert len(writing) > 5
    for at in writing:
        with Calls(TUNE, fails_at=at):
            found = codes_of(tiny_llama())
        assert all(
            torch.equal(a, b) for name in wanted for a, b in zip(found[name][:3], wanted[name][:3])
        ), places[at]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_it_does_at_every_place(expected, name):
    build = tiny_llama if name == "llama" else FAMILIES[name].build
    wanted, places = expected(name, build)
    for at in range(len(places)):
        with Calls(TUNE, fails_at=at):
            found = codes_of(build())
        assert all(
            torch.equal(a, b) for name in wanted for a, b in zip(found[name][:3], wanted[name][:3])
        ), places[at]


@pytest.mark.parametrize("part", range(PLACES))
def test_ctrl_c_in_a_block_leaves_its_weights_as_they_were(expected, part):
    _, places = expected("llama", tiny_llama)
    model = tiny_llama()
    before = state_of(model)
    with (
        pytest.raises(KeyboardInterrupt),
        Calls(TUNE, KeyboardInterrupt(), (2 * part + 1) * len(places) // (2 * PLACES)),
    ):
        codes_of(model)
    assert_same(state_of(model), before)
    assert all(
        parameter.grad is None and not parameter.requires_grad for parameter in model.parameters()
    )


@pytest.mark.parametrize("data_type", ["int", "fp8", "nvfp4"])
def test_rounding_to_nearest_that_fails_leaves_the_block_as_it_was(data_type):
    floats = dict(
        format="compressed_tensors",
        data_type=data_type,
        bits=8 if data_type == "fp8" else 4,
        group_size=-1,
    )
    floats |= {"group_size": 16} if data_type == "nvfp4" else {}
    recipe = replace(RECIPE, iters=0, **(floats if data_type != "int" else {}))
    where = pipelines._Journey.nearest
    codes_of(tiny_llama(), recipe)  # tables that are made once are there from now on
    places = places_in(where, lambda: codes_of(tiny_llama(), recipe))
    for at in range(0, len(places), 5):
        model, finished = tiny_llama(), Finished()
        before = state_of(model)
        with (
            pytest.raises(UserError, match=r"model.layers.0: not enough memory"),
            Calls(where, OUT, at),
        ):
            codes_of(model, recipe, finished)
        if not finished.reports:
            assert_same(state_of(model), before)


def test_polish_that_fails_leaves_the_quantized_weights():
    recipe = replace(RECIPE, polish=True)
    unpolished = tiny_llama()
    codes_of(unpolished)
    before = state_of(unpolished)
    places = places_in(polish.polish, lambda: codes_of(tiny_llama(), recipe))
    for at in (2 * i * len(places) // 17 for i in range(1, 9)):
        model = tiny_llama()
        with pytest.raises(KeyboardInterrupt), Calls(polish.polish, KeyboardInterrupt(), at):
            codes_of(model, recipe)
        assert_same(state_of(model), before)
        assert all(
            parameter.grad is None and not parameter.requires_grad
            for parameter in model.parameters()
        )


@pytest.mark.parametrize("kind", ["awq", "smoothquant"])
def test_equalizing_that_fails_leaves_the_block(kind):
    recipe = replace(RECIPE, equalize=kind)
    run = equalize.equalize
    places = places_in(run, lambda: codes_of(tiny_llama(), recipe))
    for at in (2 * i * len(places) // 25 for i in range(1, 13)):
        model = tiny_llama()
        before = state_of(model)
        with pytest.raises(KeyboardInterrupt), Calls(run, KeyboardInterrupt(), at):
            codes_of(model, recipe)
        assert_same(state_of(model), before)


def test_a_block_that_equalizing_would_change_is_left_as_it_was(monkeypatch):
    model = tiny_llama()
    before = state_of(model)
    half = pairs.rescale

    def wrong(block, pair, scale_C):
        half(block, replace(pair, readers=()), scale_C)

    monkeypatch.setattr(equalize, "rescale", wrong)
    with pytest.raises(UserError, match="equalizing changes the block's output"):
        codes_of(model, replace(RECIPE, equalize="smoothquant"))
    assert_same(state_of(model), before)


def test_choosing_bits_that_fails_leaves_the_model():
    recipe = replace(RECIPE, target_bits=3.5, bit_options="2,4", format="auto_round")

    def choose(model):
        choose_bits(Session(model, recipe, make_plan(model, recipe), samples()))

    where = sensitivity.Trial.damage
    places = places_in(where, lambda: choose(tiny_llama()))
    for at in range(1, len(places), 7):
        model = tiny_llama()
        before = state_of(model)
        with pytest.raises(KeyboardInterrupt), Calls(where, KeyboardInterrupt(), at):
            choose(model)
        assert_same(state_of(model), before)
        assert all(
            parameter.grad is None and not parameter.requires_grad
            for parameter in model.parameters()
        )
