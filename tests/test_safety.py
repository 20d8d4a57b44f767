"""What docs/security.md promises about files that others wrote, beside media (test_media,
test_fetch)."""

import ast
import gzip
import json
import re
import shutil
import socket
import struct
import sys
import time
import zipfile
from pathlib import Path

import datasets as hf
import pytest
import torch
from rows import load_samples
from safetensors.torch import save_file
from transformers import Mamba2Config

from auto_mmround import cli, untrusted
from auto_mmround.calibration import (
    datasets,
    fetch,
    folders,
    media,
    processor,
    roots,
    samples,
    tables,
    template,
)
from auto_mmround.calibration.datasets import load_rows
from auto_mmround.calibration.hub import check_origin
from auto_mmround.calibration.processor import render
from auto_mmround.calibration.template import Template, parse_messages
from auto_mmround.checkpoint.folder import write_side_files
from auto_mmround.checkpoint.loader import from_quantized
from auto_mmround.checkpoint.reading import dequantized_state_dict, read_checkpoint
from auto_mmround.errors import UserError
from auto_mmround.export.gguf import read as gguf
from auto_mmround.model import loading
from auto_mmround.model.loading import DEMO, load, load_processor, read_config, skeleton
from auto_mmround.recipe import files
from auto_mmround.recipe.files import read
from auto_mmround.recipe.recipe import Recipe, from_mapping
from auto_mmround.run import job as jobs
from auto_mmround.verify import static
from auto_mmround.verify.verify import verify

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "torch.load", "torch.jit.load", "pickle.load", "pickle.loads", "joblib.load", "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load", "marshal.loads", "shelve.open", "eval", "exec", "os.system", "os.popen",
}  # fmt: skip


def calls(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def sources():
    return [
        path
        for room in ("auto_mmround", "processors", "scripts", "bench")
        for path in (ROOT / room).rglob("*.py")
    ]


def test_nothing_loads_pickle_or_runs_text():
    for path in sources():
        for name, node in calls(path):
            assert name not in FORBIDDEN, f"{path}:{node.lineno}"
            for keyword in node.keywords:
                given = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                wrong = (
                    keyword.arg in ("trust_remote_code", "allow_pickle", "shell") and given is True
                )
                assert not wrong, f"{path}:{node.lineno} {keyword.arg}=True"


@pytest.fixture
def model(tmp_path):
    """A copy of the demo model to be spoilt."""
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# -------------------------------------------------------------------------------------------------
# code in a model


@pytest.mark.parametrize(
    "reader", [load, lambda f: from_quantized(f), lambda f: skeleton(read_config(f), f)]
)
def test_code_in_a_model_does_not_run_unasked(model, tmp_path, reader):
    """Also where Transformers sees no need to ask: it knows the configuration, only the model's
    class is remote."""
    mark = tmp_path / "ran"
    (model / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Evil: pass\n")
    edit(
        model / "config.json",
        architectures=["Nothing"],
        auto_map={"AutoModelForCausalLM": "evil.Evil"},
    )
    with pytest.raises(UserError, match="--trust_remote_code"):
        reader(model if reader is not load else str(model))
    static.check(model)
    assert not mark.exists()


@pytest.mark.parametrize("file", ["processor_config.json", "tokenizer_config.json"])
def test_code_of_a_processor_or_tokenizer_does_not_run_unasked(model, tmp_path, file):
    mark = tmp_path / "ran"
    (model / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Evil: pass\n")
    if not (model / file).is_file():
        (model / file).write_text("{}")
    kinds = {"AutoProcessor": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    edit(model / file, auto_map=kinds, processor_class="Evil", tokenizer_class="Evil")
    try:
        load(str(model))
    except UserError as error:
        assert "\n" not in str(error)
    assert not mark.exists()


@pytest.mark.parametrize(
    "name",
    ["AutoTokenizer", "Trainer", "pipeline", "PreTrainedModel.from_pretrained", "logging", 5],
)
def test_only_model_classes_are_called(model, name):
    edit(model / "config.json", architectures=[name])
    with pytest.raises(UserError, match=r"unknown to transformers|Validation|config"):
        skeleton(read_config(model), model)


@pytest.mark.parametrize("stated", [2, "LlamaForCausalLM", {"LlamaForCausalLM": 1}])
def test_architectures_that_are_no_list_are_refused(model, stated):
    edit(model / "config.json", architectures=stated)
    with pytest.raises(UserError):
        skeleton(read_config(model), model)


def test_depth_of_a_model_is_bounded(model):
    config = json.loads((model / "config.json").read_text())
    config["vision_config"]["depth"] = 10**9
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"depth = 1000000000, which no model has"):
        read_config(model)
    assert any("depth" in finding.message for finding in static.check(model))


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), {"__float__": "NaN"}, [float("nan")]]
)
def test_numbers_of_a_configuration_are_finite(model, value):
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = value
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"rms_norm_eps = .*(nan|inf)\]?, which no model has"):
        read_config(model)
    (finding,) = [each for each in static.check(model) if each.where == "config.json"]
    assert finding.severity == "error" and "rms_norm_eps" in finding.message


def test_bounds_of_a_configuration_may_be_infinite(tmp_path):
    Mamba2Config().save_pretrained(tmp_path)
    assert "Infinity" in (tmp_path / "config.json").read_text()
    assert read_config(tmp_path).time_step_limit == [0.0, float("inf")]


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 0}, {"num_hidden_layers": -1}, {"num_attention_heads": 0}]
)
def test_a_folder_of_which_no_model_can_be_built_is_wrong(model, changes):
    """Whatever was asked: findings, and engines that are not asked."""
    config = json.loads((model / "config.json").read_text())
    config["text_config"] |= changes
    (model / "config.json").write_text(json.dumps(config))
    for engines in (None, ["transformers"]):
        found = verify(model, engines)
        assert not found.right
        assert all(v.status == "not run" and v.reason for v in found.verdicts)


def test_a_configuration_without_sense_is_one_line(model):
    edit(model / "config.json", pad_token_id=[], architectures=["Qwen2VLForConditionalGeneration"])
    with pytest.raises(UserError) as caught:
        load(str(model))
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------------
# weight files


def lying(header, body=b"\0" * 16):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
LIES = {
    "a header longer than the file": struct.pack("<Q", 2**62) + b"{}",
    "a header of 4 GB": struct.pack("<Q", 2**32) + b"{}" * 100,
    "a shape that is too large": lying({"a": {**ENTRY, "shape": [2**40, 2**40]}}),
    "a negative shape": lying({"a": {**ENTRY, "shape": [-2]}}),
    "data behind the end": lying({"a": {**ENTRY, "shape": [2**20], "data_offsets": [0, 2**22]}}),
    "overlapping tensors": lying({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, b"\0" * 12),
    "a hole": lying({"a": ENTRY, "b": {**ENTRY, "data_offsets": [12, 20]}}, b"\0" * 20),
    "data backwards": lying({"a": {**ENTRY, "data_offsets": [8, 0]}}),
    "an unknown dtype": lying({"a": {**ENTRY, "dtype": "PICKLE"}}, b"\0" * 8),
    "a header that is no JSON": lying(b"\xff\xfe{"),
    "a header nested deep": lying(b"[" * 100_000),
    "nothing": b"",
}


@pytest.mark.parametrize("lie", LIES)
def test_safetensors_headers_that_lie(model, lie):
    (model / "model.safetensors").write_bytes(LIES[lie])
    for read_it in (lambda: list(dequantized_state_dict(model)), lambda: load(str(model))):
        with pytest.raises(UserError) as caught:
            read_it()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert any(finding.severity == "error" for finding in static.check(model))


def test_pickled_weights_are_not_read(model, tmp_path):
    torch.save({"a": torch.zeros(1)}, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    for read_it in (lambda: load(str(model)), lambda: read_checkpoint(model)):
        with pytest.raises(UserError, match="safetensors"):
            read_it()


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "{outside}",
        "sub/x.safetensors",
        "gone.safetensors",
        "x.bin",
        5,
        ["a"],
        "",
        "..\\x",
    ],
)
def test_an_index_names_files_of_its_folder_only(model, tmp_path, shard):
    save_file({"a": torch.zeros(2)}, tmp_path / "outside.safetensors")
    shard = (
        shard.replace("{outside}", str(tmp_path / "outside.safetensors"))
        if isinstance(shard, str)
        else shard
    )
    (model / untrusted.INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    for read_it in (lambda: load(str(model)), lambda: read_checkpoint(model)):
        with pytest.raises(UserError, match=r"not in the folder|no safetensors file of the folder"):
            read_it()
    assert any(finding.where == untrusted.INDEX for finding in static.check(model))


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": None}, "x"])
def test_an_index_of_another_form(model, index):
    (model / untrusted.INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"weight_map|no object"):
        read_checkpoint(model)


def test_gguf_files_are_of_the_folder(model):
    with pytest.raises(UserError, match="not in the folder"):
        gguf._files({"quantization_config": {"files": ["../other.gguf"]}}, model)


@pytest.mark.parametrize("damage", ["magic", "version", "count", "cut", "empty"])
def test_damaged_gguf_files_are_one_line(tmp_path, damage):
    pytest.importorskip("gguf")
    recipe = Recipe(
        model="demo",
        iters=0,
        device="cpu",
        format="gguf:q8_0",
        bits=8,
        group_size=32,
        output_dir=str(tmp_path),
    )
    (folder,) = jobs.run(jobs.prepare(recipe, jobs.load_model(recipe)))
    (file,) = folder.glob("model-*.gguf")
    data = bytearray(file.read_bytes())
    spoil = {
        "magic": (0, 4),
        "version": (4, 8),
        "count": (16, 24),
        "cut": (1000, len(data)),
        "empty": (0, len(data)),
    }
    first, last = spoil[damage]
    data[first:last] = b"" if damage in ("cut", "empty") else b"\xfe" * (last - first)
    file.write_bytes(data)
    with pytest.raises(UserError, match="cannot be read") as caught:
        list(dequantized_state_dict(folder))
    assert "\n" not in str(caught.value)


def test_a_gguf_head_that_never_ends_is_given_up(tmp_path, monkeypatch):
    """A list of 2**24 bytes in the head: the reader looks at them one by one."""
    pytest.importorskip("gguf")
    monkeypatch.setattr(gguf, "HEAD_SECONDS", 0.5)
    shutil.copy(DEMO / "config.json", tmp_path)
    edit(
        tmp_path / "config.json", quantization_config={"quant_method": "gguf", "files": ["x.gguf"]}
    )
    key = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 0, 2**24)  # a list of uint8
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + bytes(2**24))
    with pytest.raises(UserError, match="its head alone takes more than"):
        list(dequantized_state_dict(tmp_path))


def test_links_out_of_a_model_are_not_copied(model, tmp_path):
    """Else a model's folder could carry the user's own files into what the user publishes."""
    (tmp_path / "id_rsa").write_text("secret")
    (model / "notes.txt").symlink_to(tmp_path / "id_rsa")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="link out of the model's folder"):
        write_side_files(model, tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


def test_links_of_the_hubs_cache_are_copied(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to(Path("..", "..", "blobs", "abc"))
    (tmp_path / "out").mkdir()
    assert write_side_files(snapshot, tmp_path / "out") == ["tokenizer.json"]
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()


@pytest.mark.parametrize(
    "quantization",
    [
        [], 5, {"quant_method": "gptq", "bits": "4"}, {"quant_method": ["gptq"]},
        {"quant_method": "gptq", "bits": 4, "group_size": 0, "sym": True, "desc_act": False},
        {"quant_method": "gptq", "bits": 10**9, "group_size": 128, "sym": True, "desc_act": False},
        {"quant_method": "compressed-tensors", "format": "x",
            "config_groups": {"g": {"targets": "Linear"}}},
        {"quant_method": "compressed-tensors", "format": "x", "config_groups": [1]},
        {"quant_method": "compressed-tensors", "format": "x", "config_groups": {},
            "ignore": ["re:("]},
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False,
            "dynamic": {"+:(": {}}},
    ],
)  # fmt: skip
def test_quantization_configs_of_no_known_form(model, quantization):
    edit(model / "config.json", quantization_config=quantization)
    with pytest.raises(UserError, match="quantization"):
        list(dequantized_state_dict(model))
    findings = static.check(model)
    assert any("quantization_config" in finding.where + finding.message for finding in findings)


def test_patterns_that_never_end_are_given_up(model, monkeypatch):
    """(a+)+ on a long name takes longer than the universe has; the name comes from the same
    folder."""
    monkeypatch.setattr("auto_mmround.export.formats.PATTERN_SECONDS", 0.3)
    monkeypatch.setattr(static, "PATTERN_SECONDS", 0.3)
    name = "a" * 60
    save_file(
        {f"{name}.weight_scale": torch.ones(1, 1), f"{name}.weight": torch.ones(1, 1)},
        model / "model.safetensors",
    )
    group = {
        "targets": ["re:(a+)+!"],
        "weights": {"num_bits": 4, "type": "int", "strategy": "channel"},
    }
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"g": group},
    }
    edit(model / "config.json", quantization_config=quantization)
    with pytest.raises(UserError, match="take too long"):
        list(dequantized_state_dict(model))
    assert any("take too long" in finding.message for finding in static.check(model))


# -------------------------------------------------------------------------------------------------
# text of others


TURNS = parse_messages(
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_processor(DEMO).tokenizer


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/hostname' %}",
        "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ range(10 ** 9) }}",
        "{% for",
    ],
)
def test_chat_templates_run_in_a_sandbox_and_fail_in_one_way(tokenizer, text):
    monkey = type(tokenizer).__new__(type(tokenizer))
    monkey.__dict__ = {**tokenizer.__dict__, "chat_template": text}
    try:
        found = render(TURNS, Template(), monkey).text
    except processor.TemplateError as error:
        assert str(error)
    else:  # Jinja writes nothing where the sandbox lets it see nothing
        assert found == ""


@pytest.mark.parametrize(
    "text, reason",
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "more than 0",
        ),
        ("{{ 'a' * 3000 }}", "more than 2,000 letters"),
    ],
)
def test_chat_templates_are_bounded(tokenizer, monkeypatch, text, reason):
    monkeypatch.setattr(processor, "CHAT_SECONDS", 0.4)
    monkeypatch.setattr(processor, "CHAT_LETTERS", 2000)
    own = type(tokenizer).__new__(type(tokenizer))
    own.__dict__ = {**tokenizer.__dict__, "chat_template": text}
    with pytest.raises(processor.TemplateError, match=reason):
        render(TURNS, Template(), own)


def test_a_template_is_filled_in_not_formatted():
    made = Template(format_user="{0.__class__} %s {{content}} {{content}}")
    assert (
        made.encode([{"role": "user", "content": "{{content}} {x.y}"}])
        == "{0.__class__} %s {{content}} {x.y} {{content}}"
    )


def test_a_template_names_no_file_of_code(tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UserError, match="unknown processor"):
        processor.get_processor(None, Template(processor=str(tmp_path / "evil.py")))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "{", "\ud800"])
@pytest.mark.parametrize("name", ["t.json", "d.json", "d.jsonl", "r.json"])
def test_odd_json_is_one_line(tmp_path, text, name):
    path = tmp_path / name
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    readers = {
        "t": template.read_template,
        "d": lambda p: load_samples(str(p)),
        "r": lambda p: from_mapping(read(p)),
    }
    with pytest.raises(UserError) as caught:
        readers[name[0]](path)
    assert "\n" not in str(caught.value)


def test_files_of_settings_have_a_largest_size(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text('{"a": "' + "x" * 200 + '"}')
    with pytest.raises(UserError, match="larger than"):
        untrusted.read_text(tmp_path / "a.json", "it", 100)


@pytest.mark.parametrize(
    "row", ["half \ud800", {"messages": [{"role": "user", "content": "half \ud800"}]}]
)
def test_half_a_character_spoils_a_sample_not_the_run(tmp_path, row):
    (tmp_path / "d.json").write_text(json.dumps([row]))
    with pytest.raises(datasets.BadSample, match="half a character"):
        load_samples(str(tmp_path / "d.json"))


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "name, text, reason",
    [
        ("r.yaml", LAUGHS, "more than 100,000 values"),
        ("r.yaml", "bits: &a [*a]", "more than 100,000 values"),
        ("r.yaml", "!!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("r.yaml", "bits: 2024-99-99", "month must be in"),
        ("r.toml", "lr = 1" + "0" * 5000, "digits"),
        ("r.toml", "a = " + "[" * 5000, "nested|recursion"),
        ("r.toml", "lr = nan", "no finite number"),
        ("r.toml", "lr = 1" + "0" * 400, "no finite number"),
        ("r.toml", 'ignore = ["re:("]', "no regular expression"),
        ("r.toml", '[layer_config."re:*"]\nbits = 8', "no regular expression"),
    ],
)
def test_recipes_that_are_none(tmp_path, name, text, reason):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=reason) as caught:
        from_mapping(read(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [{"input_ids": [1, [2, 3]]}, {"input_ids": "x"}, {"input_ids": [1, 2], "attention_mask": [1]}],
)
def test_rows_of_token_ids_that_are_none(tmp_path, row):
    (tmp_path / "d.json").write_text(json.dumps([row]))
    with pytest.raises(datasets.BadSample, match="input_ids"):
        load_samples(str(tmp_path / "d.json"))


@pytest.mark.parametrize("beside", ["x", ["x"], {"a": 1}, [1, [2]], 2**70])
def test_what_is_no_tensor_beside_token_ids_is_named(tmp_path, beside):
    (tmp_path / "d.json").write_text(json.dumps([{"input_ids": [1, 2, 3] * 20, "odd": beside}]))
    with pytest.raises(UserError, match="'odd' beside input_ids is no tensor"):
        samples.build(
            str(tmp_path / "d.json"), samples.Preparers(None), samples.Reading(1, seqlen=8)
        )


@pytest.mark.parametrize("turns", [-1, 0.5, True])
def test_turns_that_are_no_list_are_one_line(tmp_path, turns):
    row = {"messages": turns, "audio": {"array": [0.0], "sampling_rate": 8000}}
    (tmp_path / "d.json").write_text(json.dumps([row]))
    with pytest.raises(UserError) as caught:
        load_samples(str(tmp_path / "d.json"))
    assert "\n" not in str(caught.value)


ALIASES = "a: &a [x,x,x,x]\n" + "".join(
    f"{n}: &{n} [*{p},*{p},*{p},*{p}]\n" for p, n in zip("abcdefgh", "bcdefghi")
)
CARDS = {
    "plain": ("README.md", "---\nconfigs: [{{config_name: default, data_files: {place}}}]\n---\n"),
    "dashes inside": (
        "README.md",
        "---\nlicense: mit # ---\nconfigs:\n- config_name: x\n  data_files: {place}\n---\n",
    ),
    "yaml of its own": (
        ".huggingface.yaml",
        "configs:\n- config_name: default\n  data_files: {place}\n",
    ),
    "aliases": (
        "README.md",
        "---\n" + ALIASES + "configs: [{{config_name: default, data_files: *i}}]\n---\n",
    ),
    "no yaml": ("README.md", "---\n\t: [\n---\n"),
    "infos": (
        "dataset_infos.json",
        '{{"default": {{"splits": {{"train": {{"name": "../{place}"}}}}}}}}',
    ),
}


@pytest.mark.parametrize(
    "place", ["{outside}", "../outside.json", "http://127.0.0.1:9/x.json", "zip://a::http://b/c"]
)
@pytest.mark.parametrize("card", CARDS)
def test_a_card_leads_nowhere(tmp_path, monkeypatch, card, place):
    """Our own list of files is read, whatever the folder says of itself; nothing is connected to,
    and it is fast."""
    monkeypatch.setattr(socket, "socket", lambda *args, **options: pytest.fail("a connection"))
    (tmp_path / "outside.json").write_text(json.dumps([{"text": "secret"}]))
    for suffix in ("parquet", "jsonl"):
        folder = tmp_path / suffix
        (folder / "data").mkdir(parents=True)
        table = hf.Dataset.from_dict({"text": ["ok"]})
        getattr(table, "to_parquet" if suffix == "parquet" else "to_json")(
            folder / "data" / f"train-00000-of-00001.{suffix}"
        )
        name, text = CARDS[card]
        (folder / name).write_text(
            text.format(place=place.replace("{outside}", str(tmp_path / "outside.json")))
        )
        start = time.perf_counter()
        assert [sample.text for sample in load_samples(str(folder))] == ["ok"]
        assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    "name", ["x::http.parquet", "zip::y.parquet", "[a].parquet", "*.parquet", "a?b.parquet"]
)
def test_names_of_files_are_no_patterns_and_no_addresses(tmp_path, name):
    hf.Dataset.from_dict({"text": ["other"]}).to_parquet(tmp_path / "a.parquet")
    shutil.move(tmp_path / "a.parquet", tmp_path / name)
    assert [sample.text for sample in load_samples(str(tmp_path / name))] == ["other"]
    assert [sample.text for sample in load_samples(str(tmp_path))] == ["other"]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "txt", "parquet", "arrow", "csv", "jsonl.gz"])
def test_links_out_of_a_dataset_folder_are_not_read(tmp_path, suffix):
    (tmp_path / "secret").write_text("secret")
    for inner in ("", "data"):
        folder = tmp_path / f"copy{inner}"
        (folder / inner).mkdir(parents=True)
        (folder / inner / f"train.{suffix}").symlink_to(tmp_path / "secret")
        with pytest.raises(UserError, match="is a link out of its folder"):
            load_samples(str(folder))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "data").symlink_to(tmp_path)
    with pytest.raises(UserError, match="is a link out of its folder"):
        load_samples(str(tmp_path / "more"))


def test_a_dataset_folder_of_archives_is_refused(tmp_path):
    """Whatever their names: a Parquet file that is a zip is not unpacked either."""
    (tmp_path / "copy" / "data").mkdir(parents=True)
    (tmp_path / "copy" / "data" / "train.tar").write_bytes(bytes(10240))
    with pytest.raises(UserError, match=r"holds no .* \(1 \.tar\)"):
        load_samples(str(tmp_path / "copy"))
    for name in ("train.parquet", "train.arrow", "train.jsonl", "train.jsonl.gz"):
        with zipfile.ZipFile(tmp_path / name, "w") as file:
            file.writestr("a.jsonl", '{"text": "inside"}')
        with pytest.raises(UserError, match="can't be"):
            load_samples(str(tmp_path / name))


def test_what_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "DATASET_BYTES", 1 << 20)
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(b"x" * (2 << 20)))
    with pytest.raises(UserError, match="larger than 1 MiB"):
        load_samples(str(tmp_path / "x.txt.gz"))
    monkeypatch.setattr(tables, "HELD_BYTES", 1 << 10)
    hf.Dataset.from_dict({"text": ["x" * 100] * 5000}).to_parquet(tmp_path / "x.parquet")
    rows = load_rows(str(tmp_path / "x.parquet"))[0]  # kept in a temporary file
    assert len(rows) == 5000 and rows.sample(4999).text == "x" * 100
    monkeypatch.setattr(tables, "TABLE_BYTES", 1 << 14)
    with pytest.raises(UserError, match="more than 0 GiB"):
        load_rows(str(tmp_path / "x.parquet"))


@pytest.mark.parametrize(
    "place",
    [
        "/etc/passwd", "http://127.0.0.1:9/x", "hf://datasets/other/set@main/x.parquet",
        "hf://datasets/a/b@main/../../c", "zip://x::hf://datasets/a/b@main/x.zip",
    ],
)  # fmt: skip
def test_the_card_of_a_set_on_the_hub_names_files_of_its_own(place):
    """What the library has made of the card is looked at, not the card."""
    check_origin({"train": ["hf://datasets/a/b@main/x.parquet"]}, "a/b")
    with pytest.raises(UserError, match="not in the set: nothing is read"):
        check_origin({"train": ["hf://datasets/a/b@main/x.parquet", place]}, "a/b")


def test_a_key_with_two_values_is_refused(tmp_path):
    """Readers differ in which of them they take, so what was checked might not be what is used."""
    (tmp_path / "config.json").write_text('{"a": {"bits": 4, "bits": 8}, "b": 1, "b": 1}')
    with pytest.raises(UserError, match="'bits' stands in it twice"):
        untrusted.read_object(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"b": 1, "b": 1}')
    assert untrusted.read_object(tmp_path / "config.json") == {"b": 1}


def test_messages_for_the_terminal_are_one_plain_line(tmp_path, capsys):
    (tmp_path / "x.toml").write_text('"\\u001b[2J\\n\\u202e" = 1')
    assert cli.main([str(tmp_path / "x.toml")]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and shown.strip().isprintable()
    assert len(untrusted.one_line("x" * 10**6)) < 3000


# -------------------------------------------------------------------------------------------------
# the result


def test_a_run_that_is_there_is_not_overwritten_unless_asked(tmp_path, capsys):
    command = ["--model", "demo", "--iters", "0", "--output_dir", str(tmp_path), "--device", "cpu"]
    assert cli.main(command) == 0
    mark = tmp_path / "demo-w4g128-auto_round" / "mine.txt"
    mark.write_text("kept")
    capsys.readouterr()
    assert cli.main(command) == 2
    assert "--overwrite" in capsys.readouterr().err and mark.read_text() == "kept"
    assert cli.main([*command, "--overwrite"]) == 0
    assert not mark.exists()


def test_defaults_are_the_safe_ones():
    found = Recipe()
    assert (found.trust_remote_code, found.allow_url, found.overwrite) == (False, False, False)


def test_the_bounds_in_the_documentation_are_those_of_the_code():
    page = (ROOT / "docs" / "security.md").read_text()
    rows = re.findall(r"\| `(\w+)\.(\w+)` \| ([^|]+) \|", page)
    rooms = {"folders": folders, "tables": tables,
             "media": media, "roots": roots, "fetch": fetch, "untrusted": untrusted,
             "processor": processor,
             "template": template,
             "recipe": files, "loading": loading, "gguf": gguf,
             "formats": sys.modules["auto_mmround.export.formats"]}  # fmt: skip
    assert len(rows) >= 15
    for room, name, text in rows:
        assert str(getattr(rooms[room], name)) == text.strip(), f"{room}.{name}"


def test_a_limit_is_raised_again_where_python_dropped_it(monkeypatch):
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)

    class Dropping:
        def __del__(self):
            deadline = time.monotonic() + 0.5
            # the first alarm comes here, and Python drops what finalizers raise
            while time.monotonic() < deadline:
                pass

    with pytest.raises(untrusted.TooLong), untrusted.time_limit(0.1):
        held = Dropping()
        del held
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            pass
    assert not printed and sys.unraisablehook == printed.append


def test_a_limit_is_of_work_and_not_of_the_clock():
    """A busy machine once made the head of a right GGUF file of 150,000 words "too long"."""
    with untrusted.time_limit(0.2):
        time.sleep(1)
    with pytest.raises(untrusted.TooLong), untrusted.time_limit(0.1):
        time.sleep(untrusted.PATIENCE * 0.1 + 2)
