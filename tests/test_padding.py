"""Two hundred samples of 1 to 1,500 tokens: hardly any padding is computed, and memory stays as it
is."""

import random

import tiny_processors
from benches import bench
from tiny_models import FAMILIES

from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs


def test_no_padding_and_flat_memory(tmp_path):
    padding, draw = bench("padding"), random.Random(0)
    FAMILIES["qwen2_vl"].build().save_pretrained(tmp_path)
    tiny_processors.qwen2_vl().save_pretrained(tmp_path)
    rows = padding.rows(
        200, 1500, lambda count: " ".join(f"w{4 + draw.randrange(90)}" for _ in range(count))
    )
    recipe = Recipe(model=str(tmp_path), nsamples=200, seqlen=1500, device="cpu", amp=False,
        group_size=32,
                    quant_nontext_module=True)  # fmt: skip
    loaded = jobs.load_model(recipe)
    job = jobs.prepare(recipe, loaded, dataset=rows)
    assert len(job.inputs) == 200 and {"text", "image"} == set(job.calibration["tokens"])
    found = padding.measure(loaded.model, job.inputs, batch_size=8, steps=24)
    assert found.lengths[0] == 1 and found.lengths[1] >= 1500
    for row in found.waste:
        assert 0 <= row.share < 0.10, row
    text = found.waste[-1]
    # the samples are such that padding would cost
    assert text.samples == 200 and 1 - text.tokens / text.padded > 0.3
    assert found.growth < 0.05, found.memory_mb
