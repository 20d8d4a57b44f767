"""Processors: the registry, a user's own file and entry points, and what the shipped ones hand to a
model."""

import json

import pytest
import torch
from PIL import Image

from auto_mmround.calibration import processor as registry
from auto_mmround.calibration.processor import (
    find_processor,
    get_processor,
    load_processor_file,
    register_processor,
    render,
    split_markers,
)
from auto_mmround.calibration.rows import BadSample, Sample
from auto_mmround.calibration.template import Message, Template, load_template, parse_template
from auto_mmround.errors import UserError

CHAT = (Message("user", "<image>\nWhat?"), Message("assistant", "A cat."), Message("user", "Sure?"))
IMAGE = Image.new("RGB", (56, 56), "red")


@pytest.fixture(scope="module")
def processor(demo):
    return demo.processor


class Writer:
    """Stands for a tokenizer or processor with a chat template of the given kind of contents."""

    bos_token = None
    chat_template = "yes"

    def __init__(self, takes_parts):
        self.takes_parts = takes_parts

    def apply_chat_template(self, chat, tokenize, add_generation_prompt=False):
        def content(value):
            if not self.takes_parts:
                return "" + value
            return "".join(part.get("text", f"[{part['type']}]") for part in value)

        turns = [f"<{turn['role']}>{content(turn['content'])}</>\n" for turn in chat]
        return "".join(turns) + ("<assistant>" if add_generation_prompt else "")


def test_register_returns_the_class_and_names_are_found(monkeypatch):
    registry.known_processors()  # the shelf registers itself before the copy is made
    monkeypatch.setattr(registry, "_CLASSES", dict(registry._CLASSES))

    @register_processor("mine")
    class Mine:
        pass

    assert Mine is not None and find_processor("mine") is Mine
    assert find_processor("qwen2_vl").__name__ == "Qwen2VL"
    assert {"basic", "hf", "qwen2_vl", "llava", "cogvlm2"} <= set(registry.known_processors())
    with pytest.raises(UserError, match=r"did you mean 'qwen2_vl'\?.*known: basic"):
        find_processor("qwen_vl")


def test_every_shipped_template_has_its_processor():
    from auto_mmround.calibration.template import shipped

    for template in shipped().values():
        assert get_processor(None, template)


def test_entry_point(monkeypatch):
    class Entry:
        name = "theirs"

        def load(self):
            return Template

    monkeypatch.setattr(
        registry,
        "entry_points",
        lambda group, name=None: [Entry()] if name in (None, "theirs") else [],
    )
    assert find_processor("theirs") is Template
    assert "theirs" in registry.known_processors()


OWN = """
from auto_mmround.calibration.processor import register_processor

@register_processor("{name}")
class Own:
    def __init__(self, tokenizer, processor=None, image_processor=None, config=None):
        pass
"""


def test_own_file_leaves_the_registry_alone(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN.format(name="basic"))
    own = get_processor(str(file), Template())
    assert own.__name__ == "Own" and find_processor("basic") is not own
    file.write_text(OWN.format(name="a") + OWN.format(name="b"))
    assert load_processor_file(file, "b").__name__ == "Own"
    with pytest.raises(UserError, match="found 2"):
        load_processor_file(file)
    assert "a" not in registry.known_processors()


@pytest.mark.parametrize(
    "text, words",
    [("", "found 0"), ("import no_such_thing", "can't be imported"), ("x = (", "can't be")],
)
def test_wrong_own_files(tmp_path, text, words):
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(UserError, match=words):
        load_processor_file(tmp_path / "own.py")
    with pytest.raises(UserError, match="doesn't exist"):
        load_processor_file(tmp_path / "none.py")


def test_parts_keep_the_order_of_the_text():
    assert split_markers("<image>\nWhat?") == [{"type": "image"}, {"type": "text", "text": "What?"}]
    parts = [
        part.get("text", part["type"])
        for part in split_markers("First <image>, then\n<video>\n\nwhat")
    ]
    assert parts == ["First ", "image", ", then", "video", "\nwhat"]
    assert split_markers("") == []


@pytest.mark.parametrize("takes_parts", [True, False])
def test_chat_template_of_the_model(takes_parts):
    writer = Writer(takes_parts)
    marker = "[image]" if takes_parts else "<image>\n"
    encoded = render(CHAT, Template(), writer)
    assert encoded.text == f"<user>{marker}What?</>\n<assistant>A cat.</>\n<user>Sure?</>\n"
    assert [encoded.text[a:b] for a, b in encoded.answers] == ["A cat.</>"]
    assert render(CHAT, Template(), writer, prompt=True).text == encoded.text + "<assistant>"
    assert (
        render(CHAT[:2], Template(), writer, prompt=True).text
        == f"<user>{marker}What?</>\n<assistant>"
    )


def test_processor_wins_over_tokenizer_and_replace_tokens_ask_for_strings():
    assert "[image]" in render(CHAT, Template(), Writer(False), Writer(True)).text
    assert "<|image_1|>\nWhat?" in render(CHAT, load_template("phi3_v"), Writer(False)).text


def test_without_any_chat_template_contents_are_joined(processor):
    class Bare:
        chat_template = None

    assert render(CHAT, load_template("default"), Bare()).text == "<image>\nWhat?A cat.Sure?"


def test_demo_chat_template_and_shelf_template_agree(processor):
    ours = render(CHAT, load_template("qwen2_vl"), processor.tokenizer, processor)
    theirs = render(CHAT, Template(), processor.tokenizer, processor)
    assert ours.text.replace("<|vision_end|>\n", "<|vision_end|>") == theirs.text
    assert len(ours.answers) == len(theirs.answers) == 1


def test_qwen2_vl_passes_everything_on_and_changes_nothing(processor):
    before = processor.tokenizer.backend_tokenizer.to_str(), processor.to_json_string()
    sample = Sample("s", messages=CHAT, images=(IMAGE,))
    inputs = find_processor("qwen2_vl")(processor.tokenizer, processor).encode(
        sample, load_template("qwen2_vl")
    )
    assert set(inputs) == {
        "input_ids",
        "attention_mask",
        "mm_token_type_ids",
        "pixel_values",
        "image_grid_thw",
    }
    assert inputs["input_ids"].shape[0] == 1
    assert int(inputs["mm_token_type_ids"].sum()) == int(inputs["image_grid_thw"].prod()) // 4
    assert before == (processor.tokenizer.backend_tokenizer.to_str(), processor.to_json_string())


def test_qwen2_vl_video(processor):
    video = torch.zeros(4, 56, 56, 3, dtype=torch.uint8).numpy()
    sample = Sample("s", messages=(Message("user", "<video>What?"),), videos=(video,))
    inputs = find_processor("qwen2_vl")(processor.tokenizer, processor).encode(
        sample, load_template("qwen2_vl")
    )
    assert "pixel_values_videos" in inputs and int((inputs["mm_token_type_ids"] == 2).sum()) > 0


def test_basic_without_processor_takes_text_only(processor):
    basic = find_processor("basic")(processor.tokenizer)
    inputs = basic.encode(Sample("s", messages=CHAT[1:]), load_template("qwen2_vl"))
    assert set(inputs) == {"input_ids", "attention_mask"}
    with pytest.raises(UserError, match="no processor"):
        basic.encode(Sample("s", messages=CHAT, images=(IMAGE,)), load_template("qwen2_vl"))


def test_no_second_bos(processor):
    class Tokenizer:
        bos_token = "<s>"
        chat_template = None

        def __call__(self, text, **kw):
            return {"input_ids": kw.get("add_special_tokens", True)}

    template = parse_template({"format_user": "<s>{{content}}", "extra_encode": True})
    basic = find_processor("basic")(Tokenizer())
    assert basic.encode(Sample("s", messages=CHAT[2:]), template)["input_ids"] is False
    assert basic.encode(Sample("s", messages=CHAT[2:]), Template())["input_ids"] is True


def test_llava_falls_back_to_the_vicuna_form():
    class Bare:
        chat_template = None

    text = (
        find_processor("llava")(Bare())
        .render(Sample("s", messages=CHAT[:2]), load_template("llava"))
        .text
    )
    assert text == "USER: <image>\nWhat? ASSISTANT: A cat.</s>"


def test_cogvlm2_from_its_configuration(processor):
    class Config:
        vision_config = {"image_size": 56, "patch_size": 14}  # noqa: RUF012

    class Tokenizer:
        bos_token_id, pad_token_id, eos_token_id, chat_template = 1, None, 2, None

        def __call__(self, text, **kw):
            return {"input_ids": [ord(c) for c in text]}

    family = find_processor("cogvlm2")(Tokenizer(), config=Config())
    inputs = family.encode(
        Sample("s", messages=CHAT[:1], images=(IMAGE,)), load_template("cogvlm2")
    )
    text = "Question: What? "
    assert inputs["input_ids"][0].tolist() == [1, *[2] * 6, *map(ord, text)]
    assert family.modality(inputs).tolist() == [0, *[1] * 6, *[0] * len(text)]
    assert inputs["images"][0][0].shape == (3, 56, 56)
    with pytest.raises(BadSample, match="one image"):
        family.encode(Sample("s", messages=CHAT, images=(IMAGE, IMAGE)), load_template("cogvlm2"))


def test_a_sound_is_refused_where_nothing_hears(processor):
    sample = Sample("s", messages=(Message("user", "<audio>\nWhat?"),), audios=(torch.zeros(800),))
    with pytest.raises(BadSample, match="sample s: the model's processor reads no sound"):
        find_processor("qwen2_vl")(processor.tokenizer, processor).encode(
            sample, load_template("qwen2_vl")
        )


def test_template_file_and_processor_file_make_a_family(tmp_path):
    """A user's new family: one JSON, one Python file, from anywhere."""
    (tmp_path / "own.py").write_text(OWN.format(name="own"))
    (tmp_path / "own.json").write_text(json.dumps({"model_type": "own", "processor": "own"}))
    template = load_template(str(tmp_path / "own.json"))
    assert get_processor(str(tmp_path / "own.py"), template).__name__ == "Own"
