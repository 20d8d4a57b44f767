"""A README for the hub: how a checkpoint was made, how to serve it, and its evaluation."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from auto_mmround.errors import UserError
from auto_mmround.export import formats
from auto_mmround.model.loading import PUBLISHED, find_folder
from auto_mmround.report import report
from auto_mmround.report.records import put, well_formed

MARK = "<!-- written by auto_mmround -->"
# keys that are of no use to others, or need more than a line
PLACE = ("output_dir", "overwrite", "device", "layer_config")
FROM_SOURCE = ("license", "license_name", "license_link", "language", "pipeline_tag")

CHAT = """\
from transformers import AutoProcessor, {cls}

model = {cls}.from_pretrained("{name}", dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained("{name}")
content = [{{"type": "image", "url": "picture.png"}}, {{"type": "text", "text": "What is shown?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
).to(model.device)
output = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""
SPEECH = """\
from transformers import {imports}

listen = pipeline("automatic-speech-recognition", model="{name}"{options})
print(listen("speech.wav")["text"])
"""
PIPELINE = {"imports": "pipeline", "options": ""}  # unless the format has other words
TEXT = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("The first thing to know is", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))
"""
SERVE = "vllm serve {name}\n"
MLX = "python -m mlx_{lm}.generate --model {name} --prompt {prompt}\n"
LLAMA = (
    'llama-mtmd-cli -m {name}/*.gguf --mmproj {name}/mmproj*.gguf --image picture.png -p "What is'
    ' shown?"\n'
)

# Engine -> input of the model -> (language of the code, code). A verified engine without code here
# is only named.
CODE: dict[str, dict[str, tuple[str, str]]] = {
    "transformers": {
        "image": ("python", CHAT),
        "audio": ("python", SPEECH),
        "text": ("python", TEXT),
    },
    "vllm": dict.fromkeys(("image", "audio", "text"), ("bash", SERVE)),
    "llamacpp": {
        "image": ("bash", LLAMA),
        "text": ("bash", 'llama-cli -m {name}/*.gguf -p "The first thing"\n'),
    },
    "mlx": {"image": ("bash", MLX), "text": ("bash", MLX)},
}


@well_formed
def write(folder: Path) -> Path:
    """README.md of a checkpoint of ours. Raises UserError if a README that we did not write is
    there."""
    path = folder / "README.md"
    if path.is_file() and MARK not in path.read_text(encoding="utf-8"):
        raise UserError(
            f"{path} was not written by auto_mmround and stays: move it away for a new model card"
        )
    facts = report.collect(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = _kind(config)
    page = report.environment().get_template("card.md")
    text = page.render(
        report.view(facts),
        mark=MARK,
        matter=yaml.safe_dump(_front_matter(facts, kind), sort_keys=False, allow_unicode=True),
        architecture=", ".join(config.get("architectures") or [config["model_type"]]),
        kind=kind,
        deployments=_deployments(facts, config, kind),
        recipe="\n".join(
            f"{k} = {json.dumps(_bare(v))}" for k, v in facts["chosen"].items() if k not in PLACE
        ),
        command=" ".join(
            _bare(word) for word in (facts["evaluation"] or {}).get("command", "").split(" ")
        ),
    )
    put(path, text)
    return path


def _bare(value: Any) -> Any:
    """A path without the folders above it: a card does not show this machine's folders."""
    local = (
        isinstance(value, str)
        and "/" in value
        and (value.startswith((".", "/", "~")) or Path(value).exists())
    )
    return Path(value).name if local else value


def _kind(config: Mapping[str, Any]) -> str:
    """The inputs of the model besides text."""
    names = config.keys() | {"audio_config"} if "num_mel_bins" in config else config.keys()
    return next(
        (
            kind
            for kind, key in (("image", "vision_config"), ("audio", "audio_config"))
            if key in names
        ),
        "text",
    )


def _front_matter(facts: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Metadata for the hub. Licence and language come from the source's README, if it has them."""
    model = str(facts["recipe"]["model"])
    tags = dict.fromkeys((facts["scheme"].lower(), facts["numbers"].lower(), kind))
    matter: dict[str, Any] = {"tags": list(tags), "library_name": "transformers"}
    if model.count("/") == 1 and not Path(model).exists() and not model.startswith("."):
        matter |= {"base_model": model, "base_model_relation": "quantized"}
    try:
        readme = find_folder(model, offline=True) / "README.md"
        parts = readme.read_text(encoding="utf-8").split("---") if readme.is_file() else []
        own = yaml.safe_load(parts[1]) if len(parts) > 2 and not parts[0].strip() else {}
    except (UserError, yaml.YAMLError):
        own = {}
    return matter | {key: own[key] for key in FROM_SOURCE if isinstance(own, dict) and key in own}


def _deployments(
    facts: Mapping[str, Any], config: Mapping[str, Any], kind: str
) -> list[dict[str, Any]]:
    """The engines that verified the checkpoint, with code if we have some."""
    result = []
    quantization = config.get("quantization_config")
    words = formats.from_config(quantization).card if quantization else {}
    for row in facts["verify"]:
        if row["status"] != "right":
            continue
        stated = (config.get("architectures") or ["AutoModelForImageTextToText"])[0]
        language, code = CODE.get(row["engine"], {}).get(kind, ("", ""))
        names = {
            "name": facts["name"],
            "cls": PUBLISHED.get(stated, stated),
            "lm": "vlm" if kind == "image" else "lm",
            "prompt": (
                '"What is shown?" --image picture.png' if kind == "image" else '"The first thing"'
            ),
            **PIPELINE,
            **words,
        }
        title = row["version"] or row["engine"]
        result.append(
            {"engine": title, "row": row, "language": language, "code": code.format(**names)}
        )
    return result
