"""Other tools write checkpoints, each in its own environment; nothing of ours is imported.

    peer_writers.py JOBS.json

Jobs: "tool", "model" folder, "class" of Transformers, "checkpoints": {folder: what the tool is
told}. Calibration data are random tokens, for GPTQModel on a model with a tower coloured squares:
what matters is the files.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

SAMPLES, LENGTH = 16, 64
TEXT = "LlamaForCausalLM"


def tokens(seed: int = 1) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return [torch.randint(2000, (1, LENGTH), generator=gen) for _ in range(SAMPLES)]


def llmcompressor(job: dict[str, Any], out: str, options: dict[str, Any]) -> None:
    """options: "modifier", and what it is told: "scheme", "ignore"."""
    import transformers
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from torch.utils.data import DataLoader

    kinds = {"GPTQModifier": GPTQModifier, "QuantizationModifier": QuantizationModifier}
    model = getattr(transformers, job["class"]).from_pretrained(job["model"], dtype="auto").eval()
    kind = transformers.AutoTokenizer if job["class"] == TEXT else transformers.AutoProcessor
    processor = kind.from_pretrained(job["model"])
    oneshot(
        model=model,
        processor=processor,
        dataset=DataLoader([{"input_ids": ids} for ids in tokens()], batch_size=None),
        recipe=[kinds[options.pop("modifier")](targets="Linear", **options)],
        num_calibration_samples=SAMPLES,
        max_seq_length=LENGTH,
        pipeline="sequential",
    )
    model.save_pretrained(out, save_compressed=True)
    processor.save_pretrained(out)


def gptqmodel(job: dict[str, Any], out: str, options: dict[str, Any]) -> None:
    """options: of QuantizeConfig."""
    from gptqmodel import GPTQModel
    from gptqmodel.quantization.config import QuantizeConfig
    from PIL import Image
    from transformers import AutoTokenizer

    model = GPTQModel.load(job["model"], QuantizeConfig(**options), device="cpu")
    rows: list[Any] = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tokens()
    ]
    if job["class"] != TEXT:
        squares = [Image.new("RGB", (56, 56), (15 * i, 90, 200)) for i in range(SAMPLES)]
        contents = [
            [{"type": "image", "image": image}, {"type": "text", "text": "what is it?"}]
            for image in squares
        ]
        rows = [[{"role": "user", "content": content}] for content in contents]
    model.quantize(rows, batch_size=1)
    model.save(out)
    AutoTokenizer.from_pretrained(job["model"]).save_pretrained(out)


def autoawq(job: dict[str, Any], out: str, options: dict[str, Any]) -> None:
    """options: of AutoAWQ's quant_config."""
    from awq import AutoAWQForCausalLM
    from transformers import AutoTokenizer

    model = AutoAWQForCausalLM.from_pretrained(job["model"], device_map="cpu")
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    rows = [ids[0].tolist() for ids in tokens()]
    model.quantize(
        tokenizer,
        quant_config=options,
        calib_data=rows,
        max_calib_seq_len=LENGTH,
        max_calib_samples=SAMPLES,
    )
    model.save_quantized(out)
    tokenizer.save_pretrained(out)


TOOLS = {"llmcompressor": llmcompressor, "gptqmodel": gptqmodel, "autoawq": autoawq}

if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    for folder, told in jobs["checkpoints"].items():
        TOOLS[jobs["tool"]](jobs, folder, told)
