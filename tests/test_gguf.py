"""GGUF: blocks, names of every architecture on tiny random models, our own reader; llama.cpp itself where installed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from auto_mmround.errors import UserError
from auto_mmround.evaluation.engines import run_llamacpp
from auto_mmround.evaluation.loader import from_quantized
from auto_mmround.evaluation.verify import same_weights
from auto_mmround.export import formats, gguf_models, gguf_tokens, gguf_towers
from auto_mmround.export.checkpoint import dequantized_state_dict, write_side_files
from auto_mmround.export.gguf_types import TYPES, exact_type, pack, unpack
from auto_mmround.export.layout import Layout, Whole
from auto_mmround.model.loading import DEMO, load
from auto_mmround.numerics.grids import Codes, Grid, dequantize, round_to_nearest
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.recipe.schemes import Scheme
from auto_mmround.run import job as jobs

gguf = pytest.importorskip("gguf")

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".engines" / "llamacpp" / "bin" / "python"
VOCABULARY = 320
TEXT = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": VOCABULARY, "max_position_embeddings": 512,
    "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
QWEN_VISION = {"depth": 4, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "initializer_range": 0.1}
PLACES = {"vision_start_token_id": 262, "vision_end_token_id": 263, "image_token_id": 264, "video_token_id": 265}
MROPE = {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [4, 6, 6]}
# Sections like the real [24, 20, 20]: for dimensions that no section reaches llama.cpp takes no position at all.
INTERLEAVED = {**MROPE, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
GEMMA = {**TEXT, "num_hidden_layers": 7, "sliding_window": 16, "query_pre_attn_scalar": 32,
         "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}  # fmt: skip
CONFIGS = {
    "llama": {**TEXT, "tie_word_embeddings": False},
    "llama, llama3 rope, biases": {**TEXT, "rope_parameters": LLAMA3, "attention_bias": True},
    "mistral": {**TEXT, "sliding_window": None},
    "qwen2": TEXT,
    "qwen3": TEXT,
    "gemma3_text": GEMMA,
    "qwen2_vl": {
        **PLACES,
        "text_config": {**TEXT, "rope_parameters": MROPE},
        "vision_config": {**QWEN_VISION, "embed_dim": 64, "hidden_size": 128, "mlp_ratio": 2},
    },
    "qwen2_5_vl": {
        **PLACES,
        "text_config": {**TEXT, "rope_parameters": MROPE},
        "vision_config": {**QWEN_VISION, "hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 128,
                          "fullatt_block_indexes": [1, 3]},
    },
    "qwen3_vl": {
        **PLACES,
        "text_config": {**TEXT, "num_hidden_layers": 4, "rope_parameters": INTERLEAVED},
        "vision_config": {**QWEN_VISION, "patch_size": 16, "hidden_size": 64, "intermediate_size": 96,
                          "out_hidden_size": 128, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2]},
    },
    "gemma3": {
        "text_config": GEMMA, "mm_tokens_per_image": 4, "boi_token_index": 269, "eoi_token_index": 270,
        "image_token_index": 271,
        "vision_config": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
                          "image_size": 56, "patch_size": 14, "vision_use_head": False},
    },
}  # fmt: skip


def byte_level_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer that splits like Qwen2's."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<pad>", *letters, "th", "the", "Ġthe"])}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    expression = next(key[0] for key, name in gguf_tokens.PRE_TOKENIZERS.items() if name == "qwen2")
    from tokenizers import Regex

    split = pre_tokenizers.Split(Regex(expression), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"])
    return tokenizer


def sentencepiece_like_tokenizer() -> Tokenizer:
    """BPE with byte fallback and ▁ for spaces, like Gemma's."""
    pieces = ["<s>", "</s>", "<pad>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), *"▁theca", "th", "the", "▁the"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>", "<unk>", "<start_of_image>", "<end_of_image>", "<image>"])
    return tokenizer


def tiny(case: str, folder: Path) -> Path:
    """A folder with a random model of that kind, its tokenizer and an image processor's configuration."""
    torch.manual_seed(0)
    model_type = case.partition(",")[0]
    config = CONFIG_MAPPING[model_type].from_dict(CONFIGS[case])
    classes = (transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM)
    model = classes["vision_config" not in CONFIGS[case]].from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases are all ones or zeros otherwise
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed" in name and "patch" not in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer = sentencepiece_like_tokenizer() if "gemma" in case else byte_level_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}"
    special = {
        "chat_template": template,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if case == "gemma3":
        extra = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image>"}
        special["extra_special_tokens"] = extra
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    if "vision_config" in CONFIGS[case]:
        means = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
        (folder / "preprocessor_config.json").write_text(json.dumps(means))
    return folder


def source_tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def export(source: Path, out: Path, quantize: bool, fmt: str = "gguf:q4_0") -> Path:
    """The model in GGUF: with its text blocks' weights rounded to 4 bits, or all as they are."""
    tensors = source_tensors(source)
    codes = {}
    if quantize:
        chosen = [key for key in tensors if "layers." in key and key.endswith("_proj.weight") and "vision" not in key]
        codes = {k.removesuffix(".weight"): round_to_nearest(tensors.pop(k), 32, Grid(4, True)) for k in chosen}
    out.mkdir()
    write_side_files(source, out)
    config = json.loads((source / "config.json").read_text())
    write = formats.FORMATS[fmt].write
    assert write is not None
    write(out, Whole(codes, tensors.items(), config, Layout({}, [], [], str, Scheme(4, 32)), source))
    return out


@pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize(("bits", "group"), [(None, 32), (3, 64), (2, 128)])
def test_blocks_hold_codes_exactly(kind, bits, group):
    bits = bits or kind.bits
    w_OI = torch.randn(6, 256, generator=torch.Generator().manual_seed(1)) * torch.logspace(-4, 1, 6)[:, None]
    codes = round_to_nearest(w_OI, group, Grid(bits, kind.sym, scale_bits=None if kind.sym else 11 - bits))
    assert kind.sym is False or codes.scale_OG.min() < 0 < codes.scale_OG.max()  # both signs are tried
    blocks = pack(codes, kind)
    decoded = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind.name])
    np.testing.assert_array_equal(decoded, dequantize(codes).numpy())
    assert torch.equal(dequantize(unpack(blocks, kind)), dequantize(codes))


def test_lowest_and_highest_codes_reach_their_ends():
    for kind in TYPES.values():
        q_OI = torch.tensor([[0, 2**kind.bits - 1] * 16], dtype=torch.uint8)
        zero = torch.full((1, 1), 2 ** (kind.bits - 1) if kind.sym else 3, dtype=torch.uint8)
        codes = Codes(q_OI, torch.ones(1, 1, dtype=torch.float16), zero, kind.bits, 32, kind.sym)
        decoded = gguf.quants.dequantize(pack(codes, kind).numpy(), gguf.GGMLQuantizationType[kind.name])
        assert set(decoded.ravel()) == {-float(zero), 2**kind.bits - 1 - float(zero)}


def test_pack_refuses_what_it_cannot_hold():
    w_OI = torch.randn(2, 64)
    with pytest.raises(ValueError, match="does not hold 5 bits"):
        pack(round_to_nearest(w_OI, 32, Grid(5, True)), TYPES["Q4_0"])
    with pytest.raises(ValueError, match="asym"):
        pack(round_to_nearest(w_OI, 32, Grid(4, False)), TYPES["Q4_0"])
    with pytest.raises(ValueError, match="blocks of 32"):
        pack(round_to_nearest(w_OI, 16, Grid(4, True)), TYPES["Q4_0"])
    with pytest.raises(ValueError, match="float32"):
        pack(round_to_nearest(w_OI, 32, Grid(4, True, torch.float32)), TYPES["Q4_0"])
    with pytest.raises(ValueError, match="tune for this format"):
        pack(round_to_nearest(w_OI, 32, Grid(4, False)), TYPES["Q4_1"])


def test_the_smallest_exact_type_is_chosen():
    found = {(bits, sym): exact_type(bits, sym) for bits in range(2, 9) for sym in (True, False)}
    names = {key: kind.name if kind else None for key, kind in found.items()}
    assert [names[bits, True] for bits in range(2, 9)] == ["Q4_0"] * 3 + ["Q5_0"] + ["Q8_0"] * 3
    assert [names[bits, False] for bits in range(2, 9)] == ["Q4_1"] * 3 + ["Q5_1"] + [None] * 3


def test_check_names_the_flags_that_help():
    named, plain = formats.FORMATS["gguf:q4_1"].check, formats.FORMATS["gguf"].check
    assert named(Scheme(4, 32, False), 64, 64) is None
    assert "--bits 4 --group_size 32 --asym" in named(Scheme(4, 128, True), 64, 128)
    assert plain(Scheme(4, 128, True), 64, 128) is None and plain(Scheme(3, -1, False), 64, 96) is None
    assert "no multiple" in plain(Scheme(4, 16, True), 64, 64)
    assert "no multiple" in plain(Scheme(4, -1, True), 64, 48)
    assert "asymmetric 8 bits" in plain(Scheme(8, 32, False), 64, 64)


def test_the_tuner_knows_how_precise_scales_may_be():
    assert formats.scale_bits(["auto_round", "gguf:q4_1"], Scheme(4, 32, False)) == 7
    assert formats.scale_bits(["auto_round"], Scheme(4, 32, False)) is None
    assert formats.scale_bits(["gguf"], Scheme(4, 32, True)) is None


@pytest.mark.parametrize("case", CONFIGS)
def test_every_tensor_has_one_place_and_comes_back(case, tmp_path):
    source = tiny(case, tmp_path / "source")
    wanted = source_tensors(source)
    out = export(source, tmp_path / "out", quantize=False)
    found = list(dequantized_state_dict(out))
    assert sorted(key for key, _ in found) == sorted(wanted)
    for key, tensor in found:
        assert torch.allclose(tensor, wanted[key], rtol=0, atol=1e-6 if "norm" in key else 0), key
    check = formats.FORMATS["gguf"].check_model
    assert check is not None
    check(json.loads((source / "config.json").read_text()), wanted, source)


@pytest.mark.parametrize("case", CONFIGS)
def test_names_are_those_of_the_gguf_package(case):
    model_type = case.partition(",")[0]
    config = CONFIG_MAPPING[model_type].from_dict(CONFIGS[case])
    text = config.get_text_config()
    arch = gguf.MODEL_ARCH[gguf_models.architecture(text).name.upper()]
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[arch]}
    used = {t for rule in gguf_models.text_part(model_type, text).rules.values() for t in rule.targets}
    optional = {"blk.{}.attn_q_norm", "blk.{}.attn_k_norm", "output"}  # not every architecture has them
    assert {name.replace("{}", "{bid}") for name in used - optional} <= known
    keys = {value.replace("{arch}", gguf.MODEL_ARCH_NAMES[arch]) for value in _strings(gguf.Keys)}
    assert set(gguf_models.text_metadata(config, text)) <= keys
    tower = gguf_towers.tower_part(model_type, config)
    if tower:
        every = {name.replace("{bid}", "{}") for name in gguf.TENSOR_NAMES.values()}
        stems = {_stem(t) for rule in tower.rules.values() for t in rule.targets}
        assert stems <= every
        facts = gguf_towers.tower_metadata(model_type, config, {})
        assert set(facts) <= keys and facts["clip.projector_type"] in _strings(gguf.VisionProjectorType)


def _strings(space) -> set[str]:
    values = [value for name, value in vars(space).items() if not name.startswith("__")]
    nested = [_strings(value) for value in values if isinstance(value, type)]
    return {value for value in values if isinstance(value, str)}.union(*nested)


def _stem(target: str) -> str:
    stem = target.removesuffix(".1").removesuffix(".weight").removesuffix(".bias")
    parts = ["{}" if part.isdigit() else part for part in stem.split(".")]
    return ".".join(parts)


def test_what_llamacpp_computes_otherwise_is_refused():
    def refused(model_type: str, match: str, **changes) -> None:
        config = CONFIG_MAPPING[model_type].from_dict({**CONFIGS[model_type], **changes})
        with pytest.raises(UserError, match=match):
            gguf_models.architecture(config)

    refused("llama", "computes silu, not gelu", hidden_act="gelu")
    refused("qwen2", "rope type yarn", rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
                                                        "original_max_position_embeddings": 128})  # fmt: skip
    refused("gemma3_text", "head size", query_pre_attn_scalar=100)
    refused("gemma3_text", "sliding windows", layer_types=["full_attention"] * 7)
    with pytest.raises(UserError, match="no table for gpt2"):
        gguf_models.architecture(transformers.GPT2Config())


def test_unknown_tensors_and_tokenizers_are_refused_before_any_work(tmp_path):
    source = tiny("qwen2", tmp_path / "source")
    check = formats.FORMATS["gguf"].check_model
    assert check is not None
    config = json.loads((source / "config.json").read_text())
    with pytest.raises(UserError, match=r"no place for the tensor layers\.0\.adapter\.weight"):
        check(config, ["model.layers.0.adapter.weight"], source)
    with pytest.raises(UserError, match="no part of the model"):
        check(config, ["mtp.fc.weight"], source)
    tokenizer = byte_level_tokenizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(source / "tokenizer.json"))
    with pytest.raises(UserError, match="type Whitespace"):
        check(config, [], source)
    (source / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        check(config, [], source)


def test_merges_become_scores_only_in_sentencepiece_order():
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁th", "e")]
    tokens = ["▁the", "the", "th", "t"]
    assert gguf_tokens._scores(tokens, merges) == [-2.0, -1.0, 0.0, -3.0]
    with pytest.raises(UserError, match="no SentencePiece order"):
        gguf_tokens._scores(tokens, [*merges, ("t", "h")])


def test_the_vocabulary_has_a_token_for_every_row(tmp_path):
    tiny("gemma3_text", tmp_path)
    facts = gguf_tokens.metadata(tmp_path, VOCABULARY)
    kinds = facts["tokenizer.ggml.token_type"]
    assert len(facts["tokenizer.ggml.tokens"]) == len(kinds) == len(facts["tokenizer.ggml.scores"]) == VOCABULARY
    assert kinds[0] == gguf.TokenType.CONTROL and kinds[3] == gguf.TokenType.UNKNOWN
    assert kinds[4] == gguf.TokenType.BYTE and kinds[-1] == gguf.TokenType.UNUSED
    assert len(set(facts["tokenizer.ggml.tokens"])) == VOCABULARY
    assert len(gguf_tokens.metadata(tmp_path, 100)["tokenizer.ggml.tokens"]) == 100


@pytest.mark.parametrize(("fmt", "bits", "sym"), [("gguf:q4_0", 4, True), ("gguf:q4_1", 4, False), ("gguf", 3, True)])
def test_journey_of_the_demo_model(tmp_path, fmt, bits, sym):
    """Exported = tuned, to the bit: the closed form moves the scales, and the file holds what it found."""
    recipe = Recipe(model="demo", dataset="demo", bits=bits, group_size=32, sym=sym, format=fmt, nsamples=4, iters=1,
                    output_dir=str(tmp_path), device="cpu", batch_size=4, fisher=False)  # fmt: skip
    loaded = load("demo")
    folder = jobs.run(jobs.prepare(recipe, loaded))[0]
    tuned = {
        name: loaded.model.get_parameter(f"{name}.weight") for name in jobs.make_plan(loaded.model, recipe).quantized
    }
    assert tuned and same_weights(folder, {f"{name}.weight": w for name, w in tuned.items()}) == []
    config = json.loads((folder / "config.json").read_text())
    assert sorted(config["quantization_config"]["files"]) == sorted(p.name for p in folder.glob("*.gguf"))
    kept = from_quantized(folder).model.state_dict()
    for name, tensor in load("demo").model.state_dict().items():
        if name.removesuffix(".weight") not in tuned:
            assert torch.equal(kept[name], tensor), name


def test_a_wrong_scheme_is_one_line_with_the_flags(tmp_path):
    recipe = Recipe(model="demo", iters=0, format="gguf:q4_0", output_dir=str(tmp_path), device="cpu")
    with pytest.raises(UserError, match=r"--bits 4 --group_size 32$"):
        jobs.prepare(recipe, load("demo"))


def test_damaged_folders_are_named(tmp_path):
    out = export(tiny("qwen2_vl", tmp_path / "source"), tmp_path / "out", quantize=True)
    (out / "mmproj-model.gguf").unlink()
    with pytest.raises(UserError, match="lacks mmproj-model"):
        list(dequantized_state_dict(out))


def worst(result, prompts, model) -> tuple[float, float]:
    """(largest difference of log probabilities, their spread) of llama.cpp and Transformers."""
    gap = spread = 0.0
    for ids, found in zip(prompts, result.logprobs, strict=True):
        with torch.inference_mode():
            wanted_V = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        at = torch.tensor(list(found))
        gap = max(gap, float((wanted_V[at] - torch.tensor(list(found.values()))).abs().max()))
        spread = max(spread, float(wanted_V.std()))
    return gap, spread


needs_engine = pytest.mark.skipif(not PYTHON.is_file(), reason="scripts/engines.sh llamacpp")


@pytest.mark.slow
@needs_engine
@pytest.mark.parametrize("case", CONFIGS)
def test_llamacpp_agrees_on_every_architecture(case, tmp_path):
    """Names, permutations, rope and norms by a float32 file; the blocks by the quantized one. llama.cpp rounds the
    inputs of quantized layers to 8 bits, hence the wider bound there."""
    source = tiny(case, tmp_path / "source")
    ids = torch.randint(10, 250, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [ids[:n] for n in (1, 3, 17, 40)]
    for quantize, bound in ((False, 0.01), (True, 0.2)):
        out = export(source, tmp_path / f"out{quantize}", quantize)
        result = run_llamacpp(out, prompts=prompts, python=PYTHON, top=VOCABULARY)
        assert result.ok, result.error
        model = from_quantized(out, dtype="float32").model
        gap, spread = worst(result, prompts, model)
        assert all(len(found) == VOCABULARY for found in result.logprobs)
        assert gap < bound * spread, (quantize, gap, spread)


IMAGE_TOKENS = {"qwen2_vl": (168, 36), "qwen2_5_vl": (168, 36), "qwen3_vl": (192, 36), "gemma3": (56, 4)}


@pytest.mark.slow
@needs_engine
@pytest.mark.parametrize("case", IMAGE_TOKENS)
def test_llamacpp_agrees_on_every_tower(case, tmp_path):
    """A random image of a size that neither side changes, between the words that llama.cpp puts around it."""
    side, count = IMAGE_TOKENS[case]
    source = tiny(case, tmp_path / "source")
    out = export(source, tmp_path / "out", quantize=False)
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    image = tmp_path / "image.png"
    Image.fromarray(pixels).save(image)
    question = {"text": "the cat", "image": image, "max_tokens": 1}
    result = run_llamacpp(out, questions=[question], python=PYTHON, top=VOCABULARY)
    assert result.ok, result.error
    loaded = from_quantized(out, dtype="float32")
    around = ("<start_of_image>", "<end_of_image>") if case == "gemma3" else ("<|vision_start|>", "<|vision_end|>")
    if case == "gemma3":
        around = (f"\n\n{around[0]}", f"{around[1]}\n\n")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    before, after = (tokenizer.encode(text).ids for text in (around[0], f"{around[1]}the cat"))
    ids = torch.tensor([[*before, *[loaded.model.config.image_token_id] * count, *after]])
    means = json.loads((source / "preprocessor_config.json").read_text())
    if case == "gemma3":
        x = (pixels / 255 - np.array(means["image_mean"])) / np.array(means["image_std"])
        kwargs = {"pixel_values": torch.tensor(x).permute(2, 0, 1)[None].float()}
    else:
        processor = transformers.Qwen2VLImageProcessor(
            **means, do_resize=False, patch_size=loaded.model.config.vision_config.patch_size
        )
        kwargs = dict(processor(Image.fromarray(pixels), return_tensors="pt"))
    kwargs["mm_token_type_ids" if case != "gemma3" else "token_type_ids"] = (
        ids == loaded.model.config.image_token_id
    ).int()
    with torch.inference_mode():
        wanted_V = loaded.model(input_ids=ids, **kwargs).logits[0, -1].log_softmax(-1)
    answer = result.answers[0]
    found = {int(key): value for key, value in answer["logprobs"].items()}
    gap = max(abs(float(wanted_V[key]) - value) for key, value in found.items())
    assert answer["prompt_tokens"] == ids.shape[1]
    assert len(found) == VOCABULARY and gap < 0.02 * float(wanted_V.std()), gap


@pytest.mark.slow
@needs_engine
@pytest.mark.parametrize("case", ["qwen2", "gemma3_text"])
def test_llamacpp_tokenizes_as_the_tokenizer_does(case, tmp_path):
    source = tiny(case, tmp_path / "source")
    out = export(source, tmp_path / "out", quantize=False)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    texts = ["the theft of the cat", "  two  spaces\n\nand lines", "naïve — 12345 it's", "the</s>the"]
    ids = [tokenizer.encode(text).ids for text in texts]
    by_text = run_llamacpp(out, prompts=texts, python=PYTHON, top=VOCABULARY)
    by_ids = run_llamacpp(out, prompts=ids, python=PYTHON, top=VOCABULARY)
    assert by_text.ok and by_text.logprobs == by_ids.logprobs


@pytest.mark.slow
@needs_engine
def test_llamacpp_answers_about_images(tmp_path):
    """The demo model with its tower: the same prompt length, distribution and answer as Transformers."""
    recipe = Recipe(
        model="demo", bits=4, group_size=32, iters=0, format="gguf:q4_0", output_dir=str(tmp_path), device="cpu"
    )
    folder = jobs.run(jobs.prepare(recipe, load("demo")))[0]
    loaded = from_quantized(folder, dtype="float32")
    rows = json.loads((DEMO.parent / "heldout" / "vqa.json").read_text())[:4]
    questions = [
        {
            "text": row["conversations"][0]["value"].replace("<image>\n", ""),
            "image": DEMO.parent / "heldout" / "images" / row["image"],
        }
        for row in rows
    ]
    result = run_llamacpp(folder, questions=questions, python=PYTHON, top=2048)
    assert result.ok, result.error
    for question, answer in zip(questions, result.answers, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": question["text"]}]
        messages = [{"role": "user", "content": content}]
        prompt = loaded.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = loaded.processor(text=[prompt], images=[Image.open(question["image"])], return_tensors="pt")
        with torch.inference_mode():
            wanted_V = loaded.model(**inputs).logits[0, -1].log_softmax(-1)
        ids = loaded.model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs.input_ids.shape[1] :]
        found = {int(key): value for key, value in answer["logprobs"].items()}
        gap = max(abs(float(wanted_V[key]) - value) for key, value in found.items())
        assert answer["prompt_tokens"] == inputs.input_ids.shape[1]
        assert len(found) == len(wanted_V) and gap < 0.1 * float(wanted_V.std())
        assert answer["text"] == loaded.tokenizer.decode(ids, skip_special_tokens=True)


def test_a_missing_engine_is_an_answer(tmp_path):
    assert "model-*.gguf" in str(run_llamacpp(tmp_path, python=PYTHON).error)
    (tmp_path / "model-Q4_0.gguf").touch()
    result = run_llamacpp(tmp_path, python=tmp_path / "llamacpp" / "bin" / "python")
    assert result.error == "the engine llamacpp is not installed: scripts/engines.sh llamacpp"
