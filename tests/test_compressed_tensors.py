"""compressed-tensors and fake checkpoints against that package's own packing, names and reader."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import run_transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from nearest import round_to_nearest
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from auto_mmround.checkpoint.loader import from_quantized, load_any
from auto_mmround.errors import UserError
from auto_mmround.evaluate.held_out import held_out
from auto_mmround.evaluate.metrics import logits_of
from auto_mmround.export import formats
from auto_mmround.export.compressed_tensors import format as ct
from auto_mmround.export.compressed_tensors import integers
from auto_mmround.export.formats import FORMATS
from auto_mmround.export.layout import Layout
from auto_mmround.model.devices import autocast
from auto_mmround.model.loading import load
from auto_mmround.numerics.activations import integers_a_token
from auto_mmround.numerics.grids import Codes, dequantize
from auto_mmround.recipe.aliases import preset
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.recipe.schemes import Scheme
from auto_mmround.run import job as jobs
from auto_mmround.run.plan import grid_of
from auto_mmround.verify.engines import interpreter
from auto_mmround.verify.static import check as check_files

pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from compressed_tensors.utils.match import match_named_modules, match_targets

RTN = Recipe(model="demo", algorithm="rtn", device="cpu", format="compressed_tensors")


def fits(target: str, name: str) -> bool:
    return (
        re.match(target[3:], name) is not None
        if target.startswith("re:")
        else target in (name, "Linear")
    )


def random_codes(
    out: int, columns: int, scheme: Scheme, seed: int, dtype: torch.dtype = torch.float16
) -> Codes:
    gen = torch.Generator().manual_seed(seed)
    group = columns if scheme.group_size == -1 else scheme.group_size
    q = torch.randint(0, 2**scheme.bits, (out, columns), generator=gen).to(torch.uint8)
    scale = torch.randn(out, columns // group, generator=gen).to(dtype)  # half of them negative
    zero = torch.randint(0, 2**scheme.bits, scale.shape, generator=gen).to(torch.uint8)
    zero = torch.full_like(zero, 2 ** (scheme.bits - 1)) if scheme.sym else zero
    return Codes(q, scale, zero, scheme.bits, group, scheme.sym)


def same(left: Codes, right: Codes) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left[:3], right[:3])) and left[3:] == right[3:]


def group_of(scheme: Scheme, names: tuple[str, ...] = ("m",)) -> QuantizationScheme:
    """compressed-tensors' own scheme object, from the configuration that we write."""
    layout = Layout(dict.fromkeys(names, scheme), [], [], str, scheme)
    config = formats.resolve("compressed_tensors", [scheme]).config(layout)
    return QuantizationConfig.model_validate(config).config_groups["group_0"]


@settings(deadline=None, max_examples=60)
@given(
    bits=st.integers(2, 8),
    sym=st.booleans(),
    out=st.integers(1, 37),
    group=st.sampled_from([-1, 3, 16, 32]),
    groups=st.integers(1, 4),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 999),
)
def test_packed_words_are_what_compressed_tensors_packs_and_reads(
    bits: int, sym: bool, out: int, group: int, groups: int, dtype: torch.dtype, seed: int
) -> None:
    scheme, columns = Scheme(bits, group, sym), 29 if group == -1 else group * groups
    codes = random_codes(out, columns, scheme, seed, dtype)
    tensors = integers.pack_words("m", codes)
    assert same(ct.unpack("m", tensors, scheme), codes)
    signed, middle = codes.q_OI.to(torch.int16), 2 ** (bits - 1)
    assert torch.equal(
        tensors["m.weight_packed"], pack_to_int32((signed - middle).to(torch.int8), bits)
    )
    assert ("m.weight_zero_point" in tensors) != sym
    local = {key.removeprefix("m."): tensor for key, tensor in tensors.items()}
    theirs = BaseCompressor.get_value_from_registry("pack-quantized").decompress(
        local, group_of(scheme)
    )
    assert torch.equal(theirs["weight"], dequantize(codes, dtype))


@pytest.mark.parametrize(
    "scheme", [Scheme(8, -1, act_bits=8), Scheme(4, 16, act_bits=8), Scheme(4, -1, act_bits=8)]
)
def test_int8_is_what_compressed_tensors_reads(scheme: Scheme) -> None:
    codes = random_codes(5, 48, scheme, 0)
    tensors = integers.pack_int8("m", codes)
    assert same(ct.unpack("m", tensors, scheme), codes) and tensors["m.weight"].dtype == torch.int8
    local = {key.removeprefix("m."): tensor for key, tensor in tensors.items()}
    group = group_of(scheme)
    assert group.input_activations.num_bits == 8 and group.input_activations.dynamic is True
    theirs = BaseCompressor.get_value_from_registry("int-quantized").decompress(local, group)
    assert torch.equal(theirs["weight"], dequantize(codes, torch.float16))


def test_refusals() -> None:
    codes = random_codes(4, 32, Scheme(4, 16), 0)
    tensors = integers.pack_words("m", codes)
    for scheme, word in (
        (Scheme(4, 32), "contradicts"),
        (Scheme(3, 16), "words"),
        (Scheme(4, 8), "contradicts"),
    ):
        with pytest.raises(ValueError, match=word):
            ct.unpack("m", tensors, scheme)
    with pytest.raises(ValueError, match="zero point"):
        ct.unpack(
            "m",
            tensors | {"m.weight_zero_point": torch.zeros(1, 2, dtype=torch.int32)},
            Scheme(4, 16),
        )
    with pytest.raises(ValueError, match="reorders"):
        ct.unpack(
            "m", tensors | {"m.weight_g_idx": torch.zeros(32, dtype=torch.int32)}, Scheme(4, 16)
        )
    with pytest.raises(ValueError, match="says integers"):
        ct.unpack(
            "m",
            {
                "m.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn),
                "m.weight_scale": torch.ones(4, 1),
            },
            Scheme(8, -1),
        )
    with pytest.raises(ValueError, match="symmetric"):
        integers.pack_int8("m", random_codes(4, 32, Scheme(8, -1, False), 0))


# Float grids, against compressed-tensors' own scales, rounding and packing

FLOAT_SCHEMES = {
    "fp8": Scheme(8, -1, data_type="fp8"),
    "fp8 dynamic": Scheme(8, -1, data_type="fp8", act_bits=8),
    "fp8 blocks": Scheme(8, 128, data_type="fp8", act_bits=8),
    "nvfp4": Scheme(4, 16, data_type="nvfp4"),
    "mxfp4": Scheme(4, 32, data_type="mxfp4"),
    "mxfp8": Scheme(8, 32, data_type="mxfp8"),
    "mxfp8 dynamic": Scheme(8, 32, data_type="mxfp8", act_bits=8),
    "fp8 static": Scheme(8, -1, data_type="fp8", act_bits=8, act_dynamic=False),
    "fp8 tensor": Scheme(8, 0, data_type="fp8", act_bits=8, act_dynamic=False),
}


def nearest(w_OI: Tensor, scheme: Scheme) -> Codes:
    return round_to_nearest(w_OI, scheme.group_size, grid_of(scheme, w_OI.abs().max()))


def their_scale(w_OI: Tensor, args: Any, scheme: Scheme, global_scale: Tensor | None) -> Tensor:
    size = w_OI.shape[1] if scheme.group_size < 1 else scheme.group_size
    w_OGg = w_OI.unflatten(1, (-1, size))
    low, high = w_OGg.amin(-1), w_OGg.amax(-1)
    if args.strategy == "tensor":
        low, high = low.amin().reshape(1), high.amax().reshape(1)
    if args.strategy == "block":
        low, high = (
            torch.nn.functional.pad(t, (0, 0, 0, -t.shape[0] % 128)).unflatten(0, (-1, 128))
            for t in (low, high)
        )
        low, high = low.amin(1), high.amax(1)
    return calculate_qparams(low, high, args, global_scale=global_scale)[0]


@pytest.mark.parametrize("case", FLOAT_SCHEMES)
@pytest.mark.parametrize("seed", range(3))
def test_floats_are_what_compressed_tensors_rounds_and_packs(case: str, seed: int) -> None:
    scheme, gen = FLOAT_SCHEMES[case], torch.Generator().manual_seed(seed)
    w_OI = torch.randn(200, 256, generator=gen) * 0.03 * torch.rand(200, 1, generator=gen).exp2()
    # ties, where the scale is a power of 2
    w_OI[0, :8] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    group = group_of(scheme)
    static = None if scheme.act_dynamic else torch.rand(1, generator=gen)
    codes = nearest(w_OI, scheme)._replace(input_scale=static)
    tensors = {
        k.removeprefix("m."): t
        for k, t in FORMATS["compressed_tensors:float"].pack("m", codes).items()
    }
    local = {
        "weight": w_OI,
        "weight_scale": their_scale(w_OI, group.weights, scheme, codes.global_scale),
    }
    if codes.global_scale is not None:
        assert torch.equal(codes.global_scale, generate_gparam(w_OI.min(), w_OI.max()))
        local["weight_global_scale"] = codes.global_scale
    local |= {} if static is None else {"input_scale": static}
    compressor = BaseCompressor.get_value_from_registry(str(group.format))
    theirs = compressor.compress(local, group)
    assert theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        ours, other = (
            t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t
            for t in (tensor, theirs[name])
        )
        assert torch.equal(ours, other.to(ours.dtype)), name
    decoded = compressor.decompress(dict(tensors), group)["weight"]
    assert torch.equal(decoded, dequantize(codes, decoded.dtype))
    again = ct.unpack("m", {f"m.{k}": t for k, t in tensors.items()}, scheme)
    assert torch.equal(dequantize(again), dequantize(codes)) and again[3:7] == codes[3:7]


def test_float_refusals() -> None:
    check = FORMATS["compressed_tensors:float"].check
    assert all(check(scheme, 200, 256) is None for scheme in FLOAT_SCHEMES.values())
    assert "multiple" in str(check(FLOAT_SCHEMES["mxfp4"], 4, 40))
    assert "128 inputs" in str(check(FLOAT_SCHEMES["fp8"], 4, 128))
    assert check(FLOAT_SCHEMES["fp8 tensor"], 4, 128) is None
    assert "activations" in str(check(replace(FLOAT_SCHEMES["nvfp4"], act_bits=8), 4, 32))
    assert "bits" in str(check(replace(FLOAT_SCHEMES["fp8"], bits=4), 4, 32))
    for name in ("auto_round", "auto_gptq", "compressed_tensors", "compressed_tensors:int8"):
        assert "integers, not fp8" in str(FORMATS[name].check(FLOAT_SCHEMES["fp8"], 128, 128))
    wrong = ({"bits": 4}, {"bits": 8, "group_size": 32})
    for values in wrong:
        with pytest.raises(UserError, match="data_type fp8"):
            replace(RTN, data_type="fp8", **values)


def test_one_scale_for_a_whole_weight_is_read() -> None:
    """llm-compressor's FP8: static, by tensor."""
    q_OI = torch.randn(6, 48).to(torch.float8_e4m3fn)
    tensors = {
        "m.weight": q_OI,
        "m.weight_scale": torch.tensor([0.25]),
        "m.input_scale": torch.tensor([0.5]),
    }
    float8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    config = {
        "quant_method": "compressed-tensors",
        "config_groups": {
            "group_0": {"targets": ["m"], "weights": float8, "input_activations": float8}
        },
    }
    scheme = formats.scheme_of(config, "m")
    assert (scheme.act_bits, scheme.act_dynamic, scheme.data_type, scheme.group_size) == (
        8,
        False,
        "fp8",
        0,
    )
    assert torch.equal(dequantize(ct.unpack("m", tensors, scheme)), q_OI.float() / 4)


def test_a_zero_weight_stays_zero() -> None:
    for scheme in FLOAT_SCHEMES.values():
        codes = nearest(torch.zeros(128, 256), scheme)
        assert dequantize(codes).abs().sum() == 0 and bool(codes.scale_OG.isfinite().all())


# Names: compressed-tensors' own matching (Transformers) and vLLM's rules, on a module tree of each
# spelling

BLOCK, TOWER = "model.language_model.layers", "model.visual.blocks"
TEXT_PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj",
              "mlp.up_proj", "mlp.down_proj")  # fmt: skip
TEXT = [f"{BLOCK}.{i}.{part}" for i in (0, 1, 11) for part in TEXT_PARTS]
VISION = [f"{TOWER}.{i}.{part}" for i in (0, 1) for part in ("attn.qkv", "mlp.fc1", "mlp.fc2")]
OTHER = ["model.visual.merger.mlp.0", "lm_head"]
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def stored(name: str) -> str:
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def in_vllm(name: str) -> str:
    pairs = (
        ("model.language_model.", "language_model.model."),
        ("model.visual.", "visual."),
        ("lm_head.", "language_model.lm_head."),
        ("model.", "language_model.model."),
    )
    return next((new + name[len(old) :] for old, new in pairs if name.startswith(old)), name)


def tree(names: list[str]) -> nn.Module:
    root = nn.Module()
    for name in names:
        parent = root
        *path, leaf = name.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(leaf, nn.Linear(1, 1))
    return root


def bits_in_transformers(config: dict[str, Any], names: list[str]) -> dict[str, int]:
    """compressed-tensors' `apply_quantization_config`, as far as it decides which module gets which
    scheme."""
    targets = {
        t: group["weights"]["num_bits"]
        for group in config["config_groups"].values()
        for t in group["targets"]
    }
    matched = match_named_modules(tree(names), targets, config["ignore"])
    linears = [(name, module) for name, module in matched if isinstance(module, nn.Linear)]
    return {name: targets[match_targets(name, module, targets)[0]] for name, module in linears}


def bits_in_vllm(config: dict[str, Any], names: list[str]) -> dict[str, int]:
    """vLLM 0.32's order: ignore; the name; the members of a fused matrix, all of them; the
    class."""
    mapped = {t if t.startswith("re:") or "." not in t else in_vllm(t): group["weights"]["num_bits"]
              for group in config["config_groups"].values() for t in group["targets"]}  # fmt: skip
    ignored = [t if t.startswith("re:") or "." not in t else in_vllm(t) for t in config["ignore"]]
    found = {}
    for name in names:
        parent, _, leaf = in_vllm(name).rpartition(".")
        fused = next((key for key, parts in FUSED.items() if leaf in parts), None)
        members = (
            [f"{parent}.{part}" for part in FUSED[fused]]
            if fused
            else [f"{parent}.{leaf}".strip(".")]
        )
        taken = [any(fits(t, member) for t in ignored if t != "Linear") for member in members]
        assert all(taken) or not any(taken), (
            f"{name}: vLLM refuses a fused matrix that is ignored in part"
        )
        hits = [
            next((t for t in mapped if t != "Linear" and fits(t, member)), None)
            for member in members
        ]
        target = (
            hits[0] if all(hits) else "Linear" if "Linear" in mapped and leaf != "lm_head" else None
        )
        if not all(taken) and target:
            found[name] = mapped[target]
    return found


W4, W8 = Scheme(4, 128), Scheme(8, 64)
CASES: dict[str, dict[str, Scheme]] = {
    "text": dict.fromkeys(TEXT, W4),
    "all": dict.fromkeys(VISION + TEXT, W4),
    "eight bit tower": dict.fromkeys(VISION, W8) | dict.fromkeys(TEXT, W4),
    "eight bit down_proj": {n: W8 if n.endswith("down_proj") else W4 for n in TEXT},
    "one block, its fused parts": {n: W8 if ".1." in n else W4 for n in TEXT},
    "a kept fused part and block 11": {
        n: W4 for n in TEXT if "layers.1." not in n or "gate" in n or "up" in n
    },
    "output head": dict.fromkeys([*TEXT, "lm_head"], W4),
    "eight bit output head, tower mixed": (
        dict.fromkeys(TEXT, W4)
        | {"lm_head": W8}
        | {n: replace(W8, bits=6) if "fc2" in n else W8 for n in VISION}
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_module_gets_its_scheme_in_both_spellings(case: str) -> None:
    quantized = CASES[case]
    names = [*VISION, *TEXT, *OTHER]
    blocks = [b for b in (TOWER, BLOCK) if any(n.startswith(b) for n in quantized)]
    layout = Layout(quantized, [n for n in names if n not in quantized], blocks, stored, W4)
    config = json.loads(json.dumps(FORMATS["compressed_tensors"].config(layout)))
    QuantizationConfig.model_validate(config)
    wanted = {name: scheme.bits for name, scheme in quantized.items()}
    assert bits_in_transformers(config, names) == wanted
    assert bits_in_vllm(config, names) == wanted
    for name, scheme in quantized.items():  # and our own reader, by the checkpoint's name
        assert formats.scheme_of(config, stored(name)) == scheme, name
    assert len(config["config_groups"]) == len(set(quantized.values()))


def test_a_pattern_never_takes_another_tower() -> None:
    text, tower = "model.language_model.layers", "model.vision_tower.encoder.layers"
    quantized = {
        f"{tower}.0.self_attn.q_proj": W8,
        f"{text}.0.self_attn.q_proj": W4,
        f"{text}.0.mlp.down_proj": W4,
    }
    layout = Layout(quantized, [], [tower, text], lambda name: name.removeprefix("model."), W4)
    config = FORMATS["compressed_tensors"].config(layout)
    assert bits_in_transformers(config, list(quantized)) == {
        n: s.bits for n, s in quantized.items()
    }
    assert {n: formats.scheme_of(config, n.removeprefix("model.")).bits for n in quantized} == {
        n: s.bits for n, s in quantized.items()
    }


def test_groups_that_cannot_be_read_are_one_line() -> None:
    fp8: dict[str, Any] = {"targets": ["re:.*fc1"]}
    fp8["weights"] = {"num_bits": 6, "type": "float", "strategy": "group", "group_size": 32}
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": fp8}}
    with pytest.raises(UserError, match="6 bit float"):
        formats.scheme_of(config, "a.fc1")
    with pytest.raises(UserError, match="no config group"):
        formats.scheme_of(config, "a.fc2")


# The demo model


def run(out: Path, **changes: Any) -> tuple[jobs.Job, list[Path]]:
    recipe = replace(RTN, output_dir=str(out), **changes)
    job = jobs.prepare(recipe, jobs.load_model(recipe))
    return job, jobs.run(job)


def inputs() -> list[dict[str, Any]]:
    return [sample.kwargs for sample in held_out(load("demo"), "demo", limit=1)]


def assert_holds(folder: Path, tuned: dict[str, Tensor]) -> None:
    decoded = from_quantized(folder).model.state_dict()
    assert decoded.keys() == tuned.keys() and all(
        torch.equal(decoded[name], tuned[name]) for name in tuned
    )


def assert_reader_agrees(job: jobs.Job, folder: Path) -> None:
    name = formats.from_config(
        json.loads((folder / "config.json").read_text())["quantization_config"]
    ).name
    result = run_transformers(folder, inputs(), python=interpreter(name))
    model = from_quantized(folder, dtype="float32").model
    assert result.ok, result.error
    assert result.quantized == len(job.plan.quantized) and result.classes == {
        "Linear": len(job.plan.weights)
    }
    assert "compressed-tensors" in result.engine
    for got, kwargs in zip(result.logits, inputs(), strict=True):
        wanted = logits_of(model, kwargs)
        # Asymmetric weights come through another way there, which multiplies in the scales'
        # float16; FP4 in bfloat16.
        exact = job.recipe.sym and job.recipe.data_type in ("int", "fp8")
        assert (
            torch.equal(got[0], wanted)
            if exact
            else (got[0] - wanted).abs().max() < 0.03 * wanted.std()
        )


def test_demo_through_the_real_reader_and_fake(tmp_path: Path) -> None:
    job, (packed, fake) = run(
        tmp_path, format="compressed_tensors,fake", bits=3, scale_dtype="bf16"
    )
    tuned = job.loaded.model.state_dict()
    assert_holds(packed, tuned)
    assert_reader_agrees(job, packed)
    assert "quantization_config" not in json.loads((fake / "config.json").read_text())
    plain, source = load(str(fake)), load("demo").model.state_dict()
    assert all(
        torch.equal(tensor, tuned[name]) for name, tensor in plain.model.state_dict().items()
    )
    changed = {name for name, tensor in tuned.items() if not torch.equal(tensor, source[name])}
    assert changed == {f"{name}.weight" for name in job.plan.quantized}
    stored_dtypes = {tensor.dtype for tensor in load_file(fake / "model.safetensors").values()}
    assert stored_dtypes == {torch.bfloat16}


@pytest.mark.parametrize("how", [{"algorithm": "rtn"}, {"algorithm": "auto", "iters": 4}], ids=str)
@pytest.mark.parametrize("case", FLOAT_SCHEMES)
def test_float_runs_hold_what_the_model_was_left_with(
    tmp_path: Path, case: str, how: dict[str, Any]
) -> None:
    scheme = FLOAT_SCHEMES[case]
    settings = {
        key: getattr(scheme, key) for key in ("bits", "group_size", "act_bits", "act_dynamic")
    }
    job, (folder,) = run(
        tmp_path, data_type=scheme.data_type, dataset="demo", nsamples=8, **settings, **how
    )
    assert_holds(folder, job.loaded.model.state_dict())
    run_json = json.loads((folder / "run.json").read_text())
    for block in run_json["blocks"] if how["algorithm"] == "auto" else ():
        assert block["end"] <= block["start"]
    if not scheme.act_dynamic:
        assert any("input_scale" in name for name in load_file(folder / "model.safetensors"))
    if case == "nvfp4":  # weights that engines fuse share the scale of the whole weight
        scales = {
            n: t.item()
            for n, t in load_file(folder / "model.safetensors").items()
            if "global_scale" in n
        }
        attention = {
            value
            for name, value in scales.items()
            if "layers.0.self_attn" in name and "o_proj" not in name
        }
        assert len(attention) == 1 < len(set(scales.values()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        *({"bits": bits, "group_size": 32} for bits in (2, 4, 5, 8)),
        {"group_size": -1, "sym": False},
        {"bits": 5, "sym": False},
        {"quant_nontext_module": True, "layer_config": {"visual": {"bits": 8, "group_size": -1}}},
        {
            "layer_config": {"down_proj": {"bits": 8, "group_size": 64}, "layers.2": {"bits": 6}},
            "fp_layers": "o_proj",
        },
        {"bits": 8, "act_bits": 8},
        {"bits": 4, "group_size": 32, "act_bits": 8},
        {"data_type": "fp8", "bits": 8, "group_size": -1, "act_bits": 8},
        {"data_type": "fp8", "bits": 8, "group_size": 128},
        {"data_type": "nvfp4", "bits": 4, "group_size": 16},
        {"data_type": "mxfp4", "bits": 4, "group_size": 32},
        {"data_type": "mxfp8", "bits": 8, "group_size": 32, "act_bits": 8},
        {
            "data_type": "fp8",
            "bits": 8,
            "group_size": -1,
            "act_bits": 8,
            "act_dynamic": False,
            "dataset": "demo",
            "nsamples": 8,
        },
    ],
    ids=str,
)
def test_schemes_through_the_real_reader(tmp_path: Path, changes: dict[str, Any]) -> None:
    job, (folder,) = run(tmp_path, **changes)
    assert_holds(folder, job.loaded.model.state_dict())
    assert_reader_agrees(job, folder)


def test_eight_bit_activations(tmp_path: Path) -> None:
    job, (folder,) = run(tmp_path, bits=8, act_bits=8)
    assert folder.name == "demo-w8g-1-compressed_tensors" and {
        s.group_size for s in job.plan.quantized.values()
    } == {-1}
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["format"] == "int-quantized"
    assert_holds(folder, job.loaded.model.state_dict())
    weights, engine = (
        from_quantized(folder, dtype="float32").model,
        load_any(str(folder), dtype="float32").model,
    )
    kwargs = inputs()[0]
    exact, rounded = logits_of(weights, kwargs), logits_of(engine, kwargs)
    error = ((exact - rounded).std() / exact.std()).item()
    assert 1e-4 < error < 0.1  # inputs are rounded in every planned layer, and finely
    assert sum(bool(m._forward_pre_hooks) for m in engine.modules()) == len(job.plan.quantized)


def test_static_inputs_are_what_calibration_shows(tmp_path: Path) -> None:
    """One scale a layer, the largest input of all samples / 448; engines' rounding with it shifts
    the logits a little, and `verify` sees a scale that is no longer the run's."""
    recipe = replace(
        RTN, output_dir=str(tmp_path), dataset="demo", nsamples=8, **preset("FP8_STATIC", "")
    )
    job = jobs.prepare(recipe, jobs.load_model(recipe))
    peaks: dict[str, float] = {}
    model = load("demo").model
    for name in job.plan.quantized:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, x, name=name: peaks.update(
                {name: max(peaks.get(name, 0.0), x[0].abs().max().item())}
            )
        )
    with torch.no_grad(), autocast(torch.device("cpu"), torch.bfloat16, amp=True):
        for sample in job.inputs:
            model(**sample.kwargs)
    (folder,) = jobs.run(job)
    tensors = load_file(folder / "model.safetensors")
    found = {name: tensors[f"{stored(name)}.input_scale"] for name in job.plan.quantized}
    assert all(scale.shape == (1,) and scale.dtype == torch.float32 for scale in found.values())
    assert {n: s.item() * 448 for n, s in found.items()} == pytest.approx(peaks, rel=1e-6) and len(
        found
    ) == 35
    group = json.loads((folder / "config.json").read_text())["quantization_config"][
        "config_groups"
    ]["group_0"]
    assert (group["input_activations"]["dynamic"], group["input_activations"]["strategy"]) == (
        False,
        "tensor",
    )
    weights, engine = (
        from_quantized(folder, dtype="float32").model,
        load_any(str(folder), dtype="float32").model,
    )
    exact, rounded = logits_of(weights, inputs()[0]), logits_of(engine, inputs()[0])
    assert 1e-4 < ((exact - rounded).std() / exact.std()).item() < 0.2
    assert not [f for f in check_files(folder) if f.severity == "error"]
    tensors[f"{stored(next(iter(found)))}.input_scale"] *= 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert [f.where.rpartition(".")[2] for f in check_files(folder) if f.severity == "error"] == [
        "input_scale"
    ]


def test_other_formats_refuse_eight_bit_activations(tmp_path: Path) -> None:
    for name in ("auto_round", "auto_gptq", "fake"):
        with pytest.raises(UserError, match=f"nothing to quantize: {name}.*8-bit activations"):
            run(tmp_path, bits=8, act_bits=8, format=name)


def test_tokens_are_rounded_each_on_its_own_scale() -> None:
    x = torch.tensor([[127.0, 63.4, -1.6], [0.0, 0.0, 0.0], [1e-3, -2e-3, 0.0]])
    assert (
        integers_a_token(x)[0].tolist() == [127.0, 63.0, -2.0]
        and integers_a_token(x)[1].abs().sum() == 0
    )
    assert torch.allclose(integers_a_token(x)[2], x[2], atol=2e-3 / 254)


def test_a_checkpoint_of_llm_compressor(tmp_path: Path) -> None:
    """Its shape: made by compressed-tensors' own compressor, ignore by full names, integer fields
    in another order."""
    model, (folder,) = load("demo").model, run(tmp_path, group_size=32)[1]
    config = json.loads((folder / "config.json").read_text())
    scheme = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group",
        "group_size": 32,
              "symmetric": False, "observer": "minmax", "zp_dtype": "torch.int8"}}  # fmt: skip
    ours = config["quantization_config"]
    kept = [
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and "language_model.layers" not in n
    ]
    config["quantization_config"] = {
        "config_groups": {"group_0": scheme | {"format": None, "input_activations": None,
            "output_activations": None}},
        "format": "pack-quantized", "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "ignore": [stored(n) for n in kept], "sparsity_config": {}, "transform_config": {},
        "version": "0.20.0",
    }  # fmt: skip
    args = QuantizationConfig.model_validate(config["quantization_config"]).config_groups["group_0"]
    tensors = load_file(folder / "model.safetensors")
    wanted = {}
    for name in sorted(
        n.removesuffix(".weight_packed") for n in tensors if n.endswith(".weight_packed")
    ):
        shape = tensors[f"{name}.weight_shape"].tolist()
        scale = torch.rand(shape[0], shape[1] // 32) * 1e-2 + 1e-3
        zero = torch.randint(-8, 8, scale.shape).to(torch.int8)
        local = {
            "weight": torch.randn(shape) * 0.05,
            "weight_scale": scale.bfloat16(),
            "weight_zero_point": zero,
        }
        compressor = BaseCompressor.get_value_from_registry("pack-quantized")
        local = compressor.compress(local, args)
        wanted[f"{name}.weight"] = compressor.decompress(local, args)["weight"]
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in local.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    assert ours["config_groups"].keys() == config["quantization_config"]["config_groups"].keys()
    decoded = {stored(n): t for n, t in from_quantized(folder).model.state_dict().items()}
    assert (
        all(torch.equal(decoded[name], tensor) for name, tensor in wanted.items())
        and len(wanted) == 35
    )


# What llm-compressor can write and our reader does not compute: change of the configuration, what
# is said, whether the weights alone are readable.
BEYOND = {
    "static integers": (
        {"input_activations": {"symmetric": False, "strategy": "tensor", "dynamic": False}},
        "inputs of 8 bit int, asymmetric, static, one scale by tensor", True,
    ),
    "asymmetric integers": ({"input_activations": {"symmetric": False}}, "asymmetric", True),
    "one scale for all tokens": ({"input_activations": {"strategy": "tensor"}}, "by tensor", True),
    "outputs": ({"output_activations": {"num_bits": 8}}, "what layers give", True),
    "an int8 cache": (
        {"kv_cache_scheme": {"num_bits": 8, "type": "int", "strategy": "tensor"}},
        "keys and values of 8 bit int", True,
    ),
    "transformed inputs": (
        {"transform_config": {"config_groups": {"R4": {"type": "hadamard", "apply": [
            {"targets": ["re:.*down_proj$"], "location": "input"}]}}}},
        "engines transform what layers read", False,
    ),
}  # fmt: skip


def test_what_engines_compute_and_our_reader_does_not_is_one_line(tmp_path: Path) -> None:
    folder = run(tmp_path, bits=8, act_bits=8)[1][0]
    written = json.loads((folder / "config.json").read_text())
    load_any(str(folder))
    for changes, said, readable in BEYOND.values():
        config = json.loads(json.dumps(written))
        quantization = config["quantization_config"]
        group = quantization["config_groups"]["group_0"]
        for key, value in changes.items():
            if key in group:
                group[key] = (group[key] or {}) | value
            else:
                quantization[key] = value
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=said):
            load_any(str(folder))
        found = [f.message for f in check_files(folder) if f.severity == "warning"]
        assert any(said in message for message in found), found
        if readable:
            from_quantized(folder)
        else:
            with pytest.raises(UserError, match=said):
                from_quantized(folder)


def test_transforms_that_are_in_the_weights_are_read() -> None:
    applied = [{"targets": ["Linear"], "location": "weight_input"}]
    config = ct.WORDS.config(Layout({"m": Scheme()}, [], [], str, Scheme()))
    config["transform_config"] = {"config_groups": {"R1": {"type": "hadamard", "apply": applied}}}
    assert formats.unread(config, True) is None
