"""The evidence model's scripts, on a tiny text model."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLForConditionalGeneration,
)

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import evidence_scenes as scenes  # noqa: E402
import train_evidence_model as train  # noqa: E402
from demo_data import patchify  # noqa: E402
from demo_model import image_tokens  # noqa: E402
from evidence_chats import Chats  # noqa: E402
from evidence_model import SYSTEM, build, folded, join  # noqa: E402
from join_evidence_model import write_data  # noqa: E402

KEPT = ROOT / "bench" / "models" / "evidence.safetensors"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A tiny Qwen2 text model with the bundled model's tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    tokenizer = AutoProcessor.from_pretrained(train.DEMO).tokenizer
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False,
        bos_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def learned(text, run, stage, stop=None):
    train.learn(
        Namespace(
            text=text, stage=stage, run=run, seed=0, rate=1e-3, steps=2, stop=stop, strips=2,
            rounds=2, bare=0.5, kinds=[*scenes.QUESTIONS],
        )
    )  # fmt: skip
    return load_file(run / f"{stage}.safetensors")


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """A run whose stages learned two steps each, without a stop."""
    folder = tmp_path_factory.mktemp("run")
    for stage in ("table", "tower", "whole"):
        learned(text, folder, stage)
    return folder


@pytest.mark.parametrize("stage", ["table", "tower", "whole"])
def test_training_that_was_stopped_goes_on_to_the_same_bits(text, run, tmp_path, stage):
    for name in ("table", "tower"):  # what `whole` starts from
        if stage == "whole":
            (tmp_path / f"{name}.safetensors").write_bytes(
                (run / f"{name}.safetensors").read_bytes()
            )
    none, half = (learned(text, tmp_path, stage, stop=stop) for stop in (0, 1))
    whole, straight = learned(text, tmp_path, stage), load_file(run / f"{stage}.safetensors")
    assert [int(kept["step"]) for kept in (none, half, whole)] == [0, 1, 2]
    assert whole.keys() == straight.keys()
    assert all(torch.equal(whole[name], straight[name]) for name in straight)
    assert not all(torch.equal(whole[name], half[name]) for name in half if name != "step")


def test_joined_it_is_an_ordinary_folder_whose_text_is_untouched(text, run, tmp_path):
    train.export(Namespace(run=run), tmp_path / "kept.safetensors")
    model, processor = join(text, tmp_path / "kept.safetensors")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    loaded = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "model", dtype="auto")
    alone = Qwen2ForCausalLM.from_pretrained(text, dtype="auto")
    kept = loaded.model.language_model.state_dict()
    assert kept.keys() == alone.model.state_dict().keys()
    assert all(torch.equal(kept[name], x) for name, x in alone.model.state_dict().items())
    assert torch.equal(loaded.lm_head.weight, alone.lm_head.weight)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, alone(input_ids=ids).logits)
    tower = load_file(tmp_path / "kept.safetensors")
    assert all(
        torch.equal(loaded.model.visual.state_dict()[name], x.bfloat16())
        for name, x in tower.items()
    )


def test_training_reads_pictures_as_the_model_does(text, run, tmp_path):
    """Prompt, positions and picture tokens of the fast passes are those of processor and model."""
    train.export(Namespace(run=run), tmp_path / "kept.safetensors")
    model, processor = join(text, tmp_path / "kept.safetensors")
    strip, talk = scenes.conversation(np.random.default_rng(3), 1)
    (_, question, answer) = talk[0]
    turn = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": turn}], add_generation_prompt=True
    )
    picture = scenes.draw_strip(strip).convert("RGB")
    inputs = processor(text=[prompt + answer + "<|im_end|>"], images=[picture], return_tensors="pt")
    chats = Chats(model, processor.tokenizer)
    batch = chats.padded([(strip, talk)])
    with torch.no_grad():
        want = model(**inputs).logits[0].float()
        pixels = patchify([strip], processor, scenes.draw_strip)
        seen = image_tokens(model.model.visual.float(), pixels, 2)
        got = model.lm_head(chats.hidden(seen, batch))[0].float()
    assert len(want) == chats.before + len(got)
    torch.testing.assert_close(got, want[chats.before :], rtol=0.05, atol=0.02)


def test_table_and_naming_tower_are_one_tower(text, run):
    """What the folded tower says of a picture is what the naming one names, looked up."""
    kept, table = (
        load_file(run / "tower.safetensors"),
        load_file(run / "table.safetensors")["table"],
    )
    naming = train.feature_tower()
    naming.load_state_dict({name: kept[name] for name in naming.state_dict()})
    model, processor = build(text)
    saying = model.model.visual.float()
    saying.load_state_dict(folded(naming.state_dict(), table))
    pixels = patchify([scenes.random_strip(np.random.default_rng(1))], processor, scenes.draw_strip)
    with torch.no_grad():
        named, said = image_tokens(naming, pixels, 2), image_tokens(saying, pixels, 2)
    torch.testing.assert_close(said, named @ table, rtol=1e-4, atol=1e-5)


def test_features_tell_what_the_strip_shows():
    rng = np.random.default_rng(0)
    names = list(scenes.FEATURES)
    for _ in range(50):
        strip = scenes.random_strip(rng)
        said = [names[token[0]] for token in scenes.features(strip)]
        for thing in strip.things:
            start = scenes.WIDE * thing.cell
            assert said[start + 1 : start + 3] == [f"color {thing.color}", f"shape {thing.kind}"]
        printed = {
            kind: [name.split()[1] for name in said if name.startswith(f"{kind} ")]
            for kind in ("word", "digit")
        }
        assert printed["word"] == ([strip.word.text] if strip.word else [])
        assert "".join(printed["digit"]) == (strip.number.text if strip.number else "")


def test_data_is_drawn_from_streams_of_its_own(tmp_path):
    write_data(tmp_path, each=2)
    rows = json.loads((tmp_path / "heldout" / "vqa.json").read_text())
    assert [row["kind"] for row in rows] == [*scenes.QUESTIONS] * 2
    assert all((tmp_path / "heldout" / "images" / row["image"]).is_file() for row in rows)
    for row in rows:  # as in training: the system message, and no line end behind the picture
        system, question, _ = (turn["value"] for turn in row["conversations"])
        assert system == SYSTEM and question.startswith("<image>") and "\n" not in question
    for part in ("heldout", "calibration"):
        assert (tmp_path / part / "text.jsonl").is_file()


@pytest.mark.skipif(not KEPT.is_file(), reason="not trained yet")
def test_what_is_kept_is_a_small_tower_in_half_precision():
    tower = load_file(KEPT)
    naming = train.feature_tower().state_dict()
    assert tower.keys() == naming.keys() and {x.dtype for x in tower.values()} == {torch.float16}
    assert sum(x.numel() for x in tower.values()) <= 10e6 and KEPT.stat().st_size <= 4e6
    assert tower["merger.mlp.2.weight"].shape[0] == 896
    assert all(x.isfinite().all() for x in tower.values())
