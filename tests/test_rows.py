"""Rows as people have them: what a chat template can say reaches it, and what is left out is
counted by name."""

import copy
import io
import json

import pytest
import torch
from building import build
from PIL import Image
from rows import load_samples
from tiny_models import tiny_tokenizer

from auto_mmround.calibration.processor import render
from auto_mmround.calibration.rows import BadSample, parse_row, split_batch
from auto_mmround.calibration.template import Template, load_template, parse_template
from auto_mmround.errors import UserError

ASK, CALL = {"role": "user", "content": "Q"}, {"name": "weather", "arguments": {"city": "Paris"}}
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "c1",
            "type": "function",
            "function": {"name": "weather", "arguments": json.dumps(CALL["arguments"])},
        }
    ],
}
TOLD = {"role": "tool", "tool_call_id": "c1", "content": "18C"}
ANSWER = {"role": "assistant", "content": "A"}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "says it", "parameters": {}},
    }
]

OPEN = "{% for m in messages %}<{{ m.role }}>"
CLOSE = "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
ARGUMENTS = {
    "mapping": "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}",
    "text": "{{ c.function.name + ':' + c.function.arguments }}",
}
TOOL_CALLS = "{% for c in m.tool_calls or [] %}[{ARGS}]{% endfor %}"
SAYS_ALL = (
    "{% for t in tools or [] %}<tool {{ t.function.name }}>{% endfor %}" + OPEN
    + "{% if m.reasoning_content is defined %}({{ m.reasoning_content }}){% endif %}" + TOOL_CALLS
    + CLOSE
)  # fmt: skip


def written(chat_template, row, **more):
    """What the model's own chat template makes of a row."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = chat_template
    sample = parse_row(row, "s", **more)
    return render(sample.messages, Template(), tokenizer, options=sample.options)


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_tools_calls_and_reasoning_reach_the_chat_template(arguments):
    template = SAYS_ALL.replace("{ARGS}", ARGUMENTS[arguments])
    row = {"messages": [ASK, CALLED | {"reasoning_content": "hm"}, TOLD, ANSWER], "tools": TOOLS}
    stored = {"messages": json.dumps(row["messages"]), "tools": json.dumps(TOOLS)}
    for each in (row, stored):
        encoded = written(template, each)
        call = "city=Paris" if arguments == "mapping" else 'weather:{"city": "Paris"}'
        assert encoded.text == f"<tool weather><user>Q<assistant>(hm)[{call}]<tool>18C<assistant>A"
        assert encoded.left == ("tool_call_id",)
        assert [encoded.text[a:b] for a, b in encoded.answers] == [f"(hm)[{call}]", "A"]


def test_what_a_chat_template_does_not_say_is_counted_by_name():
    row = {
        "messages": [ASK, CALLED | {"reasoning_content": "hm"}, TOLD, ANSWER | {"weight": 1}],
        "tools": TOOLS,
    }
    encoded = written(OPEN + CLOSE, row)
    assert encoded.text == "<user>Q<assistant><tool>18C<assistant>A"
    assert sorted(encoded.left) == [
        "reasoning_content",
        "tool_call_id",
        "tool_calls",
        "tools",
        "weight",
    ]
    silent = (
        "{% for m in messages %}{% if m.role in ('user', 'assistant') %}{{ m.content }}{% endif"
        " %}{% endfor %}"
    )
    assert "tool turns" in written(silent, row).left
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = OPEN + CLOSE
    report = build([row, row], tokenizer=tokenizer, template=Template(), nsamples=2)[1]
    assert "tools (2)" in report.notes[-1] and "tool_calls (2)" in report.notes[-1]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_goes_under_the_name_that_the_template_reads(name):
    template = OPEN + "{% if m.thinking %}({{ m.thinking }}){% endif %}" + CLOSE
    assert (
        written(template, {"messages": [ASK, ANSWER | {name: "hm"}]}).text
        == "<user>Q<assistant>(hm)A"
    )
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "A"}]
    assert written(
        template, {"messages": [ASK, {"role": "assistant", "content": parts}]}
    ).text.endswith("(hm)A")


def test_developers_speak_as_system_unless_the_template_knows_them():
    row = {"messages": [{"role": "developer", "content": "S"}, ASK, ANSWER]}
    assert written(OPEN + CLOSE, row).text == "<system>S<user>Q<assistant>A"
    knows = (
        "{% for m in messages %}{% if m.role == 'developer' %}<dev>{% else %}<{{ m.role }}>{%"
        " endif %}" + CLOSE
    )
    assert written(knows, row).text == "<dev>S<user>Q<assistant>A"


def test_function_calls_of_sharegpt_are_tool_calls():
    turns = [
        ("human", "Q"),
        ("function_call", json.dumps(CALL)),
        ("observation", "18C"),
        ("gpt", "A"),
    ]
    row = {
        "conversations": [{"from": role, "value": text} for role, text in turns],
        "tools": json.dumps(TOOLS),
    }
    assert (
        "<assistant>[city=Paris]<tool>18C"
        in written(SAYS_ALL.replace("{ARGS}", ARGUMENTS["mapping"]), row).text
    )
    # as the text that it is
    assert f"<assistant>{json.dumps(CALL)}<tool>18C" in written(OPEN + CLOSE, row).text
    ours = parse_template({"format_function": "<call>{{content}}", "extra_encode": True})
    for each in (row, {"messages": [ASK, CALLED, TOLD, ANSWER]}):
        assert f"<call>{json.dumps(CALL)}" in ours.encode(parse_row(each, "s").messages)
    qwen = load_template("qwen2_vl").spans(
        parse_row({"messages": [ASK, CALLED, TOLD, ANSWER]}, "s").messages
    )
    assert "tool_calls" in qwen.left


def test_rows_cannot_choose_the_template_or_the_form():
    row = {
        "messages": [ASK, ANSWER],
        "chat_template_kwargs": {"chat_template": "x", "tokenize": True, "loud": "!"},
    }
    encoded = written(OPEN + CLOSE + "{{ loud }}", row)
    assert encoded.text == "<user>Q<assistant>A!" and encoded.left == ("chat_template", "tokenize")


SAID = (("user", "Q"), ("assistant", "A"))


@pytest.mark.parametrize(
    "row, turns",
    [
        ({"system": "S", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt",
            "value": "A"}]},
         (("system", "S"), *SAID)),
        ({"messages": [ASK, {"role": "model", "parts": [{"text": "A"}]}]}, SAID),
        ({"messages": [{"role": "USER", "content": "Q"}, {"role": "Assistant", "content": "A"}]},
            SAID),
        ({"conversations": json.dumps([ASK, ANSWER])}, SAID),
        ({"messages": [ASK, {"role": "ipython", "content": "18C"}]}, (SAID[0], ("observation",
            "18C"))),
        ({"messages": [ASK, {"role": "function", "name": "weather", "content": "18C"}]},
         (SAID[0], ("observation", "18C"))),
        ({"messages": [{"role": "user", "content": {"text": "Q"}}, ANSWER]}, SAID),
        ({"messages": [{"role": "user", "content": [{"type": "input_text", "text": "Q"}]},
                       {"role": "assistant", "content": [{"type": "output_text", "text": "A"}]}]},
                       SAID),
        ({"prompt": [ASK], "completion": [ANSWER]}, SAID),
        ({"prompt": "Q", "completion": "A"}, SAID),
        ({"prompt": "Q", "chosen": [ASK, ANSWER], "rejected": [ASK]}, SAID),
        ({"prompt": [ASK], "chosen": [ASK, ANSWER], "rejected": [ASK]}, SAID),
        ({"instruction": "I", "input": "X", "output": "O"}, (("user", "I\nX"), ("assistant", "O"))),
        ({"instruction": "I", "input": "", "output": "O", "history": [["Q", "A"]]},
         (*SAID, ("user", "I"), ("assistant", "O"))),
        ({"question": "Q", "answer": "A"}, SAID),
        ({"question": "Q", "answers": {"text": ["A", "B"], "answer_start": [0, 1]}}, SAID),
        ({"query": "Q", "response": "A"}, SAID),
    ],
)  # fmt: skip
def test_conversations_as_people_store_them(row, turns):
    assert parse_row(row, "s").messages == turns


def png():
    sink = io.BytesIO()
    Image.new("RGB", (30, 30), "red").save(sink, "PNG")
    return sink.getvalue()


@pytest.mark.parametrize(
    "row, count",
    [
        ({"img": "a.png", "text": "A"}, 1),
        ({"image_path": "a.png", "caption": "A"}, 1),
        ({"whatever": {"bytes": png(), "path": None}, "text": "A"}, 1),
        ({"whatever": png(), "text": "A"}, 1),
        ({"whatever": Image.new("RGB", (30, 30)), "text": "A"}, 1),
        ({"whatever": [{"bytes": png()}, {"bytes": png()}], "text": "A"}, 2),
        ({"image": "", "text": "A"}, 0),
        ({"image": None, "images": ["", None], "text": "A"}, 0),
        ({"image": "", "conversations": [ASK, ANSWER]}, 0),
        ({"image": "a.png", "copy": {"bytes": png()}, "text": "A"}, 1),
        ({"messages": [{"role": "user", "content": [{"image": "a.png"}, {"text": "Q"}]}]}, 1),
        ({"messages": [{"role": "user", "content": [
            {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                "data": "AAAA"}}]}]}, 1),
        ({"images": [{"path": "a.png"}, "b.png"], "messages": [{"role": "user",
            "content": "<image><image>Q"}]}, 2),
        ({"image": "a.png", "messages": json.dumps([{"role": "user",
            "content": [{"type": "image"}]}])}, 1),
    ],
)  # fmt: skip
def test_media_under_any_name_are_seen_and_empty_ones_are_none(row, count):
    sample = parse_row(row, "s")
    assert len(sample.images) == count
    assert sum(turn.content.count("<image>") for turn in sample.messages) == count


def test_columns_that_nothing_reads_are_counted(tmp_path):
    rows = [
        {
            "text": " ".join(f"w{i}" for i in range(3, 60)),
            "title": "T",
            "shot": "gone.png",
            "empty": None,
            "id": "7",
        }
    ] * 2
    report = build(rows, tokenizer=tiny_tokenizer(), template=Template(), nsamples=2, seqlen=32)[1]
    assert report.notes == ("columns not read: title (2), shot (2)",)
    (tmp_path / "there.png").write_bytes(png())
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "A", "shot": "there.png"}))
    assert load_samples(str(tmp_path / "x.jsonl"))[0].images == ("there.png",)


@pytest.mark.parametrize("thing", [object(), [object()], {"a": object()}])
def test_no_message_shows_where_an_object_lies_in_memory(thing):
    for row in (
        {"messages": [thing]}, {"messages": [{"role": thing, "content": "x"}]}, thing,
        {"messages": [{"role": "user", "content": thing}]},
        {"messages": [{"role": "user", "content": [{"type": thing}]}]},
    ):  # fmt: skip
        with pytest.raises(UserError) as caught:
            parse_row(row, "s")
        assert " at 0x" not in str(caught.value)


def test_an_empty_conversation_is_skipped_gently():
    with pytest.raises(BadSample) as caught:
        parse_row({"conversations": []}, "s")
    assert caught.value.reason == "too short"


@pytest.mark.parametrize("history", [2, "x", [1], [["a"]], {"a": 1}, [[{}, []]]])
def test_an_odd_history_is_no_traceback(history):
    assert (
        parse_row({"prompt": "Q", "completion": "A", "history": history}, "s").messages[-2:] == SAID
    )


def test_batches_of_an_encoder_decoder_are_taken_apart():
    """Collators give the ids of both halves; only media cannot be told apart."""
    ids, words = torch.arange(24).reshape(3, 8), torch.arange(15).reshape(3, 5)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": words}
    found = [parse_row(row, str(i)) for i, row in enumerate(split_batch(batch))]
    assert [sample.inputs["input_ids"].tolist() for sample in found] == ids[:, None].tolist()
    assert [sample.inputs["decoder_input_ids"].tolist() for sample in found] == words.tolist()
    with pytest.raises(UserError, match="one sample at a time"):
        next(split_batch(batch | {"pixel_values": torch.zeros(3, 3, 8, 8)}))


@pytest.mark.parametrize("kind", [torch.as_tensor, torch.Tensor.numpy, torch.Tensor.tolist])
def test_batches_without_words_are_taken_apart(kind):
    """As collators for speech give them; a batch of two was taken for one sample."""
    heard, labels = torch.rand(2, 8, 32), torch.tensor([[5, 6, 7], [8, 9, -100]])
    batch = {"input_features": heard, "labels": kind(labels), "attention_mask": None}
    found = [parse_row(row, str(i)).inputs for i, row in enumerate(split_batch(batch))]
    assert [row["input_features"].shape for row in found] == [(1, 8, 32)] * 2
    assert [torch.as_tensor(row["labels"]).tolist() for row in found] == labels[:, None].tolist()
    with pytest.raises(UserError, match="2 rows of input_features, but 1 of labels"):
        list(split_batch(batch | {"labels": labels[:1]}))


def test_one_row_without_words_stays_one():
    row = {"pixel_values": torch.rand(1, 2, 3, 8, 8), "labels": torch.tensor([[5, 6]])}
    assert list(split_batch(row)) == [row]


# A mask of one row is that of codebooks, see `test_codebooks`.
@pytest.mark.parametrize("mask", [torch.ones(2, 8), torch.tensor(1), [[1] * 8] * 2, 1])
def test_a_batch_whose_parts_differ_in_number_is_one_line(mask):
    batch = {"input_ids": torch.arange(24).reshape(3, 8), "labels": None}
    assert len(list(split_batch(batch))) == 3
    with pytest.raises(UserError, match=r"3 rows of input_ids, but .* of attention_mask"):
        list(split_batch(batch | {"attention_mask": mask}))
