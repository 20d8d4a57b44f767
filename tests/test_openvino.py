"""OpenVINO: what it holds, and (slow, in its own environment) the converted graphs against the
tuned weights."""

import shutil
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from asking import run_engine, same_weights
from tiny_models import FAMILIES, sliding_gemma, tiny_tokenizer

from auto_mmround.checkpoint.loader import from_quantized
from auto_mmround.errors import UserError
from auto_mmround.evaluate.metrics import logits_of
from auto_mmround.export.format import Whole
from auto_mmround.export.openvino import format as openvino
from auto_mmround.export.openvino.read import GRAPHS
from auto_mmround.model.loading import DEMO
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.recipe.schemes import Scheme
from auto_mmround.run import job as jobs
from auto_mmround.verify.engines import interpreter
from auto_mmround.verify.static import check
from auto_mmround.verify.verify import verify

ROOT = Path(__file__).parent.parent
PYTHON = interpreter("openvino", ROOT)
engine = pytest.mark.skipif(
    not PYTHON.is_file(), reason="scripts/engines.sh openvino installs the engine"
)
RECIPE = Recipe(model="demo", iters=0, device="cpu", format="openvino", group_size=64)


@pytest.mark.parametrize(
    ("scheme", "shape", "reason"),
    [
        (Scheme(4, 64), (64, 128), None),
        (Scheme(8, -1, False, scale_dtype="bf16"), (63, 130), None),
        (Scheme(3, 64), (64, 128), "holds 4, 8 bits, not 3"),
        (Scheme(4, 64), (64, 96), "96 inputs are no multiple of the group size 64"),
        (Scheme(4, -1), (64, 33), "33 inputs are no multiple of 2"),
    ],
)
def test_check(scheme: Scheme, shape: tuple[int, int], reason: str | None) -> None:
    found = openvino.FORMAT.check(scheme, *shape)
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize("family", ["whisper", "llava_next"])
def test_what_is_not_converted_is_said_beforehand(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = FAMILIES[family].build().config.to_dict()
    if family == "whisper":
        with pytest.raises(UserError, match=r"decoders of text, .* not whisper"):
            openvino.check_model(config, (), None)
    else:
        openvino.check_model(config, (), None)
        assert "of llava_next only the language model is converted" in caplog.text


@pytest.mark.parametrize(
    ("graph", "said"),
    [(None, "has no openvino_model.xml"), ("<net>", "is damaged"), ("<net/>", "is damaged")],
)
def test_damaged_graphs_are_one_line(graph: str | None, said: str, tmp_path: Path) -> None:
    if graph is not None:
        (tmp_path / "openvino_model.xml").write_text(graph)
    with pytest.raises(UserError, match=said):
        dict(openvino.read(tmp_path))


def test_without_the_converter_nothing_is_tuned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # no .engines here, and the tests' own environment has no openvino
    if openvino.importlib.util.find_spec("openvino"):
        pytest.skip("openvino is installed beside the program")
    recipe = replace(RECIPE, output_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"scripts/engines\.sh openvino"):
        jobs.prepare(recipe, jobs.load_model(recipe))
    assert not (tmp_path / "out").exists()


@engine
@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "sym", "kind", "scales"),
    [(4, True, "i4", "fp16"), (4, False, "u4", "fp16"), (8, False, "u8", "bf16")],
)
def test_verify_reads_the_graphs_and_asks_the_plugin(
    bits: int, sym: bool, kind: str, scales: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text and image; the decoded graphs are what MLX's files hold of the same codes, bit for
    bit."""
    monkeypatch.chdir(ROOT)
    changes = {
        "bits": bits,
        "sym": sym,
        "scale_dtype": scales,
        "format": "openvino,mlx",
        "output_dir": str(tmp_path),
    }
    job = jobs.prepare(recipe := replace(RECIPE, **changes), jobs.load_model(recipe))
    folder, reference = jobs.run(job)
    assert same_weights(folder, from_quantized(reference).model.state_dict()) == []
    done = verify(folder, ["openvino"], source=DEMO)
    (verdict,) = done.verdicts
    assert done.findings == () and verdict.status == "right", (done.findings, verdict.line())
    assert verdict.layers == verdict.planned == 35 and verdict.gap < 1e-3
    # eight each of a text and an image
    assert verdict.tokens is not None and verdict.tokens[1] == 16
    xml = (folder / "openvino_language_model.xml").read_text()
    assert xml.count(f'element_type="{kind}"') == 35 * (1 if sym else 2)


@engine
@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_vl", "llava"])
def test_quantized_towers_give_the_same_images(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random models: the image reaches the logits, which are those of the decoded weights."""
    monkeypatch.chdir(ROOT)
    tiny = FAMILIES[family]
    tiny.save(tmp_path / "source", tiny_tokenizer())
    changes = {"model": str(tmp_path / "source"), "quant_nontext_module": True, "group_size": 32}
    recipe = replace(RECIPE, algorithm="rtn", output_dir=str(tmp_path), **changes)
    job = jobs.prepare(recipe, jobs.load_model(recipe))
    (folder,) = jobs.run(job)
    inputs = [tiny.media["image"](seed) for seed in range(2)]
    result = run_engine("openvino", folder, inputs, python=PYTHON, new_tokens=2)
    assert result.ok, result.error
    assert result.quantized == len(job.plan.quantized) and any(
        "vis" in name for name in job.plan.quantized
    )
    model = from_quantized(folder, dtype="float32").model
    for kwargs, found, tokens in zip(inputs, result.logits, result.tokens):
        wanted = logits_of(model, kwargs)
        assert (found[0] - wanted).abs().max() < 1e-3 * wanted.std()
        made = model.generate(**kwargs, max_new_tokens=2, do_sample=False, eos_token_id=[-1])
        assert tokens[0].tolist() == made[0, -2:].tolist()


BREAKS = {
    "a graph is gone": (lambda f: (f / f"{GRAPHS[1]}.xml").unlink(), "can't be decoded"),
    "a tower is gone": (lambda f: (f / f"{GRAPHS[3]}.xml").unlink(), "according to run.json"),
    "values are cut off": (
        lambda f: (f / f"{GRAPHS[1]}.bin").write_bytes(b"\0" * 1000),
        "can't be decoded",
    ),
    "one code is another": (
        lambda f: flip(f / f"{GRAPHS[1]}.bin"),
        "does not decode to what was tuned",
    ),
    "one tensor of the tower is another": (
        lambda f: flip(f / f"{GRAPHS[3]}.bin"),
        "is not what the run wrote",
    ),
    "one embedding is another": (
        lambda f: flip(f / f"{GRAPHS[2]}.bin"),
        "has other values than in",
    ),
    "the rest is gone": (lambda f: (f / "openvino_rest.safetensors").unlink(), "can't be decoded"),
}


def flip(path: Path) -> None:
    """One bit in the middle of a file."""
    values = bytearray(path.read_bytes())
    values[len(values) // 2] ^= 1
    path.write_bytes(bytes(values))


@engine
@pytest.mark.slow
def test_every_way_to_break_the_graphs_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    recipe = replace(RECIPE, algorithm="rtn", output_dir=str(tmp_path))
    (folder,) = jobs.run(jobs.prepare(recipe, jobs.load_model(recipe)))
    assert check(folder) == []
    for name, (change, said) in BREAKS.items():
        broken = tmp_path / name
        shutil.copytree(folder, broken)
        change(broken)
        assert said in " ".join(finding.line() for finding in check(broken)), name


@engine
@pytest.mark.slow
def test_sliding_windows_survive_the_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small random Gemma 3, window 8, on 24 tokens: the converter's own check and ours see the
    window."""
    monkeypatch.chdir(ROOT)
    source = sliding_gemma(tmp_path / "tiny")
    recipe = replace(
        RECIPE, model=str(source), group_size=32, format="openvino,mlx", output_dir=str(tmp_path)
    )
    folder, reference = jobs.run(jobs.prepare(recipe, jobs.load_model(recipe)))
    inputs = {
        "input_ids": torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(1))
    }
    result = run_engine("openvino", folder, [inputs], python=PYTHON)
    wanted = logits_of(from_quantized(reference, dtype="float32").model, inputs)
    assert result.ok and result.quantized == 21
    assert (result.logits[0][0] - wanted).abs().max() < 1e-3 * wanted.std()
    image = [inputs | {"pixel_values": torch.zeros(4, 1176)}]
    refused = run_engine("openvino", folder, image, python=PYTHON)
    assert not refused.ok and "['pixel_values']" in str(refused.error)


def test_the_floats_for_the_converter_are_written_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A converter that only counts; each tensor is gone when the next one is made."""
    converter = tmp_path / "python"
    converter.write_text(
        '#!/bin/sh\necho "{\\"ok\\": false, \\"error\\": \\"$(ls $(dirname $4) | tr \'\\n\' \''
        ' \')\\"}"\n'
    )
    converter.chmod(0o755)
    monkeypatch.setattr(openvino, "converter_python", lambda: converter)
    alive: list[weakref.ref[torch.Tensor]] = []

    def rest() -> Iterator[tuple[str, torch.Tensor]]:
        for i in range(4):
            assert not any(made() is not None for made in alive[:-1])
            tensor = torch.full((8, 8), float(i))
            alive.append(weakref.ref(tensor))
            yield f"t{i}", tensor

    whole = Whole({}, rest(), {"architectures": ["X"]}, None, None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"X: codes config.json model.safetensors request.json"):
        openvino.write(tmp_path, whole)
    assert len(alive) == 4
