"""The readers that the fuzzer feeds, each with seeds of its own kind: small files that are right,
to be damaged."""

import copy
import io
import json
import shutil
import struct
import wave
from collections.abc import Callable
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzz_inputs import VALUES, WORDS, Target, damaged, damaged_bytes, text_files, written
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from PIL import Image
from safetensors.torch import save
from transformers import LlamaConfig, LlamaForCausalLM

from auto_mmround.calibration import media, samples
from auto_mmround.calibration.datasets import load_rows
from auto_mmround.calibration.processor import render
from auto_mmround.calibration.roots import MEDIA, MediaError, parse_roots
from auto_mmround.calibration.template import Template, parse_messages, read_template, shipped
from auto_mmround.checkpoint.loader import from_quantized
from auto_mmround.checkpoint.reading import dequantized_state_dict
from auto_mmround.errors import UserError
from auto_mmround.export.gguf import read as gguf
from auto_mmround.model.loading import DEMO, load_processor, read_config, skeleton
from auto_mmround.recipe.files import read
from auto_mmround.recipe.recipe import Recipe, from_mapping
from auto_mmround.run import job as jobs
from auto_mmround.verify import static

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


def file_reader(name: str, read: Callable[[Path], object]) -> Callable[[Path, bytes], object]:
    """Writes the input under a name in the given folder and reads it."""

    def one(work: Path, data: bytes) -> object:
        path = work / "given" / name
        path.write_bytes(data)
        return read(path)

    return one


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


PARTICULAR = ("XBM", "MSP", "BLP", "SPIDER")  # written from other modes only


def picture(kind: str, size: tuple[int, int] = (16, 12), **options: Any) -> bytes:
    sink = io.BytesIO()
    pixels = np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(size[1], size[0], 3)
    Image.fromarray(pixels).save(sink, kind, **options)
    return sink.getvalue()


def sounds() -> list[bytes]:
    import soundfile

    sink, made = io.BytesIO(), []
    with wave.open(sink, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(800))
    for kind in ("FLAC", "OGG", "AIFF", "AU"):
        other = io.BytesIO()
        soundfile.write(other, np.sin(np.arange(400) / 9).astype(np.float32), 8000, format=kind)
        made.append(other.getvalue())
    return [sink.getvalue(), *made]


def film() -> list[bytes]:
    import av

    made = []
    for kind, codec in (
        ("mp4", "mpeg4"),
        ("matroska", "mpeg4"),
        ("avi", "mpeg4"),
        ("mpegts", "mpeg2video"),
    ):
        sink = io.BytesIO()
        with av.open(sink, "w", format=kind) as file:
            stream = file.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            for i in range(10):
                pixels = np.full((32, 32, 3), i * 20, np.uint8)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            file.mux(stream.encode())
        made.append(sink.getvalue())
    return [
        *made,
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n",
        b"ffconcat version 1.0\nfile 'secret'\n",
    ]


def all_media(work: Path) -> list[Target]:
    (work / "outside" / "secret").write_bytes(picture("PNG"))
    (work / "given" / "link.png").symlink_to(work / "outside" / "secret")
    roots, accepted = parse_roots(work / "given"), (UserError, MediaError)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "text"
    Image.init()
    images = [
        picture(kind)
        for kind in media.IMAGE_FORMATS
        if kind in Image.SAVE and kind not in PARTICULAR
    ]
    images.append(picture("JPEG", exif=exif))

    def by(kind: str) -> Callable[[Path], object]:
        return lambda path: media.load(path.name, kind, roots)

    readers = [Target("image", damaged_bytes(*images), file_reader("m.img", by("image")), accepted)]
    for kind, make, package in (("audio", sounds, "soundfile"), ("video", film, "av")):
        try:
            readers.append(
                Target(kind, damaged_bytes(*make()), file_reader(f"m.{kind}", by(kind)), accepted)
            )
        except ImportError:
            print(f"{kind}: left out, the package {package} is not installed")
    names = (
        st.sampled_from(
            [*WORDS, "a.png", "link.png", "../outside/secret", str(work / "outside" / "secret")]
        )
        | st.text()
    )
    entry = (
        VALUES
        | names
        | st.builds(dict, path=names)
        | st.builds(lambda a, r: {"array": a, "sampling_rate": r}, VALUES, VALUES)
    )
    pairs = st.tuples(entry, st.sampled_from(MEDIA))
    return [
        *readers,
        Target("media names", pairs, lambda _, pair: media.load(pair[0], pair[1], roots), accepted),
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


def tiny_checkpoints(work: Path) -> tuple[Path, dict[str, Path]]:
    """A random Llama of two layers, and its exports by format."""
    options = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    source = work / "source"
    LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=1, **options)).save_pretrained(
        source
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, source)
    names = ["auto_round", "auto_gptq", "auto_awq", "compressed_tensors", "mlx"]
    recipe = Recipe(
        model=str(source),
        iters=0,
        device="cpu",
        group_size=32,
        format=",".join(names),
        output_dir=str(work / "made"),
    )
    return source, dict(
        zip(names, jobs.run(jobs.prepare(recipe, jobs.load_model(recipe))), strict=True)
    )


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def checkpoints(work: Path) -> list[Target]:
    source, made = tiny_checkpoints(work)
    small = save({"a": torch.zeros(4, 4), "b": torch.ones(3, dtype=torch.int64)})
    head, body = header_of(small)
    headers = (
        damaged(head).map(written).map(lambda text: struct.pack("<Q", len(text)) + text + body)
    )
    shard = work / "given" / "model.safetensors"

    def weights(work: Path, data: bytes) -> None:
        (work / "given" / "config.json").write_text("{}")
        shard.write_bytes(data)
        list(dequantized_state_dict(work / "given"))

    def index(work: Path, data: bytes) -> None:
        folder = _fresh(work, source)
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        (folder / "model.safetensors.index.json").write_bytes(data)
        list(dequantized_state_dict(folder))

    def config(work: Path, data: bytes) -> None:
        folder = _fresh(work, source)
        (folder / "config.json").write_bytes(data)
        skeleton(read_config(folder), folder)

    def subject(work: Path, change: tuple[str, str, bytes]) -> None:
        static.check(_broken(work, made, change))

    def load(work: Path, change: tuple[str, str, bytes]) -> None:
        from_quantized(_broken(work, made, change))

    tensors = list(header_of((source / "model.safetensors").read_bytes())[0])
    maps = {
        "metadata": {"total_size": 1},
        "weight_map": dict.fromkeys(tensors[1:], "model-1.safetensors"),
    }
    plain = json.loads((source / "config.json").read_text())
    demo = json.loads((DEMO / "config.json").read_text())
    files = st.sampled_from(sorted(made)).flatmap(lambda name: _file_of(name, made[name]))
    return [
        Target("safetensors", headers | damaged_bytes(small), weights),
        Target("index", damaged(maps).map(written) | text_files(json.dumps(maps)), index),
        Target(
            "config.json", damaged(plain, demo).map(written) | text_files(json.dumps(plain)), config
        ),
        Target("verify", files, subject),
        Target("eval", files, load),
    ]


def gguf_files(work: Path) -> list[Target]:
    """A file of the demo model; none without the package gguf."""
    if not find_spec("gguf"):
        print("gguf: left out, the package gguf is not installed")
        return []
    recipe = Recipe(
        model="demo",
        iters=0,
        device="cpu",
        bits=8,
        group_size=32,
        format="gguf:q8_0",
        output_dir=str(work / "gguf"),
    )
    (folder,) = jobs.run(jobs.prepare(recipe, jobs.load_model(recipe)))
    # The file that is read first: a damaged one behind it might never be reached.
    file = (
        folder / json.loads((folder / "config.json").read_text())["quantization_config"]["files"][0]
    )

    def use(_: Path, data: bytes) -> None:
        file.write_bytes(data)
        list(islice(dequantized_state_dict(folder), 10))

    return [Target("gguf", damaged_bytes(file.read_bytes()), use, patience=1.5 * gguf.HEAD_SECONDS)]


def _file_of(name: str, folder: Path) -> st.SearchStrategy[tuple[str, str, bytes]]:
    """(format, file, its damaged content) for one of the files that are read; settings more often
    than weights."""
    found = []
    for file in (
        "config.json",
        "config.json",
        "quantization_config.json",
        "run.json",
        "tokenizer_config.json",
    ):
        if (folder / file).is_file():
            content = json.loads((folder / file).read_text())
            inner = content.get("quantization_config")
            seeds = damaged(content).map(written)
            if inner:
                seeds |= damaged(inner).map(
                    lambda v, whole=content: written({**whole, "quantization_config": v})
                )
            found.append(st.tuples(st.just(name), st.just(file), seeds))
    weights = (folder / "model.safetensors").read_bytes()
    head, body = header_of(weights)
    headers = (
        damaged(head).map(written).map(lambda text: struct.pack("<Q", len(text)) + text + body)
    )
    found.append(
        st.tuples(st.just(name), st.just("model.safetensors"), headers | damaged_bytes(weights))
    )
    return st.one_of(found)


def _fresh(work: Path, source: Path) -> Path:
    folder = work / "given" / "model"
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(source, folder))


def _broken(work: Path, made: dict[str, Path], change: tuple[str, str, bytes]) -> Path:
    name, file, data = change
    folder = _fresh(work, made[name])
    (folder / file).write_bytes(data)
    return folder


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
