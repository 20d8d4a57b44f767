"""llm-compressor's GPTQ and SmoothQuant, for recipes.py: runs in its own environment, imports
nothing of ours.

    recipes_peer.py JOB.json

Job: "model" folder, "class" of Transformers, "samples" (safetensors, "3.input_ids" is what the
model is given of sample 3), "dtype", "pipeline" and "scheme" of llm-compressor (bits, group_size,
sym, act_bits; or a "preset" and an "observer"), "dampening", "smoothing" or null, "mappings",
"sequential_targets", "ignore"; "weights": where what changed goes, in the model's dtype; "result":
figures.
"""

import json
import resource
import sys
import time
from collections import defaultdict
from pathlib import Path

import llmcompressor
import torch
import transformers
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    preset_name_to_scheme,
)
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader


def modifiers(job):
    """The recipe, as llm-compressor's examples write it."""
    scheme = job["scheme"]
    if "preset" in scheme:
        return [_by_preset(job, scheme)]
    group = {"strategy": "group", "group_size": scheme["group_size"]}
    weights = QuantizationArgs(
        num_bits=scheme["bits"], symmetric=scheme["sym"], dynamic=False,
        **(group if scheme["group_size"] > 0 else {"strategy": "channel"}),
    )  # fmt: skip
    inputs = (
        QuantizationArgs(num_bits=8, strategy="token", dynamic=True)
        if scheme["act_bits"] == 8
        else None
    )
    groups = {
        "all": QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    }
    gptq = GPTQModifier(
        config_groups=groups,
        ignore=job["ignore"],
        dampening_frac=job["dampening"],
        actorder="static",
    )  # "static" is their name of the order that leaves the file's columns alone
    if job["smoothing"] is None:
        return [gptq]
    return [
        SmoothQuantModifier(smoothing_strength=job["smoothing"], mappings=job["mappings"]),
        gptq,
    ]


def _by_preset(job, scheme):
    """GPTQ on a scheme of theirs, with another observer of weights if one is named."""
    whole = preset_name_to_scheme(scheme["preset"], ["Linear"])
    if "observer" in scheme:
        whole.weights.observer = scheme["observer"]
    return GPTQModifier(
        config_groups={"all": whole}, ignore=job["ignore"], dampening_frac=job["dampening"]
    )


def samples(path, dtype):
    """What the model is given, sample by sample; batches of one, as ours has them."""
    rows = defaultdict(dict)
    for key, value in load_file(path).items():
        number, _, name = key.partition(".")
        rows[int(number)][name] = value.to(dtype) if value.is_floating_point() else value
    return [rows[i] for i in sorted(rows)]


def main():
    """Quantize, write what changed and how long it took."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    dtype = getattr(torch, job["dtype"])
    model = getattr(transformers, job["class"]).from_pretrained(job["model"], dtype=dtype).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = DataLoader(samples(job["samples"], dtype), batch_size=None)
    recipe = modifiers(job)
    wall, spent = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    oneshot(
        model=model, dataset=data, recipe=recipe, pipeline=job["pipeline"],
        num_calibration_samples=len(data),
        sequential_targets=job["sequential_targets"], max_seq_length=job["length"],
    )  # fmt: skip
    now = resource.getrusage(resource.RUSAGE_SELF)
    result = {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": now.ru_utime + now.ru_stime - spent.ru_utime - spent.ru_stime,
        "peak_gb": now.ru_maxrss * 1024 / 1e9,
        "versions": {
            module.__name__: module.__version__ for module in (llmcompressor, transformers, torch)
        },
    }
    state = model.state_dict()
    changed = {
        name: state[name].contiguous()
        for name in before
        if not torch.equal(state[name], before[name])
    }
    save_file(changed, job["weights"])
    Path(job["result"]).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
