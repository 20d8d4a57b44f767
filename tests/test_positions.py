"""Learned positions: what a model has room for is told from its modules, and no sample goes beyond
it."""

import json

import pytest
import torch
import transformers
from building import build
from tiny_models import tiny_texts, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from auto_mmround.calibration.template import Template
from auto_mmround.cli import main
from auto_mmround.model.positions import position_limit

SMALL = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 96,
    "hidden_size": 32,
}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 96, "n_positions": 64}
HALVES = {f"{half}_{key}": value for half in ("encoder", "decoder")
          for key, value in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
LIMITS = {
    "GPT2LMHeadModel": (OLD, 64),
    "GPTBigCodeForCausalLM": (OLD, 64),
    "GPTJForCausalLM": (OLD | {"rotary_dim": 8}, 64),  # a table of sines that is no longer
    "OPTForCausalLM": (SMALL | {"max_position_embeddings": 64, "ffn_dim": 32,
        "word_embed_proj_dim": 32}, 64),
    "RobertaForCausalLM": (SMALL | {"max_position_embeddings": 66, "is_decoder": True}, 64),
    "BertLMHeadModel": (SMALL | {"max_position_embeddings": 64, "is_decoder": True}, 64),
    "WhisperForConditionalGeneration": (HALVES | {"d_model": 32, "vocab_size": 96,
        "max_target_positions": 64,
        "max_source_positions": 64, "pad_token_id": 0, "decoder_start_token_id": 1}, 64),
    "CTRLLMHeadModel": (OLD | {"dff": 32}, 64),
    "MptForCausalLM": ({"d_model": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 96,
        "max_seq_len": 64}, 64),
    "BloomForCausalLM": ({"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": 96}, None),
    "T5ForConditionalGeneration": ({"d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 32,
        "d_kv": 16,
        "vocab_size": 96, "n_positions": 64}, None),
    "LlamaForCausalLM": (SMALL | {"max_position_embeddings": 64}, None),
    "GPTNeoXForCausalLM": (SMALL | {"max_position_embeddings": 64}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", LIMITS)
def test_the_limit_is_the_length_from_which_the_model_fails(name):
    options, limit = LIMITS[name]
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**options)).eval()
    assert position_limit(model) == limit

    def fits(length):
        ids = torch.full((1, length), 5)
        kwargs = {"input_ids": ids}
        if model.config.is_encoder_decoder:
            features = (
                {"input_features": torch.zeros(1, 80, 128)}
                if "Whisper" in name
                else {"input_ids": ids[:, :2]}
            )
            kwargs = {**features, "decoder_input_ids": ids}
        try:
            with torch.no_grad():
                model(**kwargs)
        except (IndexError, RuntimeError, ValueError):
            return False
        return True

    assert fits(64) and fits(65) is (limit is None)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A GPT-2 of 64 positions, and texts of 300 tokens."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 128, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    texts = tiny_texts(8, 300)
    (folder / "long.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return folder


RUN = [
    "--nsamples",
    "8",
    "--group_size",
    "32",
    "--iters",
    "1",
    "--format",
    "auto_round",
    "--device",
    "cpu",
]


@pytest.mark.parametrize(
    "more", [[], ["--seqlen", "100"], ["--polish"], ["--target_bits", "5"], ["--stream"]]
)
def test_longer_texts_are_cut_and_that_is_said(gpt2, tmp_path, capsys, more):
    out = ["--output_dir", str(tmp_path)]
    assert (
        main(["--model", str(gpt2), "--dataset", str(gpt2 / "long.jsonl"), *RUN, *out, *more]) == 0
    )
    said = " ".join(capsys.readouterr().err.split())
    assert "becomes 64: the model has positions for no more tokens" in said
    # a warning, which `--quiet` and the API show too, where it is not as it was asked
    assert ("WARNING seqlen 100 becomes 64" in said) == ("--seqlen" in more)
    assert "calibration: 8 of 8 samples, 512 text tokens" in said


def test_eval_verify_and_plan_stay_within_the_positions(gpt2, tmp_path, capsys):
    data = ["--dataset", str(gpt2 / "long.jsonl")]
    assert main(["plan", "--model", str(gpt2), *data, *RUN, "--output_dir", str(tmp_path)]) == 0
    assert main(["--model", str(gpt2), *data, *RUN, "--output_dir", str(tmp_path)]) == 0
    (made,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert main(["verify", str(made), "--engine", "none"]) == 0
    assert main(["eval", "--model", str(made), "--reference", str(gpt2), *data]) == 0, (
        capsys.readouterr().err
    )


def test_conversations_and_ready_inputs_are_cut_too():
    tokenizer = tiny_tokenizer()
    words = " ".join(f"w{i % 90 + 3}" for i in range(100))
    chat = {
        "messages": [{"role": "user", "content": words}, {"role": "assistant", "content": "w5"}]
    }
    ready = {"input_ids": torch.arange(100)[None], "odd": torch.zeros(1)}
    inputs, report = build(
        [chat, ready],
        tokenizer=tokenizer,
        template=Template(),
        nsamples=2,
        truncation=False,
        positions=64,
    )
    assert [each.kwargs["input_ids"].shape[1] for each in inputs] == [64, 64]
    assert report.notes[-1] == "left out: text behind the model's last position (2)"


def test_a_table_as_long_as_the_vocabulary_is_one_too():
    sizes = SMALL | {
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "ffn_dim": 32,
        "word_embed_proj_dim": 32,
    }
    assert position_limit(OPTForCausalLM(OPTConfig(**sizes))) == 64
