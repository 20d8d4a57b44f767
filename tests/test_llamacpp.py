"""GGUF files in llama.cpp itself: every architecture, every tower, tokenizers, the demo model (all
need the engine)."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny_gguf import CONFIGS, VOCABULARY, export, tiny
from tokenizers import Tokenizer

from auto_mmround.checkpoint.loader import from_quantized
from auto_mmround.model.loading import DEMO, load
from auto_mmround.numerics.grids import Codes
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs
from auto_mmround.verify.engines import run_llamacpp
from auto_mmround.verify.llamacpp import pieces
from auto_mmround.verify.verify import verify

pytest.importorskip("gguf")

PYTHON = Path(__file__).parents[1] / ".engines" / "llamacpp" / "bin" / "python"


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
    """Names, permutations, rope and norms by a float32 file; the blocks by the quantized one.
    llama.cpp rounds the inputs of quantized layers to 8 bits, hence the wider bound there."""
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


IMG = "<IMG>"  # stands for the placeholder of one image embedding
ROWS_OF = {
    4: f"{IMG * 4}[IMG_BREAK]" * 3 + IMG * 4 + "[IMG_END]",
    3: f"{IMG * 3}[IMG_BREAK]" * 2 + IMG * 3 + "[IMG_END]",
}
QWEN = f"<|vision_start|>{IMG * 36}<|vision_end|>"
FAKE = "<fake_token_around_image>"
TILES = (
    f"{FAKE}<row_1_col_1>{IMG * 4}{FAKE}<row_1_col_2>{IMG * 4}\n\n{FAKE}<global-img>{IMG * 4}{FAKE}"
)
# (width, height) of an image that neither side resizes, and what llama.cpp makes of it.
SEEN = {
    "qwen2_vl": (168, 168, QWEN),
    "qwen2_5_vl": (168, 168, QWEN),
    "qwen3_vl": (192, 192, QWEN),
    "gemma3": (56, 56, f"<start_of_image>{IMG * 4}<end_of_image>"),
    "llava": (56, 56, IMG * 16),
    "llava, Pixtral": (56, 56, ROWS_OF[4]),
    "mistral3": (84, 84, ROWS_OF[3]),
    # SmolVLM is the same but for its processor, which needs another package
    "idefics3": (112, 56, TILES),
}


def seen(case: str, image: Image.Image, config, facts: dict) -> dict[str, torch.Tensor]:
    """What the family's processor would make of the image: model inputs beside the ids."""
    if "qwen" in case:
        patch = config.vision_config.patch_size
        processor = transformers.Qwen2VLImageProcessor(**facts, do_resize=False, patch_size=patch)
        return dict(processor(image, return_tensors="pt"))

    def scaled(part: Image.Image) -> torch.Tensor:
        x = (np.asarray(part) / 255 - np.array(facts["image_mean"])) / np.array(facts["image_std"])
        return torch.tensor(x).permute(2, 0, 1).float()

    if case == "idefics3":  # two tiles and the whole, small
        whole = image.resize((56, 56), Image.Resampling.LANCZOS)
        parts = [image.crop((0, 0, 56, 56)), image.crop((56, 0, 112, 56)), whole]
        return {"pixel_values": torch.stack([scaled(part) for part in parts])[None]}
    sizes = {} if case in ("gemma3", "llava") else {"image_sizes": torch.tensor([image.size[::-1]])}
    return {"pixel_values": scaled(image)[None], **sizes}


def put_class_last(model) -> None:
    """What llama.cpp computes with CLIP (its issue 25814): the class token behind the patches,
    positions as before."""
    embeddings = model.model.vision_tower.embeddings

    def forward(pixel_values, **_):
        patches_1PC = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        classes_11C = embeddings.class_embedding[None, None]
        return torch.cat([patches_1PC, classes_11C], 1) + embeddings.position_embedding.weight

    embeddings.forward = forward


@pytest.mark.slow
@needs_engine
@pytest.mark.parametrize("case", SEEN)
def test_llamacpp_agrees_on_every_tower(case, tmp_path):
    """An image of a size that neither side changes, between the words that llama.cpp puts around
    it."""
    width, height, text = SEEN[case]
    source = tiny(case, tmp_path / "source")
    out = export(source, tmp_path / "out", quantize=False)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    if text is TILES:  # one that survives being made smaller by two programs
        picture = picture.resize((5, 4)).resize((width, height), Image.Resampling.BICUBIC)
    picture.save(tmp_path / "image.png")
    question = {"content": [{"image": str(tmp_path / "image.png")}, "the cat"], "max_tokens": 1}
    result = run_llamacpp(out, questions=[question], python=PYTHON, top=VOCABULARY)
    assert result.ok, result.error
    loaded = from_quantized(out, dtype="float32")
    config = loaded.model.config
    place = getattr(config, "image_token_id", None) or config.image_token_index
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    pieces = [tokenizer.encode(piece).ids for piece in f"{text}the cat".split(IMG)]
    ids = torch.tensor([[*pieces[0], *(i for piece in pieces[1:] for i in (place, *piece))]])
    kwargs = seen(
        case, picture, config, json.loads((source / "preprocessor_config.json").read_text())
    )
    if "qwen" in case or case == "gemma3":
        kwargs["mm_token_type_ids" if case != "gemma3" else "token_type_ids"] = (ids == place).int()
    if case == "llava":
        put_class_last(loaded.model)
    with torch.inference_mode():
        wanted_V = loaded.model(input_ids=ids, **kwargs).logits[0, -1].log_softmax(-1)
    answer = result.answers[0]
    found = {int(key): value for key, value in answer["logprobs"].items()}
    gap = max(abs(float(wanted_V[key]) - value) for key, value in found.items())
    assert answer["prompt_tokens"] == ids.shape[1]
    assert len(found) == VOCABULARY and gap < 0.02 * float(wanted_V.std()), gap


@pytest.mark.slow
@needs_engine
@pytest.mark.parametrize(
    ("fmt", "bits", "group", "sym"),
    [
        ("gguf:q4_1", 4, 32, False), ("gguf:q5_0", 5, 32, True), ("gguf:q5_1", 5, 32, False),
        ("gguf:q8_0", 8, 32, True), ("gguf", 3, 128, True), ("gguf:q2_k", 2, 16, False),
        ("gguf:q3_k", 3, 16, True),
        ("gguf:q4_k", 4, 32, False), ("gguf:q5_k", 5, 32, False), ("gguf:q6_k", 6, 16, True),
    ],
)  # fmt: skip
def test_llamacpp_computes_with_every_block_type(fmt, bits, group, sym, tmp_path):
    recipe = Recipe(model="demo", bits=bits, group_size=group, sym=sym, iters=0, format=fmt,
        device="cpu",
                    output_dir=str(tmp_path))  # fmt: skip
    folder = jobs.run(jobs.prepare(recipe, load("demo")))[0]
    loaded = from_quantized(folder, dtype="float32")
    ids = loaded.tokenizer("In the beginning God created the heaven and the earth.").input_ids
    prompts = [ids[:n] for n in (2, 7, len(ids))]
    result = run_llamacpp(folder, prompts=prompts, python=PYTHON, top=2048)
    assert result.ok, result.error
    gap, spread = worst(result, prompts, loaded.model)
    assert gap < 0.1 * spread


@pytest.mark.slow
@needs_engine
@pytest.mark.parametrize("case", ["qwen2", "gemma3_text"])
def test_llamacpp_tokenizes_as_the_tokenizer_does(case, tmp_path):
    source = tiny(case, tmp_path / "source")
    out = export(source, tmp_path / "out", quantize=False)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    texts = [
        "the theft of the cat",
        "  two  spaces\n\nand lines",
        "naïve — 12345 it's",
        "the</s>the",
    ]
    ids = [tokenizer.encode(text).ids for text in texts]
    by_text = run_llamacpp(out, prompts=texts, python=PYTHON, top=VOCABULARY)
    by_ids = run_llamacpp(out, prompts=ids, python=PYTHON, top=VOCABULARY)
    assert by_text.ok and by_text.logprobs == by_ids.logprobs


@pytest.mark.slow
@needs_engine
def test_llamacpp_takes_the_code_minus_128_and_negative_scales(tmp_path):
    """Its own quantizer writes neither in Q8_0; here every weight is the lowest or the highest
    code."""

    def extremes(w_OI: torch.Tensor) -> Codes:
        sign_OG = torch.where(w_OI[:, ::32] > 0, 1.0, -1.0)
        scale_OG = (sign_OG * w_OI.std() / 128).half()
        zero_OG = torch.full(scale_OG.shape, 128, dtype=torch.uint8)
        return Codes((w_OI > 0).to(torch.uint8) * 255, scale_OG, zero_OG, 8, 32, True)

    out = export(tiny("qwen2", tmp_path / "source"), tmp_path / "out", True, "gguf:q8_0", extremes)
    prompts = [[20, 30, 40], list(range(50, 80))]
    result = run_llamacpp(out, prompts=prompts, python=PYTHON, top=VOCABULARY)
    assert result.ok, result.error
    gap, spread = worst(result, prompts, from_quantized(out, dtype="float32").model)
    assert gap < 0.1 * spread


@pytest.mark.slow
@needs_engine
@pytest.mark.parametrize("quantized_tower", [False, True])
def test_llamacpp_answers_about_images(quantized_tower, tmp_path):
    """The demo model with its tower: the same prompt length, distribution and answer as
    Transformers."""
    recipe = Recipe(model="demo", bits=4, group_size=32, iters=0, format="gguf:q4_0",
        output_dir=str(tmp_path),
                    device="cpu", quant_nontext_module=quantized_tower)  # fmt: skip
    folder = jobs.run(jobs.prepare(recipe, load("demo")))[0]
    loaded = from_quantized(folder, dtype="float32")
    rows = json.loads((DEMO.parent / "heldout" / "vqa.json").read_text())[:4]
    images = [DEMO.parent / "heldout" / "images" / row["image"] for row in rows]
    texts = [row["conversations"][0]["value"].replace("<image>\n", "") for row in rows]
    questions = [
        {"content": [{"image": str(image)}, text]}
        for image, text in zip(images, texts, strict=True)
    ]
    result = run_llamacpp(folder, questions=questions, python=PYTHON, top=2048)
    assert result.ok, result.error
    assert result.classes["q4_0"] == 35
    for image, text, answer in zip(images, texts, result.answers, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        prompt = loaded.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        inputs = loaded.processor(text=[prompt], images=[Image.open(image)], return_tensors="pt")
        with torch.inference_mode():
            wanted_V = loaded.model(**inputs).logits[0, -1].log_softmax(-1)
        ids = loaded.model.generate(**inputs, max_new_tokens=16, do_sample=False)[
            0, inputs.input_ids.shape[1] :
        ]
        found = {int(key): value for key, value in answer["logprobs"].items()}
        gap = max(abs(float(wanted_V[key]) - value) for key, value in found.items())
        assert answer["prompt_tokens"] == inputs.input_ids.shape[1]
        assert len(found) == len(wanted_V) and gap < 0.1 * float(wanted_V.std())
        assert answer["text"] == loaded.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.slow
@needs_engine
def test_verify_asks_llamacpp_about_text_and_image(tmp_path):
    recipe = Recipe(model="demo", bits=4, group_size=32, iters=0, format="gguf:q4_0",
        output_dir=str(tmp_path),
                    device="cpu")  # fmt: skip
    folder = jobs.run(jobs.prepare(recipe, load("demo")))[0]
    (verdict,) = verify(folder, ["llamacpp"], root=PYTHON.parents[3]).verdicts
    assert verdict.status == "right", verdict.line()


def test_prompts_lose_what_llamacpp_adds_by_itself(demo):
    text = "<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"
    text += "What?<|im_end|>\n"
    ids = demo.tokenizer(text).input_ids
    wanted = ["<|im_start|>user\n", {"image": "a.png"}, "What?<|im_end|>\n"]
    assert pieces(ids, demo.tokenizer, demo.model.config, [Path("a.png")]) == wanted
    with pytest.raises(ValueError, match="2 images, but places for 1"):
        pieces(ids, demo.tokenizer, demo.model.config, [Path("a.png"), Path("b.png")])


def test_a_missing_engine_is_an_answer(tmp_path):
    assert "model-*.gguf" in str(run_llamacpp(tmp_path, python=Path(sys.executable)).error)
    (tmp_path / "model-Q4_0.gguf").touch()
    result = run_llamacpp(tmp_path, python=tmp_path / "llamacpp" / "bin" / "python")
    assert result.error == "the engine llamacpp is not installed: bash scripts/engines.sh llamacpp"
