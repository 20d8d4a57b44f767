"""Folders as people upload them: old processor files, pickled weights beside, no generation
settings, several configurations, code of their own."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, Tiny, conversation, tiny_tokenizer
from tiny_processors import eyes, words
from transformers import (
    CLIPImageProcessor,
    LlavaProcessor,
    MllamaImageProcessor,
    MllamaProcessor,
    Qwen2VLProcessor,
)

from auto_mmround import cli
from auto_mmround.checkpoint.loader import from_quantized
from auto_mmround.verify import static

MARKS = dict(image_token="<|image_pad|>", video_token="<|video_pad|>",
             vision_bos_token="<|vision_start|>", vision_eos_token="<|vision_end|>")  # fmt: skip


def llava():
    picture = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return LlavaProcessor(picture, words(image_token="<image>"), patch_size=4,
                          vision_feature_select_strategy="default", image_token="<image>",
                          num_additional_image_tokens=1)  # fmt: skip


def mllama():
    size = {"height": 16, "width": 16}
    return MllamaProcessor(MllamaImageProcessor(size=size, max_image_tiles=2),
                           words(image_token="<|image|>"))  # fmt: skip


def qwen():
    return Qwen2VLProcessor(**eyes(), tokenizer=words(**MARKS))


PROCESSORS = {"qwen2_vl": qwen, "llava": llava, "mllama": mllama}
FIVE = ("qwen2_vl", "llava", "phi3_v", "cogvlm2", "mllama")


def uploaded(name: str, folder: Path) -> Path:
    """As of the year of the family: one `preprocessor_config.json`, weights in two forms."""
    FAMILIES[name].save(folder, tiny_tokenizer())
    if name in PROCESSORS:
        made = PROCESSORS[name]()
        made.image_processor.save_pretrained(folder)
        made.tokenizer.save_pretrained(folder)
        old = json.loads((folder / "preprocessor_config.json").read_text())
        old["processor_class"] = type(made).__name__
        (folder / "preprocessor_config.json").write_text(json.dumps(old))
        (folder / "processor_config.json").unlink(missing_ok=True)
    return littered(folder)


def littered(folder: Path) -> Path:
    """With what else lies in such folders, and without generation settings."""
    (folder / "generation_config.json").unlink(missing_ok=True)
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model-00001-of-00002.bin")
    torch.save({"a": torch.zeros(1)}, folder / "training_args.bin")
    index = {"metadata": {}, "weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "params.json").write_text('{"dim": 64}')
    (folder / "mel_filters.npz").write_bytes(b"PK")
    (folder / "original").mkdir()
    (folder / "original/params.json").write_text('{"dim": 64}')
    (folder / "original/consolidated.00.pth").write_bytes(b"x")
    (folder / "configs").mkdir()
    (folder / "configs/config.json").write_text('{"model_type": "other"}')
    (folder / "tokenizer.model.v3").write_bytes(b"v3")
    (folder / "examples").mkdir()
    Image.new("RGB", (9, 9)).save(folder / "examples/one.png")
    return folder


def rows(folder: Path) -> Path:
    found = []
    for i in range(4):
        row = conversation(i)
        row["image"].save(folder / f"{i}.png")
        found.append(row | {"image": f"{i}.png"})
    (folder / "rows.json").write_text(json.dumps(found))
    return folder / "rows.json"


@pytest.mark.parametrize("towers", ["", "--quant_nontext_module"])
@pytest.mark.parametrize("name", FIVE)
def test_the_five_families_of_the_original(name, towers, tmp_path):
    model = uploaded(name, tmp_path / "model")
    words = ["--model", str(model), "--dataset", str(rows(tmp_path)), "--output_dir"]
    options = "--iters 1 --nsamples 4 --seqlen 400 --group_size 32 --device cpu --disable_amp"
    code = "--trust_remote_code" if FAMILIES[name].standin else ""
    out = tmp_path / "out"
    assert cli.main([*words, str(out), *f"{options} {code} {towers}".split()]) == 0
    (folder,) = out.iterdir()
    found = static.check(folder, model, remote_code=bool(code))
    assert [f for f in found if "no chat template" not in f.message] == []
    for file in ("params.json", "configs/config.json", "original/params.json", "mel_filters.npz",
                 "tokenizer.model.v3", "examples/one.png"):  # fmt: skip
        assert (folder / file).read_bytes() == (model / file).read_bytes(), file
    code_files = {path.name for path in model.glob("*.py")}
    assert code_files == {path.name for path in folder.glob("*.py")}
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pth")]
    from_quantized(folder, remote_code=bool(code))


def only_pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def half_copied(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [f"model-{i}-of-00002.safetensors" for i in ("00001", "00002")]
    save_file(dict(list(tensors.items())[::2]), folder / files[0], {"format": "pt"})
    written(folder, {key: files[i % 2] for i, key in enumerate(tensors)})


def index_without_shards(folder):
    written(folder, dict.fromkeys(load_file(folder / "model.safetensors"), "old-1.safetensors"))


def written(folder, weight_map):
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def half_an_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"metadata": {')


# What is wrong with a folder -> what the one line says.
BROKEN = {
    only_pickled: "no .safetensors weights, others are not read",
    half_copied: "'model-00002-of-00002.safetensors', which is not in the folder",
    index_without_shards: "remove the index if model.safetensors is newer",
    half_an_index: "model.safetensors.index.json is not valid JSON",
}


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("name", FIVE)
def test_a_folder_that_is_not_whole_is_one_line(name, fault, tmp_path, capsys):
    model = uploaded(name, tmp_path / "model")
    fault(model)
    code = ["--trust_remote_code"] if FAMILIES[name].standin else []
    words = ["--model", str(model), "--iters", "0", "--group_size", "32", *code]
    for command in (["plan"], ["--output_dir", str(tmp_path / "out")]):
        assert cli.main([*command, *words]) == 2
        assert BROKEN[fault] in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stream", ["--no_stream", "--stream"])
@pytest.mark.parametrize("name", FIVE)
def test_an_old_index_beside_the_weights_is_left_behind(name, stream, tmp_path):
    """Its shard is there, from before the weights were made anew: neither is read, or copied."""
    model = uploaded(name, tmp_path / "model")
    new = load_file(model / "model.safetensors")
    save_file({k: v + 1 for k, v in new.items()}, model / "old-1.safetensors", {"format": "pt"})
    written(model, dict.fromkeys(new, "old-1.safetensors"))
    code = ["--trust_remote_code"] if FAMILIES[name].standin else []
    words = ["--model", str(model), "--iters", "0", "--group_size", "32", "--format", "fake"]
    assert cli.main([*words, stream, *code, "--output_dir", str(tmp_path / "out")]) == 0
    (folder,) = (tmp_path / "out").iterdir()
    assert [p.name for p in folder.glob("*.safetensors*")] == ["model.safetensors"]
    after = load_file(folder / "model.safetensors")
    assert after.keys() == new.keys()
    assert all((after[key] - new[key]).abs().max() < 0.5 for key in new)


OLD_KEYS = {
    "llava": {"feature_extractor_type": "CLIPFeatureExtractor", "size": 16, "crop_size": 16,
              "image_processor_type": None},
    "qwen2_vl": {"min_pixels": 64, "max_pixels": 1024, "size": None},
    "mllama": {"feature_extractor_type": "MllamaImageProcessor", "do_pad": True},
}  # fmt: skip


@pytest.mark.parametrize("name", OLD_KEYS)
def test_old_keys_of_a_processor(name, tmp_path):
    """Sizes as plain numbers, and the name that feature extractors had."""
    model = uploaded(name, tmp_path / "model")
    path = model / "preprocessor_config.json"
    known = json.loads(path.read_text()) | OLD_KEYS[name]
    path.write_text(json.dumps({key: value for key, value in known.items() if value is not None}))
    before = path.read_bytes()
    words = ["--model", str(model), "--dataset", str(rows(tmp_path)), "--output_dir"]
    options = "--iters 1 --nsamples 4 --seqlen 400 --group_size 32 --device cpu --disable_amp"
    assert cli.main([*words, str(tmp_path / "out"), *options.split()]) == 0
    (folder,) = (tmp_path / "out").iterdir()
    assert (folder / "preprocessor_config.json").read_bytes() == before
    assert static.check(folder, model) == []


OUTDATED = {
    "a package that is not there": ("import torch\n", "import torch\nimport no_such_package_x\n"),
    "a name that is gone": ("import torch\n", "import torch\nfrom torch import no_such_name_x\n"),
    "no Python": ("import torch\n", "import torch\ndef (\n"),
    "a method that is gone": ("    def forward(", "    def forward(self, *_, **__):\n"
                              "        return self.no_such_method_x()\n\n    def forward_(",),
}  # fmt: skip


@pytest.mark.parametrize("fault", OUTDATED)
def test_code_for_another_version_is_one_line(fault, tmp_path, capsys):
    FAMILIES["phi3_v"].save(tmp_path / "model", tiny_tokenizer())
    (code,) = (tmp_path / "model").glob("phi3_v*.py")
    old, new = OUTDATED[fault]
    code.write_text(code.read_text().replace(old, new))
    words = ["--model", str(tmp_path / "model"), "--dataset", str(rows(tmp_path)), "--output_dir"]
    options = "--iters 1 --nsamples 4 --group_size 32 --device cpu --trust_remote_code"
    assert cli.main([*words, str(tmp_path / "out"), *options.split()]) == 2
    said = capsys.readouterr().err
    assert "_x" in said or "def" in said or "syntax" in said
    assert not (tmp_path / "out").exists()


QWEN_TEMPLATE = {
    "model_type": "qwen_vl_old",
    "format_user": "w5 {{content}}\n",
    "format_assistant": "w6 {{content}} w2\n",
    "replace_tokens": ["<image>", " w91 w93 w93 w93 w93 w92 "],
    "extra_encode": True,
    "processor": "qwen_vl_old",
}
QWEN_PROCESSOR = """
import numpy as np
import torch

from auto_mmround.calibration.processor import register_processor
from auto_mmround.processors.basic import Basic


@register_processor("qwen_vl_old")
class QwenVL(Basic):
    def encode(self, sample, template, *, prompt=False):
        text = self.render(sample, template, prompt=prompt).text
        ids = torch.tensor(self.tokenizer([text])["input_ids"])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if sample.images:
            small = [one.convert("RGB").resize((16, 16)) for one in sample.images]
            pixels = np.stack([np.asarray(one, np.float32) for one in small])
            inputs["images"] = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
        return inputs

    def modality(self, inputs):
        return (inputs["input_ids"][0] == 93).to(torch.int8)
"""


@pytest.mark.parametrize("fmt", ["auto_round,fake", "auto_gptq", "compressed_tensors"])
@pytest.mark.parametrize("towers", ["", "--quant_nontext_module"])
@pytest.mark.parametrize("stream", ["", "--stream"])
def test_a_model_with_code_of_its_own(stream, towers, fmt, tmp_path):
    """As Qwen-VL was uploaded: code, fused layers, a tower inside of the text model."""
    Tiny("qwen_vl_old", "QWenLMHeadModel", {}, standin="standins.qwen_vl").save(
        tmp_path / "model", tiny_tokenizer()
    )
    model = littered(tmp_path / "model")
    (tmp_path / "qwen.json").write_text(json.dumps(QWEN_TEMPLATE))
    (tmp_path / "qwen.py").write_text(QWEN_PROCESSOR)
    data = ["--dataset", str(rows(tmp_path)), "--template", str(tmp_path / "qwen.json")]
    words = ["--model", str(model), *data, "--processor", str(tmp_path / "qwen.py")]
    options = "--iters 1 --nsamples 4 --seqlen 400 --group_size 32 --device cpu --disable_amp"
    out = tmp_path / "out"
    more = f"{options} --trust_remote_code {towers} {stream} --format {fmt}"
    assert cli.main([*words, "--output_dir", str(out), *more.split()]) == 0
    for folder in out.iterdir():
        assert not [f for f in static.check(folder, model, remote_code=True)
                    if "no chat template" not in f.message]  # fmt: skip
        assert (folder / "qwen_vl.py").read_bytes() == (model / "qwen_vl.py").read_bytes()
        loaded = from_quantized(folder, remote_code=True).model
        changed = {name for name, w in source_of(model).items()
                   if not torch.equal(w, loaded.state_dict()[name].float())}  # fmt: skip
        assert "transformer.h.0.attn.c_attn.weight" in changed
        assert "transformer.h.1.mlp.w2.weight" in changed
        seen = any("visual.transformer.resblocks" in name for name in changed)
        assert seen == bool(towers) and "transformer.visual.kv_proj.weight" not in changed


def source_of(folder):
    return {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
