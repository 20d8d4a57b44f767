"""Music is written in several codebooks: a row of ids for each, under one mask."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, tiny_tokenizer
from transformers import MusicgenDecoderConfig, MusicgenForCausalLM

from auto_mmround.calibration.inputs import padded, token_ids
from auto_mmround.calibration.ready import with_decoder_ids
from auto_mmround.checkpoint.loader import from_quantized
from auto_mmround.errors import UserError
from auto_mmround.evaluate.metrics import measure
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs
from auto_mmround.verify.proof import prove

pytestmark = pytest.mark.usefixtures("fast_disk")
TOKENS, BOOKS = 12, 4


def music() -> MusicgenForCausalLM:
    torch.manual_seed(0)
    config = MusicgenDecoderConfig(
        vocab_size=128, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
        num_codebooks=BOOKS, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
        is_decoder=True, initializer_factor=0.3,
    )  # fmt: skip
    return MusicgenForCausalLM(config).eval()


def sample(rows: int = BOOKS) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.randint(2, 128, (rows, TOKENS)),
        "attention_mask": torch.ones(1, TOKENS, dtype=torch.long),
    }


def prepared(folder: Path, rows: int = BOOKS, **more: object) -> jobs.Job:
    music().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    recipe = Recipe(
        model=str(folder / "model"), output_dir=str(folder / "out"), bits=4, group_size=32, iters=2,
        nsamples=4, seqlen=TOKENS, amp=False, device="cpu", **more,
    )  # fmt: skip
    given = [sample(rows) for _ in range(4)]
    return jobs.prepare(recipe, jobs.load_model(recipe), dataset=given)


def test_all_codebooks_are_read_tuned_and_measured(tmp_path):
    job = prepared(tmp_path)
    assert [one.kwargs["input_ids"].shape for one in job.inputs] == [(BOOKS, TOKENS)] * 4
    assert token_ids(job.inputs[0].kwargs).shape == (1, TOKENS, BOOKS)
    out = jobs.run(job, prove=prove)[0]
    found = measure([from_quantized(out).model], job.inputs, reference=music())[0]
    assert found.positions == {"text": 4 * BOOKS * TOKENS}
    # several words a position: no answer can be right or wrong
    answer_T = torch.arange(TOKENS) > 8
    told = [replace(sample, answer_T=answer_T) for sample in job.inputs]
    assert measure([music()], told)[0].answers == 0
    assert 0 < found.kl["text"] < 0.1


def test_codebooks_of_a_bucket_are_longer_by_masked_tokens(tmp_path):
    made = padded(prepared(tmp_path).inputs[0], 16)
    assert made.kwargs["input_ids"].shape == (BOOKS, 16)
    assert made.kwargs["attention_mask"].tolist() == [[1] * TOKENS + [0] * 4]


@pytest.mark.parametrize("rows", [2, 8])
def test_rows_that_are_no_codebooks_are_several_samples(rows, tmp_path):
    with pytest.raises(UserError, match=f"{rows} rows of input_ids, but 1 of the mask"):
        prepared(tmp_path, rows)


@pytest.mark.parametrize("shape", [(2, 6), (1, 6, 3)])
def test_labels_of_several_samples_are_no_decoder_ids(shape):
    config = music().config
    config.is_encoder_decoder = True
    with pytest.raises(UserError, match="give one sample at a time"):
        with_decoder_ids({"labels": torch.ones(shape, dtype=torch.long)}, config)


def test_labels_beside_the_ids_tell_the_answers(tmp_path):
    """Rows with a picture's features, say; -100 where nothing is to be said."""
    family = FAMILIES["qwen2_vl"]
    row = next(each for each in family.samples() if "pixel_values" in each)
    labels = row["input_ids"].clone()
    labels[:, :-3] = -100
    family.save(tmp_path / "model", tiny_tokenizer())
    recipe = Recipe(
        model=str(tmp_path / "model"), output_dir=str(tmp_path / "out"), nsamples=1, group_size=32,
        device="cpu", seqlen=labels.shape[1],
    )  # fmt: skip
    job = jobs.prepare(recipe, jobs.load_model(recipe), dataset=[row | {"labels": labels}])
    assert job.inputs[0].answer_T.tolist() == [False] * (labels.shape[1] - 3) + [True] * 3
    assert "labels" not in job.inputs[0].kwargs
