"""MLX: the layout against its definition and against MLX itself, the configuration against what its
readers look up."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import run_engine
from safetensors.torch import load_file
from tiny_models import sliding_gemma
from torch import Tensor

from auto_mmround.checkpoint.folder import write_config
from auto_mmround.checkpoint.loader import from_quantized
from auto_mmround.checkpoint.reading import dequantized_state_dict
from auto_mmround.errors import UserError
from auto_mmround.evaluate.held_out import held_out
from auto_mmround.evaluate.metrics import logits_of
from auto_mmround.export import mlx
from auto_mmround.export.formats import FORMATS
from auto_mmround.export.layout import Layout
from auto_mmround.model.loading import load
from auto_mmround.numerics.grids import Codes, dequantize
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.recipe.schemes import Scheme
from auto_mmround.run import job as jobs
from auto_mmround.verify.engines import interpreter
from auto_mmround.verify.verify import verify

ROOT = Path(__file__).parent.parent
PYTHON = interpreter("mlx", ROOT)
engine = pytest.mark.skipif(
    not PYTHON.is_file(), reason="scripts/engines.sh mlx installs the engine"
)
# Several widths and groups at once, the vision tower too; patterns name modules as Transformers
# does.
MIXED = {
    "re:.*mlp\\.down_proj": {"bits": 8, "group_size": 32},
    "re:.*layers\\.1\\..*o_proj": {"bits": 3, "group_size": 128},
    "re:.*visual\\.blocks\\.2\\.mlp\\.fc1": {"bits": 6},
}


def random_codes(
    out: int, columns: int, bits: int, group: int, sym: bool, dtype: torch.dtype = torch.float16
) -> tuple[Codes, Scheme]:
    gen = torch.Generator().manual_seed(1000 * bits + group + sym)
    q = torch.randint(0, 2**bits, (out, columns), generator=gen).to(torch.uint8)
    scale = (torch.rand(out, columns // group, generator=gen) * 0.1 + 1e-5) * torch.tensor(
        [1, -1, 1]
    )[:out, None]
    zero = torch.randint(0, 2**bits, scale.shape, generator=gen).to(torch.uint8)
    zero = torch.full_like(zero, 2 ** (bits - 1)) if sym else zero
    return Codes(q, scale.to(dtype), zero, bits, group, sym), Scheme(bits, group, sym)


def definition(tensors: dict[str, Tensor], bits: int, group: int) -> list[list[float]]:
    """scales * code + biases in Python floats (doubles); code k is bits k*b .. k*b+b-1 of the row's
    stream."""
    rows = []
    for r, words in enumerate(tensors["m.weight"].tolist()):
        stream = sum(word << (32 * i) for i, word in enumerate(words))
        codes = [stream >> (bits * k) & (2**bits - 1) for k in range(len(words) * 32 // bits)]
        scales, biases = tensors["m.scales"][r].tolist(), tensors["m.biases"][r].tolist()
        rows.append(
            [scales[k // group] * code + biases[k // group] for k, code in enumerate(codes)]
        )
    return rows


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group", mlx.GROUP_SIZES)
@pytest.mark.parametrize("bits", mlx.FORMAT.bits)
def test_layout_is_the_definition_and_reads_back(bits: int, group: int, sym: bool) -> None:
    codes, scheme = random_codes(3, 256, bits, group, sym)
    tensors = mlx.pack("m", codes)
    assert tensors["m.weight"].dtype == torch.uint32 and tensors["m.weight"].shape == (
        3,
        256 * bits // 32,
    )
    # no value changes
    assert definition(tensors, bits, group) == dequantize(codes, torch.float64).tolist()
    back = mlx.unpack("m", tensors, scheme)
    assert (
        all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(back[:3], codes[:3]))
        and back[3:] == codes[3:]
    )


def test_biases_are_as_short_as_is_exact() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        symmetric = mlx.pack("m", random_codes(2, 128, 4, 32, True, dtype)[0])
        asymmetric = mlx.pack("m", random_codes(2, 128, 4, 32, False, dtype)[0])
        assert (
            symmetric["m.biases"].dtype == dtype and asymmetric["m.biases"].dtype == torch.float32
        )
        assert symmetric["m.scales"].dtype == asymmetric["m.scales"].dtype == dtype


def test_unpack_refuses_what_it_cannot_say() -> None:
    codes, scheme = random_codes(2, 128, 4, 32, False)
    tensors = mlx.pack("m", codes)
    for name, wrong, message in (
        ("m.biases", tensors["m.biases"] * 1.001, "whole zero points"),
        ("m.biases", tensors["m.biases"] - 16 * tensors["m.scales"], "whole zero points"),
        ("m.biases", tensors["m.biases"] * torch.nan, "whole zero points"),
        ("m.scales", tensors["m.scales"][:, :2], "contradicts 4 bits, group size 32"),
    ):
        with pytest.raises(ValueError, match=message):
            mlx.unpack("m", tensors | {name: wrong}, scheme)


@pytest.mark.parametrize(
    ("scheme", "shape", "reason"),
    [
        (Scheme(4, 64), (64, 128), None),
        (Scheme(4, 64, scale_dtype="bf16"), (64, 128), None),
        (Scheme(4, 16), (64, 128), "group sizes 32, 64, 128, not 16"),
        (Scheme(4, -1), (64, 128), "group sizes 32, 64, 128, not -1"),
        (Scheme(7, 64), (64, 128), "holds 2, 3, 4, 5, 6, 8 bits, not 7"),
        (Scheme(4, 128), (64, 192), "192 inputs are no multiple"),
        (Scheme(4, 32), (63, 32), "63 outputs are no multiple of 2"),
    ],
)
def test_check(scheme: Scheme, shape: tuple[int, int], reason: str | None) -> None:
    found = mlx.FORMAT.check(scheme, *shape)
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.language_model.layers.3.mlp.up_proj", "language_model.model.layers.3.mlp.up_proj"),
        ("model.visual.blocks.0.attn.qkv", "vision_tower.blocks.0.attn.qkv"),
        ("model.text_model.layers.0.mlp.up_proj", "language_model.layers.0.mlp.up_proj"),
        ("model.vision_tower.encoder.layers.0.fc1", "vision_tower.encoder.layers.0.fc1"),
        ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),  # a text model
    ],
)
def test_names_of_modules(name: str, expected: str) -> None:
    assert mlx.mlx_name(name) == expected


def test_only_what_differs_is_listed_and_nothing_else() -> None:
    base, prefix = Scheme(4, 64), "model.language_model.layers.0.mlp"
    quantized = {
        f"{prefix}.a": base,
        f"{prefix}.b": Scheme(8, 32),
        f"{prefix}.c": Scheme(4, 64, sym=False),
    }
    layout = Layout(quantized, [], [prefix], lambda name: name.replace("language_model.", ""), base)
    special = {"group_size": 32, "bits": 8}
    names = (f"{prefix}.b", "model.layers.0.mlp.b", "language_model.model.layers.0.mlp.b")
    assert mlx.config(layout) == {"group_size": 64, "bits": 4, "mode": "affine"} | dict.fromkeys(
        names, special
    )


def test_config_is_flat_where_readers_want_it() -> None:
    layout = Layout({}, [], [], str, Scheme(4, 64))
    rope = {"rope_theta": 5e5, "rope_type": "default", "mrope_section": [4, 6, 6]}
    source = {
        "model_type": "qwen2_vl",
        "text_config": {"hidden_size": 8, "model_type": "qwen2_vl_text", "rope_parameters": rope},
        "vision_config": {"depth": 1, "model_type": "qwen2_vl_vision"},
    }
    made = mlx.model_config(source, layout)
    assert (
        made["model_type"] == "qwen2_vl" and made["hidden_size"] == 8 and made["rope_theta"] == 5e5
    )
    assert made["rope_scaling"] == {"type": "mrope", "mrope_section": [4, 6, 6]}
    assert made["vision_config"] == {"depth": 1, "model_type": "qwen2_vl"}
    assert source["text_config"].items() <= made["text_config"].items()
    gemma = {
        "model_type": "gemma3_text",
        "_sliding_window_pattern": 6,
        "rope_parameters": {
            "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        },
    }
    flat = {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"type": "linear", "factor": 8.0},
        "sliding_window_pattern": 6,
        "quantization": mlx.config(layout),
    }
    assert mlx.model_config(gemma, layout) == gemma | flat
    # what is there wins
    assert mlx.model_config(gemma | {"rope_theta": 3.0}, layout)["rope_theta"] == 3.0


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], Path, int]:
    """(tuned weights, checkpoint folder, number of quantized weights) of the demo model, rounded to
    nearest."""
    recipe = Recipe(
        model="demo",
        dataset="demo",
        iters=0,
        device="cpu",
        format="mlx",
        bits=4,
        group_size=64,
        sym=False,
        quant_nontext_module=True,
        layer_config=MIXED,
        output_dir=str(tmp_path_factory.mktemp("out")),
    )
    job = jobs.prepare(recipe, jobs.load_model(recipe))
    (folder,) = jobs.run(job)
    return job.loaded.model.state_dict(), folder, len(job.plan.quantized)


def test_reads_back_to_the_bit(exported: tuple[dict[str, Tensor], Path, int]) -> None:
    tuned, folder, _ = exported
    loaded = from_quantized(folder).model
    state, config = loaded.state_dict(), loaded.config.text_config
    assert state.keys() == tuned.keys() and all(
        torch.equal(state[name], tuned[name]) for name in tuned
    )
    # the flat keys do not change how Transformers reads the model
    plain = load("demo").model.config.text_config
    assert (
        config.hidden_size == plain.hidden_size
        and config.rope_parameters.items() >= plain.rope_parameters.items()
    )


def test_verify_finds_the_files_right(exported: tuple[dict[str, Tensor], Path, int]) -> None:
    """Float32 biases, and a packed tensor called `weight`, are no errors."""
    assert [f.line() for f in verify(exported[1], []).findings if f.severity == "error"] == []


@engine
@pytest.mark.slow
def test_verify_asks_mlx(exported: tuple[dict[str, Tensor], Path, int]) -> None:
    (verdict,) = verify(exported[1], ["mlx"], root=ROOT).verdicts
    assert verdict.status == "right" and verdict.layers == verdict.planned == exported[2], (
        verdict.line()
    )


def test_an_override_that_is_lost_is_named(
    exported: tuple[dict[str, Tensor], Path, int], tmp_path: Path
) -> None:
    folder = exported[1]
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    write_config(tmp_path, config, {"group_size": 64, "bits": 4, "mode": "affine"})
    with pytest.raises(UserError, match=r"down_proj contradicts quantization_config"):
        dict(dequantized_state_dict(tmp_path))


def answers(folder: Path, **options: Any) -> tuple[Any, float, list[Tensor]]:
    """(the engine's answer, largest logit difference over their spread, our logits) on a short text
    and an image."""
    loaded = from_quantized(folder, dtype="float32")
    image = next(
        dict(s.kwargs) for s in held_out(loaded, "demo", limit=1) if "pixel_values" in s.kwargs
    )
    inputs = [{"input_ids": image["input_ids"].flip(1).clamp(max=2000)}, image]
    result = run_engine("mlx", folder, inputs, python=PYTHON, **options)
    assert result.ok, result.error
    wanted = [logits_of(loaded.model, kwargs) for kwargs in inputs]
    gaps = [
        ((got[0] - want).abs().max() / want.std()).item()
        for got, want in zip(result.logits, wanted, strict=True)
    ]
    return result, max(gaps), wanted


@engine
@pytest.mark.slow
def test_mlx_vlm_agrees_on_text_and_image(exported: tuple[dict[str, Tensor], Path, int]) -> None:
    result, gap, wanted = answers(exported[1], new_tokens=2)
    assert result.quantized == result.classes["QuantizedLinear"] == exported[2] and gap < 1e-3
    assert result.engine.startswith("mlx-vlm ")
    assert [tokens[0, 0].item() for tokens in result.tokens] == [
        logits[-1].argmax().item() for logits in wanted
    ]


@engine
@pytest.mark.slow
def test_mlx_decodes_every_weight_to_the_bit(
    exported: tuple[dict[str, Tensor], Path, int], tmp_path: Path
) -> None:
    """mx.dequantize in float32 is our reader, for every width and group size of the mixed
    checkpoint."""
    script = """
import json, sys, mlx.core as mx
folder, out = sys.argv[1:]
tensors = mx.load(folder + "/model.safetensors")
config = json.load(open(folder + "/config.json"))["quantization"]
found = {}
for name in [key.removesuffix(".scales") for key in tensors if key.endswith(".scales")]:
    how = config.get(name, config)
    parts = [tensors[name + "." + p].astype(mx.float32) for p in ("scales", "biases")]
    sizes = how["group_size"], how["bits"]
    found[name + ".weight"] = mx.dequantize(tensors[name + ".weight"], *parts, *sizes)
mx.save_safetensors(out, found)
"""
    out = tmp_path / "decoded.safetensors"
    subprocess.run([PYTHON, "-c", script, exported[1], out], check=True)
    ours, theirs = dict(dequantized_state_dict(exported[1])), load_file(out)
    assert len(theirs) == exported[2] and all(
        torch.equal(theirs[name], ours[name]) for name in theirs
    )


@engine
@pytest.mark.slow
def test_mlx_lm_reads_a_text_model(tmp_path: Path) -> None:
    """A small random Gemma 3: sliding and full attention, two rotary bases, tied embedding;
    plumbing, not quality."""
    source = sliding_gemma(tmp_path / "tiny")
    recipe = Recipe(
        model=str(source),
        iters=0,
        device="cpu",
        format="mlx",
        group_size=32,
        output_dir=str(tmp_path),
    )
    (folder,) = jobs.run(jobs.prepare(replace(recipe, bits=3), jobs.load_model(recipe)))
    model = from_quantized(folder, dtype="float32").model
    embedding = model.model.embed_tokens
    # as mlx-lm rounds it, in any dtype
    embedding.embed_scale = embedding.embed_scale.bfloat16().float()
    inputs = {
        "input_ids": torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(1))
    }
    result, wanted = run_engine("mlx", folder, [inputs], python=PYTHON), logits_of(model, inputs)
    assert result.ok and result.engine.startswith("mlx-lm ") and result.quantized == 21
    assert (result.logits[0][0] - wanted).abs().max() < 1e-3 * wanted.std()


@engine
@pytest.mark.slow
def test_a_missing_tensor_is_the_engines_answer(
    exported: tuple[dict[str, Tensor], Path, int], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    for path in exported[1].iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).symlink_to(path)
    tensors = load_file(exported[1] / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.biases"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    result = run_engine(
        "mlx", tmp_path, [{"input_ids": torch.ones(1, 4, dtype=torch.int64)}], python=PYTHON
    )
    assert not result.ok and "up_proj" in str(result.error)


def test_a_missing_engine_names_its_command(tmp_path: Path) -> None:
    result = run_engine("mlx", tmp_path, [], python=interpreter("mlx", tmp_path))
    assert not result.ok and "scripts/engines.sh mlx" in str(result.error)
    assert FORMATS["mlx"] is mlx.FORMAT
