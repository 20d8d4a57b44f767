"""The data files of a folder: our own list of them, by their names alone. Cards and other metadata
in the folder are never asked, so nothing that they say can lead the reader elsewhere.

train-00000-of-00002.parquet   a split by its file's name        data/ is a split's or a config's
usual home clean/test/0000.parquet        config `clean`, split `test`      by the names of folders
dataset_dict.json, state.json  what `save_to_disk` of `datasets` has written
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auto_mmround.calibration.named import Named
from auto_mmround.calibration.tables import PLAIN, TABLES, Joined, ending, is_data, read_files
from auto_mmround.errors import UserError
from auto_mmround.untrusted import belongs, is_plain, read_object

log = logging.getLogger("auto_mmround")

ENTRIES = 1_000_000  # files and folders looked at in one folder
SPLITS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
SHARD = re.compile(r"(?P<split>[\w.]+(?:-[\w.]+)*?)-\d{5,}-of-\d{5,}(?:-[0-9a-f]+)?")
PART = re.compile(r"(?P<name>[^\[\]]*)(?:\[(?P<start>\d*)(?P<p>%?):(?P<end>\d*)(?P<q>%?)\])?")
# Files that lie beside data and are none.
METADATA = {
    "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json",
    "requirements.txt",
    "license.txt", "readme.txt", "croissant.json",
}  # fmt: skip


@dataclass(frozen=True)
class DataFile:
    """One file of a folder. split: as its name says it, "" if it says none. config: the folders
    above it."""

    path: Path
    split: str = ""
    config: str = ""

    @property
    def usual(self) -> str:
        """The split by its usual name: train.100 is a part of train, dev of validation, no name
        means train."""
        return _keyword(self.split) or self.split or "train"


def walk(folder: Path) -> list[Path]:
    """All files below a folder, sorted; hidden ones left out, links to folders not followed.

    Raises UserError for too many of them, and for a data file or folder that is a link out of the
    folder.
    """
    files, seen = [], 0
    for place, inner, names in os.walk(folder, onerror=_unreadable):
        inner[:] = sorted(name for name in inner if not name.startswith((".", "__")))
        seen += len(inner) + len(names)
        if seen > ENTRIES:
            raise UserError(
                f"dataset folder {folder} holds more than {ENTRIES:,} files: name a folder"
                " inside it"
            )
        for path in (Path(place, name) for name in (*inner, *names)):
            if path.is_symlink() and (path.is_dir() or is_data(path)) and not belongs(path, folder):
                raise UserError(
                    f"dataset {path} is a link out of its folder, which is not followed: copy it"
                    " there"
                )
        files += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(path for path in files if path.is_file())


def _unreadable(error: OSError) -> None:
    raise UserError(f"dataset folder {error.filename} can't be read: {error.strerror}")


def data_files(folder: Path, files: Sequence[Path]) -> list[DataFile]:
    """The files that hold the rows of a folder: what `save_to_disk` lists, else tables, else plain
    files. Plain files deeper down count only where the folder itself has none. A warning names the
    endings of files that stay unread."""
    saved = _saved(folder)
    if saved is not None:
        return saved
    data = [path for path in files if is_data(path) and path.name.lower() not in METADATA]
    tables = [path for path in data if ending(path) in TABLES]
    plain = [path for path in data if ending(path) in PLAIN[:4]] or data
    chosen = tables or [path for path in plain if path.parent == folder] or plain
    endings = {ending(path) for path in chosen}
    if left := Counter(ending(path) for path in data if ending(path) not in endings):
        counted = ", ".join(f"{count} {end}" for end, count in left.items())
        log.warning(
            "dataset folder %s: its %s files are read; left out: %s",
            folder,
            "/".join(sorted(endings)),
            counted,
        )
    return [_named(path, folder) for path in chosen]


def _named(path: Path, folder: Path) -> DataFile:
    """Split and config by the names of the file and of the folders above it, the nearest first."""
    *above, name = path.relative_to(folder).parts
    above = above[1:] if above[:1] == ["data"] else above
    stem = name.removesuffix(".gz").rpartition(".")[0]
    split = shard["split"] if (shard := SHARD.fullmatch(stem)) else stem if _keyword(stem) else ""
    if (
        not split
        and (level := next((i for i in reversed(range(len(above))) if _keyword(above[i])), None))
        is not None
    ):
        split = above.pop(level)
    return DataFile(path, split, "/".join(above))


def _keyword(name: str) -> str | None:
    return next(
        (SPLITS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in SPLITS), None
    )


def _saved(folder: Path) -> list[DataFile] | None:
    """The files of a folder that `save_to_disk` has written, as its own lists name them; None for
    any other folder."""
    if (folder / "dataset_dict.json").is_file():
        names = read_object(folder / "dataset_dict.json").get("splits")
        if not isinstance(names, list) or not all(
            isinstance(name, str) and is_plain(name) for name in names
        ):
            raise UserError(
                f"dataset {folder / 'dataset_dict.json'} must list the folders of its splits"
            )
        return [DataFile(file.path, name) for name in names for file in _saved(folder / name) or ()]
    if not (folder / "state.json").is_file():
        return None
    state = read_object(folder / "state.json")
    listed = state.get("_data_files")
    if listed is None:
        return None
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise UserError(
            f"dataset {folder} keeps the order of its rows apart: flatten_indices() and save it"
            " again"
        )
    return [DataFile(path, str(state.get("_split") or "")) for path in _listed(listed, folder)]


def _listed(entries: Any, folder: Path) -> Iterator[Path]:
    for entry in entries if isinstance(entries, list) else [entries]:
        name = entry.get("filename") if isinstance(entry, dict) else entry
        if not isinstance(name, str) or not is_plain(name) or not name.endswith(".arrow"):
            raise UserError(
                f"dataset {folder / 'state.json'} names {str(name)[:99]!r}, no Arrow file beside it"
            )
        if not (folder / name).is_file() or not belongs(folder / name, folder):
            raise UserError(
                f"dataset {folder / 'state.json'} names {name}, which is not in its folder: copy it"
                " again"
            )
        yield folder / name


def read(
    folder: Path,
    files: Sequence[DataFile],
    config: str | None,
    split: str | None,
    named: Named | None,
) -> Joined:
    """The rows of one config and of a split (`train`, `train+test`, `test[:10%]`).

    Without the user's choice: what is usual for the named set if it is there, else the only config,
    and `train` or the first split. Raises UserError with the names to choose from.
    """
    files = _of_config(folder, files, config, named)
    if split is None:
        there = {name for file in files for name in (file.split, file.usual)}
        usual = [
            named.split if named else "train",
            "train",
            "validation",
            *(file.usual for file in files),
        ]
        split = next(name for name in usual if name in there)
        left = sorted({file.split or file.usual for file in files if file not in _of(files, split)})
        if left:
            log.info("dataset folder %s: split %s is read, not %s", folder, split, ", ".join(left))
    parts = []
    for part in split.split("+"):
        match = PART.fullmatch(part.strip())
        chosen = _of(files, match["name"]) if match else []
        if match is None or not chosen:
            known = ", ".join(dict.fromkeys(file.split or file.usual for file in files))
            raise UserError(
                f"dataset {folder} can't be loaded: it has no split {part.strip()!r}. Available:"
                f" {known}"
            )
        parts += _cut(read_files([file.path for file in chosen]), match).parts
    return Joined(parts)


def _of(files: Iterable[DataFile], split: str) -> list[DataFile]:
    """The files of a split: those that name it so, else those that are a part of it."""
    return [file for file in files if file.split == split] or [
        file for file in files if file.usual == split
    ]


def _of_config(
    folder: Path, files: Sequence[DataFile], config: str | None, named: Named | None
) -> list[DataFile]:
    known = list(dict.fromkeys(file.config for file in files))
    if config is None and named and named.config in known:
        config = named.config
    if config is None and len(known) > 1:
        names = ", ".join(name or "default" for name in known)
        raise UserError(
            f"dataset {folder} has several configs, choose with config=: {names} (several: a+b)"
        )
    wanted = (
        known
        if config is None
        else ["" if name == "default" else name for name in config.split("+")]
    )
    if config == "default" and config in known:
        wanted = [config]
    for name in wanted:
        if name not in known:
            names = ", ".join(each or "default" for each in known)
            raise UserError(
                f"dataset {folder} can't be loaded: it has no config {name!r}. Available: {names}"
            )
    return [file for file in files if file.config in wanted]


def _cut(rows: Joined, match: re.Match[str]) -> Joined:
    """The rows that a slice such as [10:20] or [:5%] leaves."""
    if match["start"] is None:
        return rows
    total = len(rows)
    return rows.cut(
        _row(match["start"], match["p"], total, 0), _row(match["end"], match["q"], total, total)
    )


def _row(number: str, percent: str, total: int, default: int) -> int:
    return (
        default if not number else int(number[:18]) * total // 100 if percent else int(number[:18])
    )
