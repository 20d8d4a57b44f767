"""Numbers at the ends of what dtypes hold: refused by name, given other scales, or kept, and
said."""

import json

import pytest
import torch
from nearest import round_to_nearest
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, tiny_texts, tiny_tokenizer

from auto_mmround import AutoRoundMLLM
from auto_mmround.checkpoint.reading import dequantized_state_dict
from auto_mmround.cli import main
from auto_mmround.errors import UserError
from auto_mmround.numerics import float_grids, grids, super_grids
from auto_mmround.numerics.grids import Grid

DOWN = "model.layers.0.mlp.down_proj"
NORM = "model.layers.0.input_layernorm.weight"
ROWS = tiny_texts(16, 32)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    FAMILIES["qwen3"].save(folder, tiny_tokenizer())
    (folder / "t.txt").write_text("\n".join(ROWS))
    return folder


@pytest.fixture
def changed(source, tmp_path):
    """changed(name, f): the source with another tensor of that name, f of the old one."""

    def make(name, f):
        folder = tmp_path / "model"
        folder.mkdir()
        for path in source.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = f(tensors[name].clone() if name in tensors else None).contiguous()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def set_at(value):
    return lambda w: w.index_put(
        (torch.tensor([3]), torch.tensor([5])) if w.ndim > 1 else (torch.tensor([3]),),
        torch.tensor(value),
    )


def run(folder, out, *flags):
    return main(["--model", str(folder), "--group_size", "32", "--output_dir", str(out), *flags])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [f"{DOWN}.weight", NORM, "model.embed_tokens.weight"])
@pytest.mark.parametrize(
    "flags", [["--iters", "0"], ["--iters", "0", "--stream"], ["--iters", "1"]], ids=" ".join
)
def test_a_source_with_nan_or_infinity_is_refused_by_name(
    changed, tmp_path, capsys, name, value, flags
):
    folder = changed(name, set_at(value))
    assert run(folder, tmp_path / "o", "--dataset", str(folder / "t.txt"), *flags) == 2
    assert name in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_nan_in_a_tensor_that_the_model_does_not_read_is_refused(changed, tmp_path, capsys):
    folder = changed("mtp.layers.0.weight", lambda _: torch.full((4,), float("nan")))
    assert run(folder, tmp_path / "o", "--iters", "0") == 2
    assert "mtp.layers.0.weight" in capsys.readouterr().err


def test_a_cast_that_overflows_is_refused():
    model = FAMILIES["llama"].build()
    model.get_submodule(DOWN).weight.data *= 1e7
    with pytest.raises(UserError, match=rf"{DOWN}.weight holds NaN or infinity.*bfloat16"):
        AutoRoundMLLM(model.half(), tiny_tokenizer(), iters=0, group_size=32).quantize()


def test_nan_in_a_model_in_memory_is_refused():
    model = FAMILIES["llama"].build()
    model.model.norm.weight[3] = float("nan")
    with pytest.raises(UserError, match=r"model\.norm\.weight holds NaN"):
        AutoRoundMLLM(model, tiny_tokenizer(), iters=0, group_size=32).quantize()


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("size", [1e-8, 1e7])  # of weights that are about 0.1 otherwise
@pytest.mark.parametrize("iters", ["0", "1"])
def test_scales_that_float16_does_not_hold_are_wider_ones(changed, tmp_path, sym, size, iters):
    folder = changed(f"{DOWN}.weight", lambda w: w * size)
    flags = ["--iters", iters, "--format", "compressed_tensors,mlx", *([] if sym else ["--asym"])]
    assert run(folder, tmp_path / "o", "--dataset", str(folder / "t.txt"), *flags) == 0
    wanted = load_file(folder / "model.safetensors")[f"{DOWN}.weight"].float()
    outs = [path for path in (tmp_path / "o").iterdir() if path.is_dir()]
    assert len(outs) == 2
    for out in outs:
        got = dict(dequantized_state_dict(out))[f"{DOWN}.weight"]
        assert (got - wanted).norm() < 0.2 * wanted.norm()
        groups = json.loads((out / "config.json").read_text())["quantization_config"].get(
            "config_groups", {}
        )
        assert len(groups) < 2  # the dtype of scales makes no scheme of its own


@pytest.mark.parametrize("size", [1e-8, 1e7])
def test_a_weight_stays_where_the_format_has_float16_scales_alone(changed, tmp_path, capsys, size):
    folder = changed(f"{DOWN}.weight", lambda w: w * size)
    assert run(folder, tmp_path / "o", "--iters", "0", "--format", "auto_gptq") == 0
    error = " ".join(capsys.readouterr().err.split())
    assert f"{DOWN} stays" in error
    (out,) = (tmp_path / "o").iterdir()
    got, wanted = dict(dequantized_state_dict(out)), load_file(folder / "model.safetensors")
    assert torch.equal(got[f"{DOWN}.weight"], wanted[f"{DOWN}.weight"])
    assert f"{DOWN}.qweight" not in load_file(out / "model.safetensors")


def test_one_huge_outlier_keeps_its_weight_and_those_fused_with_it(changed, tmp_path):
    folder = changed("model.layers.0.mlp.up_proj.weight", set_at(1e30))
    assert run(folder, tmp_path / "o", "--iters", "0", "--format", "compressed_tensors") == 0
    (out,) = (tmp_path / "o").iterdir()
    packed = {key for key in load_file(out / "model.safetensors") if key.endswith("weight_packed")}
    assert f"{DOWN}.weight_packed" in packed
    assert not {f"model.layers.0.mlp.{name}_proj.weight_packed" for name in ("up", "gate")} & packed


def test_an_outlier_that_nvfp4_pays_with_all_other_numbers_keeps_the_weight(changed, tmp_path):
    folder = changed(f"{DOWN}.weight", set_at(3e5))
    assert (
        main(
            [
                "--model",
                str(folder),
                "--scheme",
                "NVFP4A16",
                "--iters",
                "0",
                "--format",
                "compressed_tensors",
                "--output_dir",
                str(tmp_path / "o"),
            ]
        )
        == 0
    )
    (out,) = (tmp_path / "o").iterdir()
    assert f"{DOWN}.weight_packed" not in load_file(out / "model.safetensors")


def test_groups_that_become_zeros_are_said(changed, tmp_path, capsys):
    folder = changed(f"{DOWN}.weight", lambda w: torch.cat([w[:2] * 1e-10, w[2:]]))
    assert run(folder, tmp_path / "o", "--iters", "0") == 0
    error = " ".join(capsys.readouterr().err.split())
    assert f"{DOWN} has groups" in error


def test_equalizing_out_of_range_is_refused(source, monkeypatch):
    from auto_mmround.run import pipeline

    def overflow(session, *_):
        session.model.get_submodule(DOWN).weight.data.mul_(1e8)

    monkeypatch.setattr(pipeline, "equalize", overflow)
    with pytest.raises(UserError, match=f"{DOWN}: once equalized"):
        AutoRoundMLLM(
            str(source), iters=1, group_size=32, equalize="awq", dataset=ROWS, seqlen=32
        ).quantize()


GRIDS = [
    Grid(bits, sym, dtype, scale_bits=fused, min_zero=least)
    for bits in (2, 4, 8)
    for sym, fused, least in ((True, None, 0), (False, None, 1), (False, 11 - bits, 0))
    for dtype in (
        (torch.float16, torch.bfloat16, torch.float32) if fused is None else (torch.float16,)
    )
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("size", [0.0, -0.0, 1e-40, 1e-9, 3e-7, 1.0, 1e6, 1e30])
def test_every_scale_is_finite_and_what_the_file_holds(grid, size):
    w_OI = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * size
    w_OI[0, :16] = -0.0
    codes = round_to_nearest(w_OI, 16, grid)
    scale_OG = codes.scale_OG.float()
    assert (
        codes.scale_OG.dtype == grid.scale_dtype
        and scale_OG.isfinite().all()
        and (scale_OG != 0).all()
    )
    if grid.scale_bits is not None:
        product = (scale_OG * codes.zero_OG).to(grid.scale_dtype).float()
        assert torch.equal(product, scale_OG * codes.zero_OG)
    assert grids.dequantize(codes).isfinite().all()
    fit = grid.fit(grids.to_groups(w_OI, 16))
    if not fit.small and not fit.large:
        assert (grids.dequantize(codes) - w_OI).norm() <= 0.7 * w_OI.norm()


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-9, 1.0, 1e6, 1e30])
@pytest.mark.parametrize(
    "kind, group", [("fp8", -1), ("fp8", 128), ("mxfp4", 32), ("mxfp8", 32), ("nvfp4", 16)]
)
def test_float_grids_at_the_ends(kind, group, size):
    w_OI = torch.randn(8, 128, generator=torch.Generator().manual_seed(0)) * size
    grid = float_grids.float_grid(kind, group, w_OI.abs().max())
    codes = round_to_nearest(w_OI, group, grid)
    w_OI = w_OI if size >= 1e-30 else w_OI * 0
    assert (grids.dequantize(codes) - w_OI).norm() <= 0.2 * w_OI.norm()


@pytest.mark.parametrize("size", [0.0, 1e-9, 1e6, 1e30])
@pytest.mark.parametrize("sym", [True, False])
def test_units_of_super_blocks_are_finite(sym, size):
    w_OGg = grids.to_groups(
        torch.randn(2, 512, generator=torch.Generator().manual_seed(0)) * size, 16
    )
    found = super_grids.search(
        w_OGg, torch.ones(32, 16), Grid(4, sym, scale_range=(-32, 31) if sym else (0, 63))
    )
    assert all(part.isfinite().all() for part in found) and (found.unit_OS2 != 0).all()
