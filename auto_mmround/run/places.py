"""Where a run writes, and what it copies: whatever would stop it at the end stops it before
anything is loaded."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from auto_mmround.checkpoint.folder import check_free, side_files, wrong_name
from auto_mmround.errors import UserError
from auto_mmround.export import formats
from auto_mmround.export.format import WholeFormat
from auto_mmround.model.loading import find_folder
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run.finished import JOURNAL

# What is put behind a folder's name while it is made, and the longest name of a file in it that is
# not a side file.
ENDINGS = ("", ".partial", ".old.partial", ".wrong")
LONGEST_FILE = len("shard-00001.safetensors.partial")


def model_label(recipe: Recipe) -> str:
    """The model's name without its path, for folder names."""
    name = Path(recipe.model.rstrip("/")).name
    return Path(recipe.model).resolve().name or "model" if name in ("", ".", "..") else name


def folder_name(model: str, recipe: Recipe, format_name: str | None = None) -> str:
    """`<model>-w4g128-<format>`, with mixed bits w3.5g128; a colon, refused by some file systems,
    becomes a dash. Without a format the name of the folder in which the run keeps what is
    finished."""
    stem = Path(model.rstrip("/")).name or "model"
    end = f"-{format_name.replace(':', '-')}" if format_name else ".unfinished"
    bits = recipe.bits if recipe.target_bits is None else f"{recipe.target_bits:g}"
    return f"{stem}-w{bits}g{recipe.scheme.group_size}{end}"


def places(recipe: Recipe) -> tuple[Path, list[Path]]:
    """The folder of finished blocks, and the one of each format in the recipe's order."""
    root, label = Path(recipe.output_dir), model_label(recipe)
    return root / folder_name(label, recipe), [
        root / folder_name(label, recipe, name) for name in recipe.formats
    ]


def check_before_loading(recipe: Recipe) -> None:
    """Raises UserError for a format that can't be written or can't hold the schemes, for places
    that can't be written to, and for a model's folder that can't be copied from. A model of the hub
    is downloaded once the rest is right."""
    if recipe.kv_cache_scheme is not None:
        formats.check_kv_cache(recipe.formats)
    formats.check_schemes(recipe.formats, recipe.schemes)
    for fmt in map(formats.get, recipe.formats):
        if isinstance(fmt, WholeFormat):
            fmt.ready()
    unfinished, outs = places(recipe)
    check_places([unfinished, *outs], None)
    # else what exists may be this run's own
    if recipe.restart or not (unfinished / JOURNAL).is_file():
        for out in outs:
            check_free(out, recipe.overwrite)
    check_places([unfinished, *outs], find_folder(recipe.model))


def check_places(outs: Sequence[Path], source: Path | None) -> None:
    """Raises UserError if a folder can't be made at one of ``outs``, if it has to do with the
    model's own folder, and for files of the model that can't be copied."""
    longest = max((len(os.fsencode(str(path))) for path in _copied(source)), default=LONGEST_FILE)
    for out in outs:
        standing = _standing(out)
        if not standing.is_dir():
            kind = (
                "a link to nothing" if standing.is_symlink() and not standing.exists() else "a file"
            )
            raise UserError(f"output_dir: {standing} is {kind}, no folder: choose another")
        if not os.access(standing, os.W_OK | os.X_OK):
            raise UserError(
                f"output_dir: no files can be written to {standing}: choose another, or change its"
                " rights"
            )
        real = out.resolve()  # `is_mount` takes a link to another file system for one
        beside = real.parent
        if standing == out.absolute() and (
            real.is_mount() or not os.access(beside, os.W_OK | os.X_OK)
        ):
            raise UserError(
                f"output_dir: {out} would be exchanged for the finished folder, but is a mount, or"
                f" {beside} can't be written to: choose a folder inside it"
            )
        _check_length(out, standing, longest)
        for ending in ENDINGS:
            path = out.with_name(out.name + ending)
            link = bool(ending) and path.is_symlink()  # what it leads to would be emptied
            if link or (path.exists() and not path.is_dir()):
                kind = "link" if link else "file"
                raise UserError(
                    f"output_dir: {path} is a {kind}, no folder: remove it or choose another place"
                )
        if wrong_name(out).exists():
            check_free(wrong_name(out), overwrite=True)
        if source is not None:
            _check_apart(out, source)


def _check_apart(out: Path, source: Path) -> None:
    inner, outer = out.resolve(), source.resolve()
    if inner == outer or outer in inner.parents:
        raise UserError(
            f"output_dir: {out} lies in the model's folder {source}, whose files go into every"
            " checkpoint: choose a place outside"
        )
    if inner in outer.parents:
        raise UserError(f"output_dir: {out} holds the model's folder {source}: choose another")


def _copied(source: Path | None) -> Iterator[Path]:
    for path in side_files(source) if source is not None else ():
        if not os.access(path, os.R_OK):
            raise UserError(
                f"{path} can't be read, but belongs into every checkpoint: change its rights"
            )
        yield path.relative_to(source)  # type: ignore[arg-type]


def _check_length(out: Path, standing: Path, longest: int) -> None:
    """longest: bytes of the longest path of a file inside."""
    most, deepest = os.pathconf(standing, "PC_NAME_MAX"), os.pathconf(standing, "PC_PATH_MAX")
    end = max(map(len, ENDINGS))
    for part in (*out.parts[:-1], out.name + "x" * end):
        if len(os.fsencode(part)) > most:
            raise UserError(
                f"output_dir: the name {part[:40]}.. is too long for {standing}: {most} bytes are"
                " the most"
            )
    if len(os.fsencode(str(out.absolute()))) + end + 1 + longest >= deepest:
        raise UserError(
            f"output_dir: paths below {str(out)[:40]}.. are too long: {deepest} bytes are the most"
        )


def _standing(folder: Path) -> Path:
    """The folder, or the nearest thing above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if os.path.lexists(path))
