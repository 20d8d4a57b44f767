import dataclasses

import pytest

from auto_mmround.errors import UserError
from auto_mmround.recipe.algorithms import ALGORITHMS, PRESETS
from auto_mmround.recipe.files import read, to_toml
from auto_mmround.recipe.patterns import matches
from auto_mmround.recipe.recipe import Recipe, from_mapping
from auto_mmround.recipe.schemes import Scheme, overridden


def test_toml_round_trip(tmp_path):
    recipe = Recipe(
        model='a b"c',
        bits=3,
        lr=1e-05,
        dataset="x.json:num=3,ü",
        layer_config={"model.layers.0": {"bits": 8}},
    )
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(recipe))
    assert from_mapping(read(path)) == recipe


def test_yaml_and_sections(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("scheme:\n  bits: 2\n  group_size: 64\ndataset: demo\n")
    assert from_mapping(read(path)) == Recipe(bits=2, group_size=64, dataset="demo")


@pytest.mark.parametrize(
    "values, word",
    [
        ({"bit": 4}, "did you mean bits?"),
        ({"bits": 9}, "2 to 8"),
        ({"seed": 2**63}, "seed"),
        ({"bits": "4"}, "expected int"),
        ({"sym": 1}, "expected bool"),
        ({"bits": True}, "expected int"),
        ({"algorithm": "magic"}, "sign_round"),
        ({"adam": True}, "refused"),
        ({"group_size": 0}, "group_size"),
        ({"scale_dtype": "int8"}, "scale_dtype"),
        ({"act_bits": 4}, "act_bits"),
        ({"iters": -1}, "iters"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_wrong_values_are_one_line(values, word):
    with pytest.raises(UserError) as caught:
        from_mapping(values)
    assert word in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, text", [("r.toml", "bits = "), ("r.yaml", "a: [1"), ("r.txt", ""), ("r.yaml", "5")]
)
def test_unreadable_files(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError):
        read(tmp_path / name)
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path / "missing.toml")


def test_frozen_and_ints_for_floats():
    recipe = Recipe(lr=1)
    assert recipe.lr == 1.0 and isinstance(recipe.lr, float)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.bits = 2


def test_pattern_matches_whole_parts():
    name = "model.layers.10.self_attn.q_proj"
    assert matches("q_proj", name) and matches("layers.10", name) and matches("re:.*attn", name)
    assert not matches("layers.1", name) and not matches("proj", name)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_choose_steps_rate_and_samples_of_auto(preset):
    recipe = Recipe(preset=preset)
    found = recipe.steps, recipe.learning_rate, recipe.batch, recipe.gradients
    assert found == ALGORITHMS["auto"].presets[preset]
    assert dataclasses.replace(Recipe(), preset=preset) == recipe  # flags are laid over a file
    own = Recipe(preset=preset, iters=5, lr=0.5, batch_size=3)
    assert (own.steps, own.learning_rate, own.batch) == (5, 0.5, 3)
    published = Recipe(preset=preset, algorithm="sign_round")
    assert (published.steps, published.learning_rate, published.batch) == (200, None, 8)


def test_an_unknown_preset_is_refused():
    with pytest.raises(UserError, match="preset = 'bets': one of light, default, best"):
        Recipe(preset="bets")


def test_a_layer_with_a_data_type_of_its_own_is_refused():
    for kept in ({"bits": 16, "data_type": "float"}, {"bits": 32, "data_type": "fp"}):
        assert overridden(Scheme(), kept, "q_proj") is None
    assert overridden(Scheme(), {"bits": 8, "data_type": "int"}, "q_proj") == Scheme(8)
    for given in ({"data_type": "fp8"}, {"bits": 8, "data_type": "float"}):
        with pytest.raises(UserError, match="all layers have that of the scheme, int"):
            overridden(Scheme(), given, "q_proj")


@pytest.mark.parametrize(
    "values, told",
    [
        ({"scheme": "NVFP4", "quant_lm_head": True}, "quant_lm_head with nvfp4 .*use NVFP4A16"),
        ({"scheme": "NVFP4", "iters": 0}, "nvfp4 with 4-bit inputs, rounded .*use NVFP4A16"),
        ({"scheme": "FP8_STATIC", "quant_lm_head": True}, "quant_lm_head with act_dynamic = false"),
        ({"scheme": "FP8_STATIC", "iters": 0}, "act_dynamic = false, rounded .*use FP8"),
    ],
)
def test_what_cannot_be_streamed_is_named_with_what_can(values, told):
    values = values | {"format": "compressed_tensors"}
    with pytest.raises(UserError, match=told) as refused:
        from_mapping(values | {"stream": True})
    if values["scheme"] == "NVFP4":
        assert "act_dynamic" not in str(refused.value)
    instead = {"scheme": str(refused.value).rpartition(" ")[2]}
    from_mapping(values | instead | {"stream": True})


def test_every_preset_has_a_step_of_one_sample_at_least():
    """`plan` reckons all of them, also beside `--batch_size 1`; `light` takes half."""
    for given, light in (({}, 4), ({"batch_size": 2}, 1), ({"batch_size": 1}, 1)):
        assert Recipe(**given).with_preset("light").step_samples == light
