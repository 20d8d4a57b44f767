"""Where media may come from.

A file is read only if it lies below a folder that the user gave or next to the dataset's own file;
nothing is fetched from the network unless it is allowed by name.
"""

import base64
import binascii
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from auto_mmround.calibration.fetch import FetchError, Permitted, fetch, is_public
from auto_mmround.calibration.template import did_you_mean
from auto_mmround.errors import UserError
from auto_mmround.untrusted import belongs

MEDIA = ("image", "video", "audio")

DATA_URI = re.compile(r"data:[\w.+-]+/[\w.+-]+(?:;[\w=.-]+)*;base64,(?P<data>.*)", re.DOTALL)

BARE_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")

BYTES = {"image": 64 << 20, "video": 1 << 30, "audio": 256 << 20}


class MediaError(Exception):
    """One medium can't be used: the message names it and says why."""


@dataclass(frozen=True)
class Roots:
    """The folders searched for each kind of media, whether URLs may be fetched, and from which
    addresses."""

    folders: Mapping[str, tuple[Path, ...]]
    allow_url: bool = False
    permitted: Permitted = is_public


def parse_roots(
    extra_data_dir: str | Path | Sequence[str | Path] | None, allow_url: bool = False
) -> Roots:
    """`DIR`, `DIR,DIR` or `image=DIR,video=DIR,audio=DIR` (mixed and repeated as you like) to
    Roots.

    Raises UserError for an unknown kind or a folder that doesn't exist.
    """
    if extra_data_dir is None:
        items: list[str] = []
    elif isinstance(extra_data_dir, str | Path):
        whole = str(extra_data_dir)
        items = (
            [whole]
            if Path(whole).is_dir()
            else [item.strip() for item in whole.split(",") if item.strip()]
        )
    else:
        items = [str(item) for item in extra_data_dir]
    folders: dict[str, list[Path]] = {kind: [] for kind in MEDIA}
    for item in items:
        kind, mark, name = item.partition("=")
        if mark and not Path(item).is_dir():
            if kind not in MEDIA:
                raise UserError(
                    f"extra_data_dir: unknown kind {kind!r} in {item!r}{did_you_mean(kind, MEDIA)}"
                )
            kinds: tuple[str, ...] = (kind,)
        else:
            kinds, name = MEDIA, item
        if not Path(name).is_dir():
            raise UserError(f"extra_data_dir: the folder {name!r} doesn't exist")
        for each in kinds:
            folders[each].append(Path(name).resolve())
    return Roots({kind: tuple(paths) for kind, paths in folders.items()}, allow_url)


def find_file(reference: str, folders: Iterable[Path], base: Path | None) -> Path | None:
    """The file below one of the folders: by its full relative path, then by its bare name; else
    next to the dataset's file (or in `images`, `videos`, `audios` beside it).

    Links are followed before the test, so neither `..` nor a symbolic link leads outside.
    """
    if len(reference) > 1024 or "\0" in reference:
        return None
    places = [
        (folder, folder / name) for folder in folders for name in (reference, Path(reference).name)
    ]
    if base is not None:
        places += [(base, base / sub / reference) for sub in ("", "images", "videos", "audios")]
    for limit, place in places:
        # Names too long, links in a circle, letters that no file name has: not found.
        with suppress(OSError, ValueError, RuntimeError):
            real = place.resolve()
            if belongs(real, limit) and real.is_file():
                return real
    return None


def _download(url: str, kind: str, roots: Roots) -> bytes:
    try:
        return fetch(url, BYTES[kind], permitted=roots.permitted)
    except FetchError as error:
        raise MediaError(f"{kind} {url[:200]} can't be fetched: {error}") from error


def _read(path: Path, kind: str) -> bytes:
    """A file, one byte more than allowed at most: it may grow while it is read."""
    try:
        with path.open("rb") as file:
            return file.read(BYTES[kind] + 1)
    except OSError as error:
        raise MediaError(f"{kind} {path} can't be read: {error.strerror}") from error


def _base64(text: str, kind: str) -> bytes:
    if len(text) > BYTES[kind] * 3 // 2:
        raise MediaError(f"{kind} in base64 is larger than {BYTES[kind] >> 20} MiB")
    try:
        return base64.b64decode(re.sub(r"\s", "", text), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"{kind} in base64 is damaged: {error}") from error


def content(
    reference: str, kind: str, roots: Roots, base: Path | None, remote: str
) -> tuple[bytes, str]:
    """(content, name for messages) of a medium named by a path, a data URI, base64 or a URL."""
    folders = roots.folders[kind]
    if match := DATA_URI.fullmatch(reference):
        return _base64(match["data"], kind), f"{kind} in a data URI"
    url = reference if re.match(r"https?://", reference) else None
    path = find_file(
        reference if url is None else url.rpartition("/")[2], folders, base if url is None else None
    )
    if path is not None:
        return _read(path, kind), f"{kind} {path}"
    if url is None and BARE_BASE64.fullmatch(reference):
        return _base64(reference, kind), f"{kind} in base64"
    if url is None and remote:
        url = remote + Path(reference).name
    if url is not None and roots.allow_url:
        return _download(url, kind, roots), f"{kind} {url[:200]}"
    where = (
        ", ".join(str(folder) for folder in (*folders, *((base,) if base else ())))
        or "no folder was given"
    )
    hint = " (URLs are not fetched unless allowed)" if url is not None else ""
    raise MediaError(
        f"{kind} {reference[:200]} was not found in: {where}{hint}; give --extra_data_dir"
        f" {kind}=DIR"
    )
