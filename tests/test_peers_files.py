"""`verify` and `from_quantized` on checkpoints that llm-compressor, GPTQModel and AutoAWQ wrote,
untouched and damaged.

Each tool runs in the environment that `scripts/engines.sh` builds for it, and reads its files back
there; AutoAWQ's own loader wants a GPU or Intel's extension, so its files are read by Transformers
with GPTQModel's kernels.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import run_transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from auto_mmround.checkpoint.loader import from_quantized
from auto_mmround.checkpoint.subject import read_subject
from auto_mmround.model.loading import DEMO
from auto_mmround.verify.engines import python_of, root
from auto_mmround.verify.static import check

pytestmark = pytest.mark.slow
WRITER = Path(__file__).with_name("peer_writers.py")
READER = {"llmcompressor": "llmcompressor", "gptqmodel": "gptqmodel", "autoawq": "gptqmodel"}
QWEN, LLAMA = "Qwen2VLForConditionalGeneration", "LlamaForCausalLM"
# GPTQModel wants two workers, more than it starts by itself on two processors.
QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"}
# Largest difference of logits, relative to their spread: compressed-tensors decodes as we do;
# GPTQModel's kernels round the decoded weight, or its product, to float16.
EXACT, HALF = 1e-5, 1e-2


@dataclass(frozen=True)
class Peer:
    """told: what the tool is told. folded: it scales norms, so they differ from the source's."""

    name: str
    tool: str
    format: str
    tolerance: float
    told: dict[str, Any] = field(hash=False)
    folded: bool = False


def by_compressor(name: str, scheme: str, modifier: str = "GPTQModifier") -> Peer:
    told = {"modifier": modifier, "scheme": scheme, "ignore": ["lm_head"]}
    return Peer(f"llmcompressor-{name}", "llmcompressor", "compressed_tensors", EXACT, told)


def by_gptqmodel(name: str, bits: int = 4, **told: Any) -> Peer:
    return Peer(
        f"gptqmodel-{name}",
        "gptqmodel",
        "auto_gptq",
        HALF,
        {"bits": bits, "group_size": 128, **told},
    )


AWQ = {"method": "awq", "format": "gemm", "sym": False, "bits": 4, "group_size": 128}
PEERS = (
    by_compressor("w4", "W4A16"),
    by_compressor("w4-asym", "W4A16_ASYM"),
    by_compressor("w8a8", "W8A8"),
    by_compressor("fp8", "FP8_DYNAMIC", "QuantizationModifier"),
    by_gptqmodel("w4", sym=True, desc_act=False),
    by_gptqmodel("w4-ordered", sym=True, desc_act=True),
    by_gptqmodel("w4-asym", sym=False, desc_act=False),
    by_gptqmodel("w8", bits=8, sym=True, desc_act=False),
    Peer("gptqmodel-awq", "gptqmodel", "auto_awq", HALF, AWQ, folded=True),
    Peer(
        "autoawq",
        "autoawq",
        "auto_awq",
        HALF,
        {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"},
        folded=True,
    ),
)
every_peer = pytest.mark.parametrize("peer", PEERS, ids=[peer.name for peer in PEERS])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("source") / "llama"
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 512,
        "max_position_embeddings": 512,
    }
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, **heads, initializer_range=0.05)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)
    return folder


def write(tool: str, model: Path, cls: str, checkpoints: dict[Path, dict[str, Any]]) -> None:
    """Let a tool write these folders, in one process. Skips where its environment is not built."""
    python = python_of(tool, root())
    if not python.is_file():
        pytest.skip(f"bash scripts/engines.sh {tool}")
    work = next(iter(checkpoints)).parent
    told = {str(folder): options for folder, options in checkpoints.items()}
    jobs = work / f"{tool}.json"
    jobs.write_text(
        json.dumps({"tool": tool, "model": str(model), "class": cls, "checkpoints": told})
    )
    command = [str(python.absolute()), "-P", str(WRITER), str(jobs)]
    done = subprocess.run(
        command, cwd=work, env=QUIET, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def written(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Peer], Path]:
    """The untouched folder of a peer; the first one asked for makes its tool write all of its
    own."""
    folders = {peer: tmp_path_factory.mktemp("peers") / peer.name for peer in PEERS}
    asked: set[str] = set()

    def ask(peer: Peer) -> Path:
        if peer.tool not in asked:
            asked.add(peer.tool)
            write(
                peer.tool,
                source,
                LLAMA,
                {folders[one]: one.told for one in PEERS if one.tool == peer.tool},
            )
        return folders[peer]

    return ask


def findings(folder: Path, source: Path | None = None) -> list[tuple[str, str]]:
    return [(finding.severity, finding.where) for finding in check(folder, source)]


def gap(folder: Path, tool: str, cls: str = LLAMA) -> float:
    """Largest difference between the logits of the decoded weights and those that the peer's reader
    gives."""
    inputs = {"input_ids": torch.randint(2000, (1, 40), generator=torch.Generator().manual_seed(7))}
    theirs = run_transformers(
        folder, [inputs], python=python_of(READER[tool], root()), model_class=cls
    )
    assert theirs.ok and theirs.quantized == len(read_subject(folder).packed), theirs.error
    with torch.inference_mode():
        ours = from_quantized(folder, dtype="float32").model(**inputs).logits
    return float((ours - theirs.logits[0]).abs().max() / ours.std())


@every_peer
def test_untouched_files_are_right(
    peer: Peer, written: Callable[[Peer], Path], source: Path
) -> None:
    folder = written(peer)
    subject = read_subject(folder)
    assert subject.fmt is not None and subject.fmt.name == peer.format and len(subject.packed) == 14
    norms = [
        f"model.layers.{i}.{norm}_layernorm.weight"
        for i in (0, 1)
        for norm in ("input", "post_attention")
    ]
    assert findings(folder) == []
    assert sorted(findings(folder, source)) == [("warning", norm) for norm in norms if peer.folded]
    assert gap(folder, peer.tool) < peer.tolerance


DOWN, UP = "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"


def tensors(change: Callable[[dict[str, torch.Tensor], str], None]) -> Callable[[Path], None]:
    """A change of the weights; it is told how the format names scales."""

    def apply(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found, "scales" if f"{DOWN}.scales" in found else "weight_scale")
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def swap_scales(found: dict[str, torch.Tensor], scales: str) -> None:
    one, other = f"{DOWN}.{scales}", f"{UP}.{scales}"
    found[one], found[other] = found[other], found[one]


def rename_scales(found: dict[str, torch.Tensor], scales: str) -> None:
    found[f"{DOWN}.{scales[:-1]}"] = found.pop(f"{DOWN}.{scales}")


def other_group_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    quantization = config["quantization_config"]
    for group in quantization.get("config_groups", {}).values():
        floats = group["weights"]["type"] == "float"  # these have no groups of 64
        group["weights"] |= {
            "strategy": "block" if floats else "group",
            "group_size": None if floats else 64,
        }
        group["weights"] |= {"block_structure": [128, 128] if floats else None}
    if "group_size" in quantization:
        quantization["group_size"] = 64
    (folder / "config.json").write_text(json.dumps(config))


DAMAGE = {
    "scales of two layers": tensors(swap_scales),
    "a name": tensors(rename_scales),
    "group": other_group_size,
}


@pytest.mark.parametrize("damage", DAMAGE)
@every_peer
def test_damage_is_named(
    peer: Peer, damage: str, written: Callable[[Peer], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(written(peer), folder)
    DAMAGE[damage](folder)
    errors = [where for severity, where in findings(folder) if severity == "error"]
    assert any(where.startswith(DOWN) for where in errors), errors


def test_order_that_is_not_announced(written: Callable[[Peer], Path], tmp_path: Path) -> None:
    """Activation order is read by g_idx; engines that go by desc_act alone would not."""
    folder = tmp_path / "silent"
    shutil.copytree(
        written(next(peer for peer in PEERS if peer.name == "gptqmodel-w4-ordered")), folder
    )
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["desc_act"] = False
    (folder / "config.json").write_text(json.dumps(config))
    assert ("error", f"{DOWN}.g_idx") in findings(folder)


def test_gptqmodel_on_a_model_with_a_tower(tmp_path: Path) -> None:
    """It stores tensors under Transformers' names; the source's are found all the same."""
    folder = tmp_path / "demo"
    write(
        "gptqmodel",
        DEMO,
        QWEN,
        {folder: {"bits": 4, "group_size": 128, "sym": True, "desc_act": False}},
    )
    assert findings(folder) == []
    # Transformers 5 saves the image processor in processor_config.json, the source has it on its
    # own.
    assert findings(folder, DEMO) == [("warning", "preprocessor_config.json")]
    assert gap(folder, "gptqmodel", QWEN) < HALF


def test_llmcompressor_on_a_model_with_a_tower(tmp_path: Path) -> None:
    """Its list of ignored layers has the checkpoint's names only: its own Transformers packs the
    tower, and fails."""
    folder = tmp_path / "demo"
    told = {
        "modifier": "GPTQModifier",
        "scheme": "W4A16",
        "ignore": ["re:.*lm_head", "re:.*visual.*"],
    }
    write("llmcompressor", DEMO, QWEN, {folder: told})
    (found,) = check(folder)
    assert (
        found.severity == "error"
        and found.where == "visual.blocks.0.attn.qkv"
        and "Transformers" in found.message
    )
    inputs = {"input_ids": torch.arange(9)[None]}
    failed = run_transformers(
        folder, [inputs], python=python_of("llmcompressor", root()), model_class=QWEN
    )
    assert not failed.ok
    config = json.loads((folder / "config.json").read_text())
    ignored = config["quantization_config"]["ignore"]
    ignored += [f"model.{name}" for name in ignored if name.startswith("visual.")]
    (folder / "config.json").write_text(json.dumps(config))
    assert findings(folder) == []
    assert gap(folder, "llmcompressor", QWEN) < EXACT
