"""NVFP4, MXFP4 and MXFP8 in AutoRound's own files: read by us and by them, to the bit."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import FAMILIES, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from auto_mmround.checkpoint.loader import from_quantized
from auto_mmround.errors import UserError
from auto_mmround.export import formats
from auto_mmround.numerics.activations import rounded_inputs
from auto_mmround.numerics.float_grids import float_grid
from auto_mmround.numerics.grids import dequantize, to_groups
from auto_mmround.recipe.recipe import Recipe, from_mapping
from auto_mmround.recipe.schemes import Scheme
from auto_mmround.run import job as jobs
from auto_mmround.run.places import check_before_loading
from auto_mmround.verify.proof import prove
from auto_mmround.verify.static import check

pytest.importorskip("auto_round")
FLOAT = formats.get("auto_round:llm_compressor")
# data type -> bits, group size, and AutoRound's names of the preset, of weights and of inputs
KINDS = {
    "nvfp4": (4, 16, "NVFP4", "nv_fp", "nv_fp4_with_static_gs"),
    "mxfp4": (4, 32, "MXFP4", "mx_fp", "mx_fp"),
    "mxfp8": (8, 32, "MXFP8", "mx_fp", "mx_fp"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_packed_by_auto_round_it_is_what_we_pack(kind):
    from auto_round.data_type.nvfp import calculate_gparam
    from auto_round.data_type.utils import get_quant_func
    from auto_round.export.export_to_autoround.qlinear_fp import QuantLinear

    bits, size, _, called, inputs = KINDS[kind]
    torch.manual_seed(0)
    layer = torch.nn.Linear(96, 24, bias=False)
    layer.weight.data *= torch.rand(24, 96) * 3
    whole = calculate_gparam(layer.weight.data) if kind == "nvfp4" else None
    options = {"global_scale": whole} if kind == "nvfp4" else {}
    quant, _ = get_quant_func(inputs if kind == "nvfp4" else called, bits, True)
    rounded, scale, _ = quant(layer.weight.data, bits=bits, group_size=size, **options)
    peer = QuantLinear(bits, size, 96, 24, False, data_type=called, act_bits=bits)
    layer.weight.data = rounded
    peer.pack(layer, scale.reshape(24, -1), global_scale=whole)
    theirs = {f"x.{k}": v for k, v in peer.state_dict().items() if k != "input_global_scale"}
    codes = FLOAT.unpack("x", theirs, Scheme(bits, size, data_type=kind, act_bits=bits))
    torch.testing.assert_close(dequantize(codes), rounded, rtol=1e-6, atol=0)
    ours = FLOAT.pack("x", codes)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k].view(torch.uint8), theirs[k].view(torch.uint8)) for k in ours)


@pytest.mark.parametrize("called", ["nv_fp4_with_static_gs", "mx_fp", "mx_fp_rceil"])
@pytest.mark.parametrize("bits", [4, 8])
def test_inputs_are_rounded_as_its_layers_do(called, bits):
    from auto_round.data_type.utils import get_quant_func

    if (called, bits) == ("nv_fp4_with_static_gs", 8):
        pytest.skip("there is no such format")
    kind = "nvfp4" if called.startswith("nv") else f"mxfp{bits}"
    size = KINDS[kind][1]
    x = (torch.randn(200, 64) * torch.rand(200, 1) * 9).bfloat16().float()  # with ties
    x[0] = 0
    x[1, :size] = 2.0 ** torch.arange(-size, 0)
    quant, _ = get_quant_func(called, bits, True)
    whole = (448 * 6 / x.abs().max()).reshape(1) if kind == "nvfp4" else None
    wanted = quant(x.clone(), bits=bits, group_size=size, global_scale=whole)[0]
    how = "auto_round_rceil" if called.endswith("rceil") else "auto_round"
    assert torch.equal(rounded_inputs(x, kind, bits, size, whole, how), wanted)
    if kind == "mxfp4":
        assert not torch.equal(rounded_inputs(x, kind, bits, size), wanted)


def tiny(folder):
    FAMILIES["llama"].save(folder, tiny_tokenizer())
    return str(folder)


@every_kind
@pytest.mark.parametrize("iters", [0, 2])
def test_what_we_write_auto_round_loads_to_the_bit(kind, iters, tmp_path):
    """With layers that stay and an output head, which its configuration has to name."""
    bits, size, preset, called, inputs = KINDS[kind]
    base = Recipe(
        model=tiny(tmp_path / "model"), output_dir=str(tmp_path), device="cpu", amp=False,
        nsamples=8, seqlen=12, iters=iters, fp_layers="layers.1.mlp", quant_lm_head=True,
        format="auto_round",
    )  # fmt: skip
    recipe = from_mapping({"scheme": preset}, base=base)
    job = jobs.prepare(recipe, jobs.load_model(recipe), dataset=FAMILIES["llama"].samples(8))
    (made,) = jobs.run(job, prove=prove)
    assert not [finding for finding in check(made) if finding.severity == "error"]
    said = json.loads((made / "config.json").read_text())["quantization_config"]
    wanted = {
        "packing_format": "auto_round:llm_compressor", "quant_method": "auto-round", "bits": bits,
        "group_size": size, "sym": True, "data_type": called, "act_bits": bits, "act_sym": True,
        "act_data_type": inputs, "act_group_size": size, "act_dynamic": True,
    }  # fmt: skip
    assert wanted.items() <= said.items()
    ours = from_quantized(made, activations=True, dtype="bfloat16").model
    theirs = AutoModelForCausalLM.from_pretrained(made, dtype=ours.dtype)
    layers = [m for m in theirs.modules() if type(m).__name__.endswith("QuantLinear")]
    assert len(layers) == len(job.plan.quantized) and "lm_head" in job.plan.quantized
    ids = FAMILIES["llama"].samples(1)[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    tuned = job.loaded.model.state_dict()
    read = from_quantized(made).model.state_dict()
    assert all(torch.equal(tuned[name], read[name]) for name in tuned)


@pytest.mark.slow
@every_kind
def test_what_auto_round_writes_we_read_to_the_bit(kind, tmp_path):
    from auto_round import AutoRound

    source = tiny(tmp_path / "model")
    peer = AutoRound(
        AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source),
        scheme=KINDS[kind][2], iters=0, disable_opt_rtn=True, device_map="cpu",
        dataset=[torch.randint(100, (1, 32)) for _ in range(4)], nsamples=4, seqlen=32,
    )  # fmt: skip
    peer.quantize_and_save(str(tmp_path / "out"), format="auto_round")
    (made,) = (path.parent for path in (tmp_path / "out").rglob("config.json"))
    assert not [finding for finding in check(made) if finding.severity == "error"]
    ours = from_quantized(made, activations=True, dtype="bfloat16").model
    theirs = AutoModelForCausalLM.from_pretrained(made, dtype=ours.dtype)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    config = json.loads((made / "config.json").read_text())["quantization_config"]
    scheme_of, tensors = formats.reader(config), load_file(made / "model.safetensors")
    for name in FLOAT.packed(tensors):
        theirs = {k: t for k, t in tensors.items() if k.rpartition(".")[0] == name}
        packed = FLOAT.pack(name, FLOAT.unpack(name, theirs, scheme_of(name)))
        assert packed.keys() == theirs.keys()
        assert all(torch.equal(packed[k].view(torch.uint8), theirs[k].view(torch.uint8))
                   for k in packed)  # fmt: skip


@pytest.mark.parametrize(
    "values, text",
    [
        ({"scheme": "FP8"}, "auto_round:llm_compressor holds nvfp4, mxfp4, mxfp8, not fp8"),
        ({"scheme": "MXFP8", "act_bits": 16}, "beside 8-bit inputs only"),
        ({"scheme": "NVFP4A16"}, "beside 4-bit inputs only"),
        ({"scheme": "W4AFP8"}, "auto_round:auto_gptq cannot state 8-bit activations"),
        ({"scheme": "W4AFP8", "format": "compressed_tensors", "group_size": 32}, "by 128 columns"),
        ({"scheme": "MXFP8", "format": "auto_gptq"}, "auto_gptq holds integers, not mxfp8"),
        ({"scheme": "W8A8"}, "auto_round:auto_gptq cannot state 8-bit activations"),
        ({"bits": 3, "format": "auto_awq"}, "auto_awq holds 4 bits, not 3"),
    ],
)
def test_what_a_format_cannot_hold_is_said_before_the_model_is_looked_for(values, text, tmp_path):
    recipe = from_mapping({"model": str(tmp_path / "none"), "output_dir": str(tmp_path)} | values)
    with pytest.raises(UserError) as caught:
        check_before_loading(recipe)
    assert "nothing to quantize: " in str(caught.value) and text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_floats_of_auto_round_are_named(tmp_path):
    config = {"quant_method": "auto-round", "packing_format": "auto_round:llm_compressor",
              "bits": 4, "group_size": 32, "sym": True, "data_type": "mx_fp"}  # fmt: skip
    read = formats.reader(config)("x")
    assert (read.data_type, read.act_bits) == ("mxfp4", 16)
    for changed in ({"data_type": "mx_int"}, {"bits": 6}, {"group_size": 16},
                    {"act_bits": 8, "act_data_type": "fp"}):  # fmt: skip
        with pytest.raises(UserError, match="cannot read"):
            formats.reader(config | changed)("x")


def test_no_nvfp4_weight_stays_for_the_last_bit_of_its_largest_scale():
    """448 / peak * peak may be a little more than 448."""
    for seed in range(200):
        w_OI = torch.randn(8, 32, generator=torch.Generator().manual_seed(seed)) * 0.05
        w_OGg = to_groups(w_OI, 16)
        assert not float_grid("nvfp4", 16, w_OI.abs().max()).fit(w_OGg).large
