"""A checkpoint folder: it has another name until it is whole; `config.json` comes last."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from auto_mmround.atomic import held, sync_file, sync_folder, write_json
from auto_mmround.errors import UserError
from auto_mmround.export import formats
from auto_mmround.untrusted import ARRAYS, belongs

_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx",
    ".onnx_data", ".ot", ".npz",
    ".index.json", ".partial", ".pkl", ".pickle", ".joblib",
)  # fmt: skip
# Files of one checkpoint only: configurations, and the records of a run, `eval` and `verify`. An
# adapter's configuration beside merged weights would make loaders look for the adapter.
_OWN_FILES = (
    "config.json", "quantization_config.json", "quantize_config.json", "quant_config.json",
    "hf_quant_config.json",
    "adapter_config.json",
    "recipe.toml", "run.json", "eval.json", "verify.json", "report.json", "report.html",
)  # fmt: skip
_UNDERWAY = (".partial", ".unfinished", ".wrong")  # endings of our folders that are no results


def check_free(out: Path, overwrite: bool = False) -> None:
    """Raises UserError if a checkpoint can't be put at ``out``.

    overwrite: :func:`commit` replaces an existing checkpoint. It never replaces a folder with other
    content.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, no folder: choose another")
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise UserError(
                f"the output folder {out} is not empty: choose another, or --overwrite replaces it"
            )
        if not (out / "config.json").is_file():
            raise UserError(
                f"{out} is not a checkpoint folder and will not be overwritten: choose another"
            )


def wrong_name(out: Path) -> Path:
    """The place of a checkpoint that does not hold the tuned values."""
    return out.with_name(out.name + ".wrong")


@contextmanager
def underway(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """An empty ``<out>.partial`` to write into, for `commit`; beside what a link at ``out`` leads
    to. A failure removes it.

    Raises UserError as `check_free` does, and if someone else writes there.
    """
    check_free(out, overwrite)
    out = _place(out)
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    with held(partial) as ours:
        if not ours:
            raise UserError(f"{out}: someone else is writing this checkpoint: choose another")
        for path in partial.iterdir():  # of a process that was killed
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def commit(partial: Path, out: Path) -> None:
    """Put the finished folder in its place, and then remove the one that was there before. A link
    stays one: what it leads to is replaced."""
    out = _place(out)
    old = out.with_name(out.name + ".old.partial")
    if out.exists():
        if old.exists():  # of a commit that was cut off
            shutil.rmtree(old)
        out.rename(old)
    partial.rename(out)
    sync_folder(out.parent)
    if old.exists():
        shutil.rmtree(old)


def _place(out: Path) -> Path:
    return out.resolve() if out.is_symlink() else out


def write_side_files(source: Path, out: Path) -> list[str]:
    """Copy all of the source but weights and configuration, byte for byte; returns the names.

    Hidden files and README are left out. Names are relative to ``out``.
    """
    chosen = side_files(source)
    for path in chosen:
        target = out / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        sync_file(target)
    return [str(path.relative_to(source)) for path in chosen]


def write_config(
    out: Path, config: Mapping[str, Any], quantization_config: Mapping[str, Any] | None
) -> None:
    """Write config.json, which makes the folder a checkpoint; None writes an unquantized one."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    if quantization_config is None:
        write_json(out / "config.json", plain)
        return
    if any(fmt.method and fmt.method.copied for fmt in formats.of_method(quantization_config)):
        write_json(out / "quantization_config.json", quantization_config)
    write_json(out / "config.json", {**plain, "quantization_config": dict(quantization_config)})


def side_files(source: Path) -> list[Path]:
    """The side files of a model folder. Raises UserError for a link to a file elsewhere."""
    chosen = [path for path in sorted(source.rglob("*")) if is_side_file(path, source)]
    strays = [path for path in chosen if not belongs(path, source)]
    if strays:
        raise UserError(
            f"{strays[0]} is a link out of the model's folder: nothing from elsewhere is copied;"
            " put the file there"
        )
    return chosen


def is_side_file(path: Path, source: Path) -> bool:
    """Whether a file of a model folder belongs unchanged into every checkpoint of the model.

    Earlier results in the folder do not.
    """
    parts = path.relative_to(source).parts
    hidden = any(
        part.startswith(".") or part == "__pycache__" or part.endswith(_UNDERWAY) for part in parts
    )
    hidden = hidden or any(
        (above / "run.json").is_file() for above in path.parents[: len(parts) - 1]
    )
    own = len(parts) == 1 and (path.name in _OWN_FILES or path.name.upper().startswith("README"))
    weights = path.name.endswith(_WEIGHTS) and parts[-1] not in ARRAYS
    return path.is_file() and not hidden and not own and not weights
