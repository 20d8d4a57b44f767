"""Chat templates in the forms that this year's families publish: what the model is asked, and where
its answers lie. The templates are written here, in their form; the files themselves are not."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_speech import checkpoint, configured
from tiny_processors import CHAT, eyes, words
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3VLProcessor, Qwen3VLVideoProcessor

from auto_mmround.calibration.inputs import answer_mask
from auto_mmround.calibration.processor import render
from auto_mmround.calibration.template import Template, parse_messages
from auto_mmround.modalities import IMAGE, VIDEO
from auto_mmround.model.passes import run_model
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs

LOOP = "{% for turn in messages %}"
ONE_TURN = "{{ turn['content'] if turn['content'] is string else turn['content'][0]['text'] }}"
# Marks of a turn, as the families write them -> its template.
FORMS = {
    "ChatML: Qwen3.5, Qwen3-Next, InternVL3.5, MiniCPM-V": LOOP
    + "<|im_start|>{{ turn['role'] }}\n"
    + ONE_TURN
    + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "thoughts are left out before the last answer: Qwen3, GLM-4.5V": LOOP
    + "<|im_start|>{{ turn['role'] }}\n{% if turn['role'] == 'assistant' and loop.last %}<think>"
    "\n\n</think>\n\n{% endif %}" + ONE_TURN + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}",
    "no mark behind the turn: GLM-4.5V": "[gMASK]<sop>"
    + LOOP
    + "<|{{ turn['role'] }}|>\n"
    + ONE_TURN
    + "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "other names of roles: Gemma 3n, Gemma 4": "<bos>"
    + LOOP
    + "<start_of_turn>{{ 'model' if turn['role'] == 'assistant' else turn['role'] }}\n"
    + ONE_TURN
    + "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "only the asking is marked: Ministral 3": "<s>"
    + LOOP
    + "{% if turn['role'] == 'user' %}[INST]"
    + ONE_TURN
    + "[/INST]{% elif turn['role'] == 'system' %}[SYSTEM_PROMPT]"
    + ONE_TURN
    + "[/SYSTEM_PROMPT]{% else %}"
    + ONE_TURN
    + "</s>{% endif %}{% endfor %}",
    "channels, and another end of the last answer: gpt-oss": LOOP
    + "<|start|>{{ turn['role'] }}{% if turn['role'] == 'assistant' %}<|channel|>final{% endif %}"
    "<|message|>"
    + ONE_TURN
    + "{% if turn['role'] == 'assistant' and loop.last %}<|return|>{% else %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}",
    "wide bars and no line breaks: DeepSeek-V3": "<｜begin▁of▁sentence｜>"
    + LOOP
    + "{% if turn['role'] == 'user' %}<｜User｜>"
    + ONE_TURN
    + "{% elif turn['role'] == 'system' %}"
    + ONE_TURN
    + "{% else %}<｜Assistant｜>"
    + ONE_TURN
    + "<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}",
    "brackets: MiniMax-M2": LOOP
    + "]~b]{{ 'ai' if turn['role'] == 'assistant' else turn['role'] }}\n"
    + ONE_TURN
    + "[e~[\n{% endfor %}{% if add_generation_prompt %}]~b]ai\n{% endif %}",
    "words for marks: ERNIE-4.5-VL, PaddleOCR-VL, DeepSeek-OCR": "<|begin_of_sentence|>"
    + LOOP
    + "{% if turn['role'] == 'user' %}User: "
    + ONE_TURN
    + "\n{% elif turn['role'] == 'system' %}"
    + ONE_TURN
    + "\n{% else %}Assistant: "
    + ONE_TURN
    + "<|end_of_sentence|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}",
    "a system turn of its own accord: Granite 4, Kimi-VL, SmolVLM2": "{% if messages[0]['role'] !="
    " 'system' %}<|im_system|>system<|im_middle|>You help.<|im_end|>{% endif %}"
    + LOOP
    + "<|im_{{ turn['role'] }}|>{{ turn['role'] }}<|im_middle|>"
    + ONE_TURN
    + "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>"
    "{% endif %}",
}
TALK = [
    ("user", "What is twelve times two?"),
    ("assistant", "It is 24."),
    ("user", "And then, plus one?"),
    ("assistant", "Then 25: that is 24 and one."),
]


def bytewise() -> PreTrainedTokenizerFast:
    """A token for each byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("form", FORMS)
def test_answers_are_found_in_each_form(form, system):
    tokenizer = bytewise()
    tokenizer.chat_template = FORMS[form]
    talk = ([("system", system)] if system else []) + TALK
    turns = parse_messages([{"role": role, "content": text} for role, text in talk])
    encoded = render(turns, Template(), tokenizer)
    said = [encoded.text[start:end] for start, end in encoded.answers]
    answers = [text for role, text in TALK if role == "assistant"]
    assert len(said) == len(answers)
    for span, answer in zip(said, answers, strict=True):
        assert answer in span and len(span) <= len(answer) + 40
        assert not any(text in span for role, text in talk if role != "assistant")
    ids = torch.tensor(tokenizer(encoded.text)["input_ids"])
    mask = answer_mask(encoded, ids, tokenizer)
    assert tokenizer.decode(ids[mask]) == "".join(said)
    opening = render(turns, Template(), tokenizer, prompt=True)
    assert opening.text == encoded.text[: len(opening.text)] and answers[-1] not in opening.text
    assert answers[0] in opening.text


def qwen3_vl():
    marks = {
        "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
        "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>",
    }  # fmt: skip
    chat = CHAT.replace("<|vision_bos|>", "<|vision_start|>").replace("<|IMAGE|>", "<|image_pad|>")
    chat = chat.replace("<|vision_eos|>", "<|vision_end|>").replace("<|VIDEO|>", "<|video_pad|>")
    seen = eyes()["image_processor"]
    film = Qwen3VLVideoProcessor(
        patch_size=4, size={"shortest_edge": 64, "longest_edge": 4096}, do_sample_frames=False
    )
    return Qwen3VLProcessor(seen, words(**marks), film, chat_template=chat)


@pytest.mark.parametrize("kinds", ["text", "picture", "two pictures", "video"])
@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_vl_moe"])
def test_pictures_and_videos_in_chats(name, kinds, tmp_path):
    model = checkpoint(configured(name), qwen3_vl(), tmp_path / "model")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 16, 3), np.uint8))
    media = {
        "text": {},
        "picture": {"images": [picture]},
        "two pictures": {"images": [picture, picture.resize((16, 16))]},
        "video": {"video": np.zeros((4, 16, 16, 3), np.uint8)},
    }[kinds]
    row = media | {"messages": [{"role": "user", "content": "w5 w6 w7"},
                                {"role": "assistant", "content": "w8 w9"}]}  # fmt: skip
    wanted = Recipe(model=str(model), group_size=32, iters=1, nsamples=1, device="cpu", amp=False,
                    output_dir=str(tmp_path / "out"))  # fmt: skip
    job = jobs.prepare(wanted, jobs.load_model(wanted), dataset=[row])
    (made,) = job.inputs
    counts = {kind: int((made.modality_T == kind).sum()) for kind in (IMAGE, VIDEO)}
    assert (counts[IMAGE] > 0, counts[VIDEO] > 0) == ("picture" in kinds, kinds == "video")
    grids = made.kwargs.get("image_grid_thw")
    if grids is not None:
        assert len(grids) == (2 if kinds == "two pictures" else 1)
        assert counts[IMAGE] == int(grids.prod(-1).sum()) // 4
    words_ = job.loaded.tokenizer.decode(made.kwargs["input_ids"][0][made.answer_T])
    assert words_.split()[:2] == ["w8", "w9"]
    assert torch.isfinite(run_model(job.loaded.model, made.kwargs).logits).all()
