"""All readers that the fuzzer feeds. Those of templates, rows and recipes are here, each with seeds
of its own kind: small files that are right, to be damaged."""

import copy
import io
import json
from pathlib import Path
from typing import Any

from fuzz_checkpoints import checkpoints, gguf_files
from fuzz_inputs import VALUES, Target, damaged, damaged_bytes, file_reader, text_files, written
from fuzz_media import all_media, picture
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError

from auto_mmround.calibration import samples
from auto_mmround.calibration.datasets import load_rows
from auto_mmround.calibration.processor import render
from auto_mmround.calibration.template import Template, parse_messages, read_template, shipped
from auto_mmround.errors import UserError
from auto_mmround.model.loading import DEMO, load_processor, read_config
from auto_mmround.recipe.files import read
from auto_mmround.recipe.recipe import from_mapping

CALLS = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]
CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": "A circle."},
]
ROWS: list[Any] = [
    [{"text": "some words, " * 20}, {"input_ids": [1, 2, 3] * 20}, "plain text " * 20],
    [{"id": "1", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"},
                                                     {"from": "gpt", "value": "It."}]}],
    [{"messages": [*CHAT, {"role": "assistant", "content": "", "tool_calls": CALLS}],
        "tools": CALLS, "system": "S"}],
    [{"prompt": "Q", "completion": "A", "history": [["a", "b"]]}, {"whatever": "a.png",
        "text": "A"}],
    [{"messages": CHAT, "images": ["a.png"]}, {"messages": CHAT, "image": {"bytes": None,
        "path": "a.png"}}],
    {"data": [{"messages": CHAT, "audio": {"array": [0.0, 0.5], "sampling_rate": 8000}}]},
]  # fmt: skip
STATE = {"_data_files": [{"filename": "data.arrow"}], "_split": "train", "_fingerprint": "x"}
TOML = (
    'model = "demo"\nbits = 4\n[tuning]\niters = 10\nlr ='
    ' 0.01\n[layer_config."model.layers.0"]\nbits = 8\n'
)
YAML = "model: demo\nbits: 4\nignore: [lm_head, 're:.*vision.*']\nscheme: W4A16\nfp_layers: a,b\n"
MODIFIERS = {
    "default_stage": {
        "default_modifiers": {
            "SmoothQuantModifier": {"smoothing_strength": 0.8, "mappings": [[["re:.*q_proj"],
                "re:.*input_layernorm"]]},
            "GPTQModifier": {
                "ignore": ["lm_head"],
                "dampening_frac": 0.1,
                "config_groups": {
                    "group_0": {
                        "targets": ["Linear"],
                        "weights": {"num_bits": 4, "type": "int", "symmetric": True,
                            "group_size": 128},
                        "input_activations": {"num_bits": 8, "dynamic": True, "strategy": "token"},
                    }
                },
            },
        }
    }
}  # fmt: skip


def templates() -> Target:
    seeds = [
        {k: v for k, v in vars(t).items() if k != "replace_tokens"} for t in shipped().values()
    ]
    seeds.append({**seeds[0], "replace_tokens": ["<image>", "<img>"]})

    def use(path: Path) -> None:
        template = read_template(path)
        for prompt in (template.encode, template.prompt, template.spans):
            prompt(CHAT)

    inputs = damaged(*seeds).map(written) | text_files(json.dumps(seeds[0]))
    return Target("template", inputs, file_reader("t.json", use))


def messages() -> Target:
    template = shipped()["qwen2_vl"]
    return Target(
        "messages",
        damaged(CHAT) | VALUES,
        lambda _, data: template.spans(parse_messages(_iterable(data))),
    )


def _iterable(data: Any) -> Any:
    return data if isinstance(data, str | list | dict) else [data]


def datasets(work: Path) -> list[Target]:
    (work / "given" / "a.png").write_bytes(picture("PNG"))
    processor = load_processor(DEMO)
    preparers = samples.Preparers(
        processor.tokenizer, processor, shipped()["qwen2_vl"], read_config(DEMO)
    )

    def use(path: Path) -> None:
        for mode in ("skip", "error"):
            samples.build(str(path), preparers, samples.Reading(2, 64, on_bad_sample=mode))

    json_rows, lines = damaged(*ROWS).map(written), damaged(ROWS[0]).map(_lines)
    return [
        Target(
            "dataset json", json_rows | text_files(json.dumps(ROWS[1])), file_reader("d.json", use)
        ),
        Target(
            "dataset csv",
            text_files("text,image\na b c,a.png\n", 'text\n"a, b"\n'),
            file_reader("d.csv", use),
        ),
        Target("dataset state", damaged(STATE).map(written), lambda work, data: _saved(work, data)),
        Target(
            "dataset jsonl",
            lines | text_files("\n".join(map(json.dumps, ROWS[0]))),
            file_reader("d.jsonl", use),
        ),
        Target("dataset arrow", damaged_bytes(arrow()), file_reader("d.arrow", first_samples)),
        Target(
            "dataset parquet", damaged_bytes(*parquet()), file_reader("d.parquet", first_samples)
        ),
    ]


def first_samples(path: Path) -> None:
    for rows in load_rows(str(path)):
        for i in range(min(3, len(rows))):
            rows.sample(i)


def _saved(work: Path, state: bytes) -> None:
    """A folder of `save_to_disk` whose list of files is damaged."""
    folder = work / "given" / "saved"
    folder.mkdir(exist_ok=True)
    (folder / "data.arrow").write_bytes(arrow())
    (folder / "state.json").write_bytes(state)
    first_samples(folder)


def arrow() -> bytes:
    import pyarrow

    sink, table = io.BytesIO(), pyarrow.table({"text": ["a b", "c"]})
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _lines(rows: Any) -> bytes:
    return b"\n".join(map(written, rows if isinstance(rows, list) else [rows]))


def parquet() -> list[bytes]:
    import pyarrow
    import pyarrow.parquet

    made = []
    for columns in (
        {"text": ["a b", "c"]},
        {"text": ["x"], "image": [{"bytes": picture("PNG"), "path": "a.png"}]},
    ):
        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(columns), sink)
        made.append(sink.getvalue())
    return made


def recipes() -> list[Target]:
    def use(path: Path) -> None:
        from_mapping(read(path), "recipe file")

    plain = damaged(
        {
            "model": "demo",
            "bits": 4,
            "ignore": ["lm_head"],
            "layer_config": {"a": {"bits": 8}},
            "lr": 0.1,
        }
    )
    modifiers = damaged(MODIFIERS).map(written)
    laughs = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{n}: &{n} [{','.join(['*' + p] * 9)}]\n"
        for p, n in zip("abcdefgh", "bcdefghi", strict=True)
    )
    odd = [
        "2024-99-99",
        "bits: 0x",
        "a: 1:99:99",
        "? [a]\n: b",
        "!!int x",
        "!!python/name:os.system",
        "a: &a {b: *a}",
        laughs,
    ]
    yaml = (
        text_files(YAML, json.dumps(MODIFIERS), *odd)
        | modifiers
        | plain.map(written)
        | st.sampled_from(odd).map(str.encode)
    )
    return [
        Target(
            "recipe toml",
            text_files(TOML, "a = " + "[" * 3000, "lr = 1" + "0" * 5000),
            file_reader("r.toml", use),
        ),
        Target("recipe yaml", yaml, file_reader("r.yaml", use)),
    ]


def chat_templates() -> Target:
    tokenizer = copy.deepcopy(load_processor(DEMO).tokenizer)
    turns = parse_messages(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    )
    seeds = [
        tokenizer.chat_template or "",
        "{% for m in messages %}{{ m['role'] }}: {{ m.content }}\n{% endfor %}",
        *("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}",
            "{{ 'a' * 100000 }}"),
        *("{{ cycler.__init__.__globals__ }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{{ 1 / 0 }}"),
        *("{{ messages[9].x.y }}", "{% include '/etc/hostname' %}", "{{ range(10**9) }}",
            "{{ lipsum(n=1000) }}"),
    ]  # fmt: skip

    def use(_: Path, data: bytes) -> None:
        tokenizer.chat_template = data.decode("utf-8", "replace")
        render(turns, Template(), tokenizer)

    inputs = text_files(*seeds) | st.sampled_from(seeds).map(str.encode)
    return Target("chat template", inputs, use, (UserError, TemplateError))


def make_readers(work: Path) -> dict[str, Target]:
    """All readers by name; their folders and seeds are made below the working folder."""
    made = [
        templates(),
        messages(),
        *datasets(work),
        *recipes(),
        *all_media(work),
        chat_templates(),
        *checkpoints(work),
        *gguf_files(work),
    ]
    return {reader.name: reader for reader in made}
