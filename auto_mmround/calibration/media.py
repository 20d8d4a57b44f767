"""Images, video and audio of a sample: where they may come from, and readers with bounds.

A file is read only if it lies below a folder that the user gave or next to the dataset's own file; nothing is fetched
from the network unless it is allowed by name.
"""

import base64
import binascii
import io
import re
import struct
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from auto_mmround.calibration.template import did_you_mean
from auto_mmround.errors import UserError

KINDS = ("image", "video", "audio")
# Raster formats only: Pillow's EPS reader would start another program.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
DATA_URI = re.compile(r"data:[\w.+-]+/[\w.+-]+(?:;[\w=.-]+)*;base64,(?P<data>.*)", re.DOTALL)
BARE_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")
BYTES = {"image": 64 << 20, "video": 1 << 30, "audio": 256 << 20}
PIXELS = 64_000_000
FRAMES = 8
SECONDS = 600
URL_TIMEOUT = 15


class MediaError(Exception):
    """One medium can't be used: the message names it and says why."""


@dataclass(frozen=True)
class Roots:
    """The folders searched for each kind of media, and whether URLs may be fetched."""

    folders: Mapping[str, tuple[Path, ...]]
    allow_url: bool = False


def parse_roots(extra_data_dir: str | Path | Sequence[str | Path] | None, allow_url: bool = False) -> Roots:
    """`DIR`, `DIR,DIR` or `image=DIR,video=DIR,audio=DIR` (mixed and repeated as you like) to Roots.

    Raises UserError for an unknown kind or a folder that doesn't exist.
    """
    if extra_data_dir is None:
        items: list[str] = []
    elif isinstance(extra_data_dir, str | Path):
        whole = str(extra_data_dir)
        items = [whole] if Path(whole).is_dir() else [item.strip() for item in whole.split(",") if item.strip()]
    else:
        items = [str(item) for item in extra_data_dir]
    folders: dict[str, list[Path]] = {kind: [] for kind in KINDS}
    for item in items:
        kind, mark, name = item.partition("=")
        if mark and not Path(item).is_dir():
            if kind not in KINDS:
                raise UserError(f"extra_data_dir: unknown kind {kind!r} in {item!r}{did_you_mean(kind, KINDS)}")
            kinds: tuple[str, ...] = (kind,)
        else:
            kinds, name = KINDS, item
        if not Path(name).is_dir():
            raise UserError(f"extra_data_dir: the folder {name!r} doesn't exist")
        for each in kinds:
            folders[each].append(Path(name).resolve())
    return Roots({kind: tuple(paths) for kind, paths in folders.items()}, allow_url)


def find_file(reference: str, folders: Iterable[Path], base: Path | None) -> Path | None:
    """The file below one of the folders: by its full relative path, then by its bare name; else next to the dataset's
    file (or in `images`, `videos`, `audios` beside it).

    Links are followed before the test, so neither `..` nor a symbolic link leads outside.
    """
    if len(reference) > 1024 or "\0" in reference:
        return None
    places = [(folder, folder / name) for folder in folders for name in (reference, Path(reference).name)]
    if base is not None:
        places += [(base, base / sub / reference) for sub in ("", "images", "videos", "audios")]
    for limit, place in places:
        real = place.resolve()
        if real.is_relative_to(limit.resolve()) and real.is_file():
            return real
    return None


def _download(url: str, kind: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=URL_TIMEOUT) as answer:
            data = answer.read(BYTES[kind] + 1)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise MediaError(f"{kind} {url} can't be fetched: {error}") from error
    return bytes(data)


def _base64(text: str, kind: str) -> bytes:
    try:
        return base64.b64decode(re.sub(r"\s", "", text), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"{kind} in base64 is damaged: {error}") from error


def _bytes(reference: str, kind: str, roots: Roots, base: Path | None, remote: str) -> tuple[bytes, str]:
    """(content, name for messages) of a medium named by a path, a data URI, base64 or a URL."""
    folders = roots.folders[kind]
    if match := DATA_URI.fullmatch(reference):
        return _base64(match["data"], kind), f"{kind} in a data URI"
    url = reference if re.match(r"https?://", reference) else None
    path = find_file(reference if url is None else url.rpartition("/")[2], folders, base if url is None else None)
    if path is not None:
        if path.stat().st_size > BYTES[kind]:
            raise MediaError(f"{kind} {path} is larger than {BYTES[kind] >> 20} MiB")
        return path.read_bytes(), f"{kind} {path}"
    if url is None and BARE_BASE64.fullmatch(reference):
        return _base64(reference, kind), f"{kind} in base64"
    if url is None and remote:
        url = remote + Path(reference).name
    if url is not None and roots.allow_url:
        return _download(url, kind), f"{kind} {url}"
    where = ", ".join(str(folder) for folder in (*folders, *((base,) if base else ()))) or "no folder was given"
    hint = " (URLs are not fetched unless allowed)" if url is not None else ""
    raise MediaError(f"{kind} {reference[:200]} was not found in: {where}{hint}; give --extra_data_dir {kind}=DIR")


def read_image(data: bytes, name: str) -> Image.Image:
    """Decode one image to RGB, upright by its EXIF mark. Raises MediaError when it is damaged or too large."""
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        if image.width * image.height > PIXELS:
            raise MediaError(f"{name} has {image.width} x {image.height} pixels, more than {PIXELS:,}")
        return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, struct.error, EOFError, Image.DecompressionBombError) as error:
        reason = str(error).split("<")[0].strip() or type(error).__name__
        raise MediaError(f"{name} is damaged or no image: {reason}") from error


def resample(sound_T: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Band-limited resampling through the Fourier transform. sound_T: float32 (T,)."""
    length = round(len(sound_T) * wanted / rate)
    if rate == wanted or not length:
        return sound_T
    spectrum = np.fft.rfft(sound_T)[: length // 2 + 1]
    return (np.fft.irfft(spectrum, length) * (length / len(sound_T))).astype(np.float32)


def read_audio(data: bytes, name: str, rate: int) -> np.ndarray:
    """Decode with soundfile to mono float32 (T,) at `rate`. MediaError when damaged, UserError without soundfile."""
    try:
        import soundfile
    except ImportError as error:
        raise UserError("audio samples need the package soundfile: pip install soundfile") from error
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.frames > SECONDS * file.samplerate:
                raise MediaError(f"{name} lasts longer than {SECONDS} seconds")
            sound_TC, source = file.read(dtype="float32", always_2d=True), file.samplerate
    except (soundfile.SoundFileError, RuntimeError, OSError) as error:
        raise MediaError(f"{name} is damaged or no audio: {error}") from error
    if not len(sound_TC):
        raise MediaError(f"{name} is empty")
    return resample(sound_TC.mean(axis=1), source, rate)


def read_video(data: bytes, name: str, rate: int = 0) -> np.ndarray:
    """Decode FRAMES evenly spread frames with PyAV to uint8 (T, H, W, 3). MediaError if damaged, UserError without."""
    try:
        import av
    except ImportError as error:
        raise UserError("video samples need the package av: pip install av") from error
    try:
        with av.open(io.BytesIO(data)) as file:
            total = sum(1 for _ in file.decode(video=0))
        wanted = set(np.linspace(0, total - 1, min(FRAMES, total)).round().astype(int).tolist()) if total else set()
        with av.open(io.BytesIO(data)) as file:
            frames = [f.to_ndarray(format="rgb24") for i, f in enumerate(file.decode(video=0)) if i in wanted]
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise MediaError(f"{name} is damaged or no video: {error}") from error
    if not frames:
        raise MediaError(f"{name} has no frames")
    if frames[0].shape[0] * frames[0].shape[1] * len(frames) > PIXELS:
        raise MediaError(f"{name} has more than {PIXELS:,} pixels in {len(frames)} frames")
    return np.stack(frames)


READERS: Mapping[str, Callable[..., Any]] = {
    "image": lambda data, name, rate: read_image(data, name),
    "video": read_video,
    "audio": read_audio,
}


def load(
    reference: Any, kind: str, roots: Roots, *, base: Path | None = None, remote: str = "", rate: int = 16000
) -> Any:
    """One medium, decoded: an RGB image, uint8 frames (T, H, W, 3) or float32 sound (T,) at `rate`.

    reference: path, data URI, base64, URL, bytes, {"bytes"/"path": ..}, or an image or array that is already decoded
    ({"array", "sampling_rate"} for sound). base: folder of the dataset's file. remote: address that the set's media
    live under, used with allow_url only. Raises MediaError for a missing or damaged one.
    """
    if isinstance(reference, Mapping):
        if reference.get("array") is not None:
            sound = np.asarray(reference["array"], dtype=np.float32)
            return resample(sound, int(reference.get("sampling_rate") or rate), rate)
        reference = next((reference[k] for k in ("bytes", "path", "url", "data") if reference.get(k)), None)
    if isinstance(reference, Image.Image):
        return reference.convert("RGB")
    if isinstance(reference, str | Path):
        data, name = _bytes(str(reference), kind, roots, base, remote)
    elif isinstance(reference, bytes):
        data, name = reference, f"{kind} given as bytes"
    elif reference is None:
        raise MediaError(f"an {kind} entry is empty")
    else:
        return reference  # decoded already: an array, a tensor or a list of frames
    if len(data) > BYTES[kind]:
        raise MediaError(f"{name} is larger than {BYTES[kind] >> 20} MiB")
    return READERS[kind](data, name, rate)
