"""Chat templates: the two golden encodings to the character, all accepted forms, all refusals."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from auto_mmround.calibration.template import (
    Template,
    load_template,
    parse_messages,
    parse_template,
    shipped,
)
from auto_mmround.errors import UserError

ONE = [
    ("user", "<image>\nWhat are the colors of the bus in the image?"),
    ("assistant", "The bus in the image is white and red."),
]
THREE = [
    *ONE,
    ("user", "What feature can be seen on the back of the bus?"),
    ("assistant", "The back of the bus features an advertisement."),
    ("user", "Is the bus driving down the street or pulled off to the side?"),
    (
        "assistant",
        "The bus is driving down the street, which is crowded with people and other vehicles.",
    ),
]
GOLDEN_ONE = (
    "<|im_start|>system\nYou are a helpful"
    " assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>\nWhat are"
    " the colors of the bus in the image?<|im_end|>\n<|im_start|>assistant\nThe bus in the image is"
    " white and red.<|im_end|>\n"
)
GOLDEN_THREE = (
    GOLDEN_ONE + "<|im_start|>user\nWhat feature can be seen on the back of the"
    " bus?<|im_end|>\n<|im_start|>assistant\nThe back of the bus features an"
    " advertisement.<|im_end|>\n<|im_start|>user\nIs the bus driving down the street or pulled"
    " off to the side?<|im_end|>\n<|im_start|>assistant\nThe bus is driving down the street,"
    " which is crowded with people and other vehicles.<|im_end|>\n"
)
README_TEMPLATE = {
    "model_type": "qwen2_vl",
    "format_user": "<|im_start|>user\n{{content}}<|im_end|>\n",
    "format_assistant": "<|im_start|>assistant\n{{content}}<|im_end|>\n",
    "format_system": "<|im_start|>system\n{{content}}<|im_end|>\n",
    "format_observation": "<|im_start|>tool\n{{content}}<|im_end|>\n<|im_start|>assistant\n",
    "format_separator": "\n",
    "default_system": "You are a helpful assistant.",
    "replace_tokens": ["<image>", "<|vision_start|><|image_pad|><|vision_end|>"],
    "extra_encode": "True",
    "processor": "qwen2_vl",
}
LLAVA_ROLES = {"user": "human", "assistant": "gpt"}


def parts(text):
    """Content list with typed parts, the line break kept in the text."""
    head, mark, tail = text.partition("<image>")
    return (
        [{"type": "image"}, {"type": "text", "text": tail}]
        if mark
        else [{"type": "text", "text": head}]
    )


FORMS = {
    "role/value": lambda role, text: {"role": role, "value": text},
    "role/content": lambda role, text: {"role": role, "content": text},
    "from/value": lambda role, text: {"from": LLAVA_ROLES[role], "value": text},
    "parts": lambda role, text: {"role": role, "content": parts(text)},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(
    "template",
    [load_template("qwen2_vl"), parse_template(README_TEMPLATE)],
    ids=["shelf", "readme"],
)
def test_golden_encodings(template, form):
    assert len(GOLDEN_ONE) == 245 and len(GOLDEN_THREE) == 606
    assert template.encode([form(*turn) for turn in ONE]) == GOLDEN_ONE
    assert template.encode([form(*turn) for turn in THREE]) == GOLDEN_THREE


def test_answer_spans_cover_answer_and_closing_token():
    encoded = load_template("qwen2_vl").spans([FORMS["role/value"](*turn) for turn in THREE])
    texts = [encoded.text[start:end] for start, end in encoded.answers]
    assert texts == [text + "<|im_end|>" for role, text in THREE if role == "assistant"]


def test_prompt_ends_with_the_opening_of_the_answer():
    template = load_template("qwen2_vl")
    messages = [FORMS["role/value"](*turn) for turn in ONE]
    opened = GOLDEN_ONE[: GOLDEN_ONE.index("The bus in")]
    assert template.prompt(messages) == opened == template.prompt(messages[:1])


def test_system_turn_replaces_default():
    text = load_template("qwen2_vl").encode(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    )
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"


def test_observation_opens_the_answer_once():
    template = load_template("qwen2_vl")
    tool = [{"role": "user", "content": "Hi"}, {"role": "tool", "content": "42"}]
    text = template.encode([*tool, {"role": "assistant", "content": "It is 42."}])
    assert text.endswith(
        "<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\nIt is 42.<|im_end|>\n"
    )
    assert template.prompt(tool).count("<|im_start|>assistant") == 1


def test_shelf():
    shelf = shipped()
    assert set(shelf) >= {"default", "qwen2_vl", "mllama", "phi3_v", "llava", "cogvlm2"}
    assert (
        load_template(None, "qwen2_vl") is not None
        and load_template(None, "qwen2_vl").processor == "qwen2_vl"
    )
    assert load_template(None, "never_heard_of").model_type == "default"
    mllama = shelf["mllama"]
    assert mllama.default_dataset == "liuhaotian/llava_conv_58k"
    assert (
        mllama.encode([{"role": "user", "content": "<image>Hi"}])
        == "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\nYou are a helpful"
        " assistant.<|eot_id|><|start_header_id|>user<|end_header_id|>\n<|image|>Hi<|eot_id|>"
    )
    chat = [
        {"role": "user", "content": "<image>\nWhat?"},
        {"role": "assistant", "content": "A cat."},
    ]
    assert shelf["cogvlm2"].encode(chat) == "Question: What? Answer: A cat.\n"
    assert shelf["phi3_v"].encode(chat[:1]) == "<|image_1|>\nWhat?"


def test_defaults_are_those_of_the_original_schema():
    template = parse_template({"replace_tokens": None, "processor": None})
    assert template == Template()
    assert (template.model_type, template.default_dataset, template.processor) == (
        "user_define",
        "NeelNanda/pile-10k",
        "basic",
    )
    assert (template.format_user, template.format_function, template.format_separator) == (
        "{{content}}",
        "",
        "\n",
    )


def test_templates_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_template("qwen2_vl").model_type = "x"


@pytest.mark.parametrize(
    "value, wanted",
    [(True, True), ("True", True), ("true", True), ("FALSE", False), (False, False)],
)
def test_extra_encode_forms(value, wanted):
    assert parse_template({"extra_encode": value}).extra_encode is wanted


def test_replace_tokens_flat_or_pairs_in_order_everywhere():
    flat = parse_template({"replace_tokens": ["a", "b", "b", "c"], "extra_encode": True})
    assert flat == parse_template(
        {"replace_tokens": [["a", "b"], ["b", "c"]], "extra_encode": True}
    )
    assert (
        flat.encode([{"role": "user", "content": "aab"}, {"role": "assistant", "content": "a"}])
        == "cccc"
    )


def test_explicit_empty_format_prints_nothing_and_first_content_only():
    template = parse_template(
        {"format_user": "", "format_assistant": "{{content}}|{{content}}", "extra_encode": True}
    )
    chat = [{"role": "user", "content": "hidden"}, {"role": "assistant", "content": "x"}]
    assert template.encode(chat) == "x|{{content}}"


@pytest.mark.parametrize(
    "data, words",
    [
        ({"extra_encode": "yes"}, "extra_encode"),
        ({"extra_encode": 1}, "extra_encode"),
        ({"replace_tokens": ["a", "b", "c"]}, "pairs"),
        ({"replace_tokens": "ab"}, "replace_tokens"),
        ({"replace_tokens": [["a"]]}, "replace_tokens"),
        ({"replace_tokens": ["", "x"]}, "replace_tokens"),
        ({"format_usr": "x"}, "did you mean 'format_user'"),
        ({"format_user": 3}, "format_user"),
        (["x"], "JSON object"),
    ],
)
def test_wrong_templates(data, words):
    with pytest.raises(UserError, match=words):
        parse_template(data)


def test_custom_file(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(README_TEMPLATE))
    assert (
        load_template(str(file)).encode([FORMS["role/value"](*turn) for turn in ONE]) == GOLDEN_ONE
    )
    file.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_template(file)
    with pytest.raises(UserError, match="doesn't exist"):
        load_template(str(tmp_path / "none.json"))
    with pytest.raises(UserError, match=r"did you mean 'qwen2_vl'\?.*known: cogvlm2, default"):
        load_template("qwen2-vl")


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "narrator", "content": "x"}],
        [{"content": "x"}],
        ["x"],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": [{"type": "smell"}]}],
        [{"role": "user", "content": [3]}],
    ],
)
def test_wrong_messages(messages):
    with pytest.raises(UserError):
        parse_messages(messages)


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text()), max_size=6))
def test_spans_hold_exactly_the_answers(turns):
    """Whatever the texts, each span is the answer as written, and all turns are there in order."""
    template = dataclasses.replace(load_template("qwen2_vl"), replace_tokens=())
    encoded = template.spans([{"role": role, "content": text} for role, text in turns])
    assert [encoded.text[a:b] for a, b in encoded.answers] == [
        t + "<|im_end|>" for r, t in turns if r == "assistant"
    ]
    assert len(encoded.text) >= sum(len(text) for _, text in turns)
