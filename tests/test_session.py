"""The one walk: what equalizing, planning and choosing bits push through blocks that hand keys and
values on."""

import pytest
from test_streaming import run
from tiny_models import FAMILIES, tiny_tokenizer

from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import estimate as planner
from auto_mmround.run import job as jobs

SHARING = ["gemma3n_text", "gemma4"]  # later blocks read what earlier ones leave for them


@pytest.fixture(scope="module", params=SHARING)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / request.param
    FAMILIES[request.param].save(folder, tiny_tokenizer())
    return FAMILIES[request.param], folder


@pytest.mark.parametrize(
    "changes", [{"equalize": "smoothquant"}, {"equalize": "awq"}, {"target_bits": 6.0}]
)
def test_what_comes_before_tuning_hands_on_what_blocks_share(family, changes, tmp_path):
    kind, folder = family
    run(folder, tmp_path, kind, **changes)


@pytest.mark.parametrize("stream", [False, True])
def test_an_estimate_hands_on_what_blocks_share(family, stream, tmp_path):
    _, folder = family
    recipe = Recipe(
        model=str(folder), output_dir=str(tmp_path), group_size=32, iters=2, nsamples=4, seqlen=24,
        device="cpu",
        stream=stream,
    )  # fmt: skip
    rows = [{"text": " ".join(f"w{(7 * i + j) % 110 + 3}" for j in range(40))} for i in range(8)]
    found = planner.estimate(
        jobs.prepare(recipe, jobs.load_model(recipe), dataset=rows), budget=0.5
    )
    assert found.seconds["text blocks"] > 0
