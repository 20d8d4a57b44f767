"""Batches: the rules for settings, honest counting, modality and answer of every token,
truncation."""

import json
import logging

import pytest
import torch
from building import build, chosen
from PIL import Image
from rows import load_samples
from transformers import AutoConfig, AutoProcessor, LlavaConfig

from auto_mmround.calibration import samples
from auto_mmround.calibration.datasets import Rows
from auto_mmround.calibration.inputs import (
    AUDIO,
    IMAGE,
    PAD,
    TEXT,
    VIDEO,
    answer_mask,
    modality,
    placeholder_ids,
)
from auto_mmround.calibration.settings import Settings
from auto_mmround.calibration.sources import Source
from auto_mmround.calibration.template import Encoded, Template, load_template
from auto_mmround.errors import UserError

MODEL = "auto_mmround/demo/model"


@pytest.fixture(scope="module")
def kit(request):
    """Keyword arguments of build for the demo model."""
    folder = request.config.rootpath / MODEL
    processor, config = AutoProcessor.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    template = load_template("qwen2_vl")
    return {
        "tokenizer": processor.tokenizer,
        "processor": processor,
        "config": config,
        "template": template,
    }


@pytest.fixture
def llava(tmp_path):
    """Writes a LLaVA file of n samples with images beside it and returns its path."""

    def write(n, damaged=(), missing=()):
        rows = []
        for i in range(n):
            chat = [
                ("human", "<image>\nWhat?"),
                ("gpt", "yes"),
                ("human", "And now?"),
                ("gpt", "yes"),
            ]
            turns = [{"from": role, "value": value} for role, value in chat]
            rows.append({"id": f"s{i}", "image": f"{i}.png", "conversations": turns})
            (tmp_path / f"{i}.png").unlink(missing_ok=True)
            if i in damaged:
                (tmp_path / f"{i}.png").write_bytes(b"\x89PNG broken")
            elif i not in missing:
                Image.new("RGB", (56 + 28 * i, 56), "red").save(tmp_path / f"{i}.png")
        (tmp_path / "x.json").write_text(json.dumps(rows))
        return str(tmp_path / "x.json")

    return write


# ---- settings

TEXT_FILE = ["plain text"]
CHAT = [{"image": "a.png", "text": "What?"}]


def pick_settings(dataset, text_only=True, **kw):
    return chosen(dataset, load_template("qwen2_vl"), text_only=text_only, **kw)


def test_text_defaults():
    settings, notes = pick_settings(None)
    assert settings == Settings("NeelNanda/pile-10k", 128, 2048, True, 8, 1) and notes == ()


@pytest.mark.parametrize(
    "name", ["liuhaotian/llava_conv_58k", "llava_instruct_80k", "llava_instruct_150k", "demo", CHAT]
)
def test_media_sets_change_the_settings_and_say_so(name):
    settings, notes = pick_settings(name, gradient_accumulate_steps=2)
    assert settings == Settings(name, 128, 512, False, 1, 16)
    assert any("batch_size 8 becomes 1 with gradient_accumulate_steps 16" in note for note in notes)
    assert any("seqlen is 512" in note for note in notes)
    assert set(notes) == set(settings.usual)  # nobody asked for anything else
    kept, notes = pick_settings(name, seqlen=300, batch_size=1)
    assert (kept.seqlen, kept.batch_size, kept.gradient_accumulate_steps) == (
        300,
        1,
        1,
    ) and notes == ()


def test_local_llava_file_is_known_by_its_content(llava):
    settings, _ = pick_settings(llava(1))
    assert (settings.seqlen, settings.truncation, settings.batch_size) == (512, False, 1)


@pytest.mark.parametrize("kw", [{"text_only": False}, {"towers": True}])
def test_only_text_sets_are_replaced(kw, llava, tmp_path):
    settings, notes = pick_settings(None, **kw)
    assert settings.dataset == "liuhaotian/llava_conv_58k" and "NeelNanda/pile-10k" in notes[0]
    for kept in ("llava_instruct_150k", llava(1)):
        assert pick_settings(kept, **kw)[0].dataset == kept
    (tmp_path / "t.txt").write_text("text")
    assert pick_settings(str(tmp_path / "t.txt"), **kw)[0].dataset == "liuhaotian/llava_conv_58k"
    assert pick_settings("demo-text", **kw)[0].dataset == "demo-llava"  # stays offline
    settings, notes = pick_settings(TEXT_FILE, **kw)
    assert settings.dataset == TEXT_FILE and "carry no media" in notes[0]


def test_text_part_of_a_mixture_is_left_out_for_a_model_that_needs_images():
    settings, notes = pick_settings("demo-text:num=3,demo-llava:num=4", text_only=False)
    assert settings.dataset == "demo-llava:num=4" and "only the sets with media" in notes[0]
    assert pick_settings("demo-text,demo-llava")[0].dataset == "demo-text,demo-llava"


HEARS = dict(text_only=False, needs=("audio",), takes=("audio",))
SPEECH = [{"audio": "a.wav", "text": "one"}]
CLIP = [{"video": "a.mp4", "text": "What?"}]


def test_a_model_that_hears_alone_gets_speech():
    settings, notes = chosen(None, load_template("whisper"), **HEARS)
    assert settings.dataset == "MLCommons/peoples_speech" and settings.seqlen == 512
    assert not any("replaced" in note for note in notes)
    settings, notes = chosen("demo-text", load_template("whisper"), **HEARS)
    assert settings.dataset == "MLCommons/peoples_speech" and "replaced" in notes[0]
    assert chosen(SPEECH, load_template("whisper"), **HEARS)[0].dataset is SPEECH


@pytest.mark.parametrize(
    "dataset, options, words",
    [
        (CHAT, HEARS,
            "the given dataset has image samples, but this model takes audio: use --dataset F"),
        ("demo", HEARS, "the dataset demo has image samples, but this model takes audio"),
        (CHAT, dict(text_only=True, takes=("text",)),
            "this model takes text: use a text set, such as demo-text"),
        (SPEECH, dict(text_only=True, takes=("text", "image")),
            "has audio samples, but this model takes text and im"),
        (CHAT, dict(text_only=True, needs=("image", "audio"), towers=True),
         "no audio samples, and what is to be quantized reads audio: add some, "
         "such as MLCommons/peoples_speech"),
    ],
)  # fmt: skip
def test_kinds_of_media_that_do_not_fit_are_one_line(dataset, options, words):
    with pytest.raises(UserError, match=words) as caught:
        chosen(dataset, load_template("default"), **options)
    assert "\n" not in str(caught.value)


def test_kinds_of_media_that_fit():
    both = dict(
        text_only=True, needs=("image", "audio"), takes=("text", "image", "audio"), towers=True
    )
    settings, notes = pick_settings(None, **both)
    assert settings.dataset == "liuhaotian/llava_conv_58k,MLCommons/peoples_speech"
    assert pick_settings([*CHAT, *SPEECH], **both)[0].seqlen == 512
    assert pick_settings([*CLIP, *SPEECH], **both)[0].seqlen == 512
    # nobody asks what finished inputs hold
    ready = [{"input_ids": [1, 2], "pixel_values": torch.zeros(1)}]
    assert pick_settings(ready, **both)[0].dataset is ready
    settings, notes = pick_settings("demo-text:num=3,demo-llava:num=4", takes=("text",))
    assert (
        settings.dataset == "demo-text:num=3"
        and "takes no image: the set demo-llava is left out" in notes[0]
    )


def test_nsamples_is_a_multiple_of_batch_size_and_towers_take_one_at_a_time():
    settings, notes = pick_settings(None, nsamples=10, batch_size=4)
    assert settings.nsamples == 12 and "12" in notes[0]
    settings, _ = pick_settings("demo-llava", towers=True, batch_size=4, nsamples=10)
    assert (settings.nsamples, settings.batch_size, settings.gradient_accumulate_steps) == (
        10,
        1,
        4,
    )


def test_a_stream_is_read_once():
    settings, _ = pick_settings(text for text in ["a", "b"])
    assert settings.dataset == ["a", "b"]


# ---- text

LONG = "In the beginning God created the heaven and the earth. " * 12
SHORT = "And the earth was without form, and void; and darkness was upon the face of the deep. " * 2


def test_full_texts_first_then_short_ones_and_too_short_ones_counted(kit, caplog):
    caplog.set_level(logging.INFO)
    inputs, report = build([SHORT, LONG, "tiny", SHORT, LONG], seqlen=64, nsamples=8, **kit)
    assert [made.id for made in inputs] == ["row#1", "row#4", "row#0", "row#3"]
    assert [made.kwargs["input_ids"].shape[1] == 64 for made in inputs] == [
        True,
        True,
        False,
        False,
    ]
    assert (report.asked, report.used, report.short) == (8, 4, 2)
    assert report.skipped == {"too short": ("row#2",)}
    assert report.tokens == {"text": sum(len(made.modality_T) for made in inputs)}
    assert caplog.records[-1].levelname == "WARNING" and "4 of 8 samples" in caplog.text
    assert all(bool(made.answer_T.all()) for made in inputs)


def test_one_short_text_is_one(kit):
    texts = [build(rows, seqlen=64, **kit)[1].text() for rows in ([SHORT, LONG], [SHORT] * 2)]
    assert "; 1 text is shorter than seqlen" in texts[0] and "; 2 texts are shorter" in texts[1]


def test_a_text_without_a_token_has_no_kinds():
    assert modality({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}).shape == (0,)


def test_never_more_than_asked_and_chosen_by_seed(kit):
    texts = [f"{i} {LONG}" for i in range(20)]

    def ids(seed):
        return [made.id for made in build(texts, seqlen=32, nsamples=5, seed=seed, **kit)[0]]

    first = ids(1)
    assert len(first) == 5 and first == ids(1) and first != ids(2)
    # in the order of the set
    assert first == sorted(first, key=lambda name: int(name.partition("#")[2]))


def test_repetitive_placeholder_and_empty_texts_are_left_out(kit):
    texts = ["a " * 200, "see <|image_pad|> here " * 20, LONG, ""]
    inputs, report = build(texts, seqlen=64, nsamples=4, **kit)
    assert [made.id for made in inputs] == ["row#2"]
    assert report.skipped == {
        "repetitive": ("row#0",),
        "plain text with a media placeholder": ("row#1",),
        "too short": ("row#3",),
    }


def test_nothing_usable_is_an_error(kit):
    with pytest.raises(UserError, match=r"no usable sample.*too short: 2"):
        build(["tiny", "small"], seqlen=64, **kit)


def test_token_rows_and_ready_inputs(kit):
    ready = {
        "input_ids": torch.arange(40)[None],
        "attention_mask": torch.ones(1, 40),
        "position_ids": torch.arange(40)[None],
    }
    inputs, _ = build([list(range(50)), ready], seqlen=48, nsamples=2, **kit)
    assert [made.kwargs["input_ids"].tolist()[0] for made in inputs] == [
        list(range(48)),
        list(range(40)),
    ]
    assert {tuple(made.kwargs) for made in inputs} == {
        ("input_ids", "attention_mask"),
        tuple(ready),
    }


def test_concat_packs_to_exact_length(kit):
    folder = Rows(Source("x", concat=True), [SHORT] * 20, name="x")
    packed = samples.packed(folder, kit["tokenizer"], 100, 3, iter(range(20)))
    assert [len(packed.sample(i).input_ids) for i in range(len(packed))] == [100, 100, 100]
    inputs, report = build("demo-text:concat:num=3", seqlen=700, **kit)
    assert [made.kwargs["input_ids"].shape[1] for made in inputs] == [700] * 3 and report.short == 0


def test_shares():
    def of(*sets, nsamples=100):
        return samples.shares(
            nsamples, [Rows(Source("x", num=num), range(size)) for num, size in sets]
        )[0]

    assert of((None, 500)) == [100]
    assert of((None, 500), (None, 500), (None, 10)) == [45, 45, 10]
    assert of((30, 500), (None, 500)) == [30, 70]
    assert of((10, 500), (20, 500)) == [10, 20]
    assert of((100, 500), (100, 500)) == [50, 50]
    assert sum(of((3, 9), (3, 9), (3, 9), nsamples=4)) == 4
    assert "scaled down" in samples.shares(1, [Rows(Source("x", num=5), range(9))])[1][0]


# ---- conversations and media


def test_llava_samples(kit, llava):
    inputs, report = build(llava(2), seqlen=512, truncation=False, **kit)
    assert (report.asked, report.used, report.short, report.skipped) == (128, 2, 0, {})
    for made in inputs:
        ids_T, grid = made.kwargs["input_ids"][0], made.kwargs["image_grid_thw"]
        assert len(made.modality_T) == len(made.answer_T) == len(ids_T)
        assert made.modality_T.dtype == torch.int8 and made.answer_T.dtype == torch.bool
        assert int((made.modality_T == IMAGE).sum()) == int(grid.prod()) // 4
        assert kit["tokenizer"].decode(ids_T[made.answer_T]) == "yes<|im_end|>yes<|im_end|>"
    assert report.tokens["image"] == sum(int((made.modality_T == IMAGE).sum()) for made in inputs)
    assert "2 of 128" in report.text() and "image" in report.text()


def test_demo_answers_are_exact(kit):
    samples = {sample.id: sample for sample in load_samples("demo-llava")}
    inputs, report = build("demo-llava", nsamples=len(samples), seqlen=512, truncation=False, **kit)
    assert report.used == len(samples)
    for made in inputs:
        answers = [
            turn.content + "<|im_end|>"
            for turn in samples[made.id].messages
            if turn.role == "assistant"
        ]
        assert kit["tokenizer"].decode(made.kwargs["input_ids"][0][made.answer_T]) == "".join(
            answers
        )


def test_chat_templates_answers_are_exact_too(kit):
    inputs, _ = build("demo-llava:num=5", **{**kit, "template": Template()})
    assert inputs
    for made in inputs:
        text = kit["tokenizer"].decode(made.kwargs["input_ids"][0][made.answer_T])
        assert text.endswith("<|im_end|>") and "<|im_start|>" not in text


def test_samples_of_load_samples_and_prompts(kit):
    samples = load_samples("demo-llava", limit=3)
    inputs, _ = build(samples, prompt=True, nsamples=3, **kit)
    assert [made.id for made in inputs] == [sample.id for sample in samples]
    for made in inputs:
        assert (
            kit["tokenizer"].decode(made.kwargs["input_ids"][0]).endswith("<|im_start|>assistant\n")
        )


@pytest.mark.parametrize("kind", ["damaged", "missing"])
def test_bad_media_stop_the_run_by_name_or_are_counted(kit, llava, caplog, kind):
    path = llava(3, **{kind: (1,)})
    with pytest.raises(UserError, match=r"sample x\.json#s1: image .*1\.png") as caught:
        build(path, **kit)
    assert "\n" not in str(caught.value)
    inputs, report = build(path, on_bad_sample="skip", **kit)
    assert [made.id for made in inputs] == ["x.json#s0", "x.json#s2"]
    assert report.skipped == {"missing or damaged media": ("x.json#s1",)}
    assert "1.png" in caplog.text and "(x.json#s1)" in report.text()
    with pytest.raises(UserError, match="no usable sample"):
        build(llava(2, **{kind: (0, 1)}), on_bad_sample="skip", **kit)


def test_images_from_a_given_folder(kit, llava, tmp_path):
    path = llava(1, missing=(0,))
    given = tmp_path / "given"
    given.mkdir()
    Image.new("RGB", (56, 56)).save(given / "0.png")
    assert build(path, extra_data_dir=f"image={given}", **kit)[1].used == 1
    with pytest.raises(UserError, match="doesn't exist"):
        build(path, extra_data_dir="image=/none", **kit)


def test_what_the_processor_refuses_is_named(kit):
    thin = {"id": "thin", "text": "<image>What?", "image": Image.new("RGB", (1000, 2))}
    with pytest.raises(UserError, match="sample row#thin"):
        build([thin], **kit)
    inputs, report = build(
        [thin, "<image> is a word. " + LONG], on_bad_sample="skip", seqlen=32, **kit
    )
    assert len(inputs) == 1 and "refused by the processor" in report.skipped


def test_unknown_row_is_skipped_or_named(kit):
    with pytest.raises(UserError, match="expected text"):
        build([{"a": 1, "b": 2}, LONG], **kit)
    assert build([{"a": 1, "b": 2}, LONG], on_bad_sample="skip", seqlen=32, **kit)[1].skipped == {
        "form": ("row#0",)
    }


def test_truncation_keeps_all_features(kit, llava):
    path = llava(1)
    (whole,) = build(path, truncation=False, seqlen=10, **kit)[0]
    need = int(torch.nonzero(whole.modality_T == IMAGE).max()) + 1
    (made,) = build(path, truncation=True, seqlen=need + 5, **kit)[0]
    length = need + 5
    assert {
        key: made.kwargs[key].shape[1]
        for key in ("input_ids", "attention_mask", "mm_token_type_ids")
    } == dict.fromkeys(("input_ids", "attention_mask", "mm_token_type_ids"), length)
    assert len(made.modality_T) == len(made.answer_T) == length
    assert torch.equal(made.kwargs["pixel_values"], whole.kwargs["pixel_values"])
    with pytest.raises(UserError, match="media longer than seqlen"):
        build(path, truncation=True, seqlen=need - 1, **kit)


def test_mixture_of_text_and_images(kit):
    _, report = build("demo-text:num=2,demo-llava:num=3", seqlen=64, truncation=False, **kit)
    assert (report.asked, report.used) == (5, 5) and set(report.tokens) == {"text", "image"}


def test_no_chat_template_at_all_is_said(kit):
    class Bare:
        chat_template = bos_token = None

        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

        def __call__(self, *args, **kw):
            return self.tokenizer(*args, **kw)

    chat = [
        {
            "messages": [
                {"role": "user", "content": "What?"},
                {"role": "assistant", "content": "Yes."},
            ]
        }
    ]
    (made,), report = build(chat, tokenizer=Bare(kit["tokenizer"]), template=Template())
    assert kit["tokenizer"].decode(made.kwargs["input_ids"][0]) == "What?Yes."
    assert "no chat template" in report.text()
    assert kit["tokenizer"].decode(made.kwargs["input_ids"][0][made.answer_T]) == "Yes."


def test_nothing_of_the_users_is_changed(kit):
    before = kit["tokenizer"].backend_tokenizer.to_str(), kit["processor"].to_json_string()
    build("demo", seqlen=64, nsamples=4, truncation=True, **kit)
    assert before == (
        kit["tokenizer"].backend_tokenizer.to_str(),
        kit["processor"].to_json_string(),
    )


@pytest.mark.parametrize(
    "kw", [{"nsamples": 0}, {"seqlen": 0}, {"on_bad_sample": "ignore"}, {"processor_name": "none"}]
)
def test_wrong_arguments(kit, kw):
    with pytest.raises(UserError):
        build([LONG], **{**kit, **kw})


# ---- modality and answers without the demo model


def test_modality_from_configuration():
    class Config:
        def __init__(self, **kw):
            self.__dict__.update(kw)

        def to_dict(self):
            return dict(self.__dict__)

    nested = Config(thinker_config=Config(image_token_id=7, audio_token_index=8), video_token_id=9)
    assert placeholder_ids(nested) == {7: IMAGE, 8: AUDIO, 9: VIDEO}
    assert placeholder_ids(LlavaConfig()) == {32000: IMAGE} and placeholder_ids(None) == {}
    ids = torch.tensor([[1, 7, 8, 9, -1, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
    kinds = modality({"input_ids": ids, "attention_mask": mask}, nested)
    assert kinds.tolist() == [TEXT, IMAGE, AUDIO, VIDEO, IMAGE, PAD]
    given = torch.tensor([[0, 1, 0, 0, 2, 0]])
    assert (
        modality({"input_ids": ids, "mm_token_type_ids": given}, nested).tolist()
        == given[0].tolist()
    )


@pytest.mark.parametrize("fast", [True, False])
def test_answers_survive_any_expansion(fast):
    """Placeholders become other tokens in any number; equal answers are told apart by their
    order."""

    class Letters:
        is_fast = fast

        def __call__(self, text, add_special_tokens, return_offsets_mapping=False):
            offsets = [(i, i + 1) for i in range(len(text))]
            return {"input_ids": [ord(c) for c in text], "offset_mapping": offsets}

    text = "q@uA:yes;q@A:yes;"
    spans = tuple((i + 2, i + 6) for i in range(len(text)) if text.startswith("A:", i))
    ids = torch.tensor(
        [1, *(j for c in text for j in ([3, 4, 3, 4, 5] if c == "@" else [ord(c)])), 2]
    )
    mask = answer_mask(Encoded(text, spans), ids, Letters())
    assert "".join(chr(i) for i in ids[mask].tolist()) == "yes;yes;"
    assert answer_mask(Encoded("other", ((0, 5),)), ids, Letters()) is None
    assert not answer_mask(Encoded(text, ()), ids, Letters()).any()
