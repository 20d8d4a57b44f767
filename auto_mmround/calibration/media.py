"""Images, video and audio of a sample: where they may come from, and readers with bounds.

A file is read only if it lies below a folder that the user gave or next to the dataset's own file;
nothing is fetched from the network unless it is allowed by name.
"""

import base64
import binascii
import io
import math
import re
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from auto_mmround.calibration import pictures
from auto_mmround.calibration.fetch import FetchError, Permitted, fetch, is_public
from auto_mmround.calibration.template import did_you_mean
from auto_mmround.errors import UserError
from auto_mmround.untrusted import belongs, shown

MEDIA = ("image", "video", "audio")
# Rasters that Pillow decodes itself: its EPS reader would start another program. Those known by
# less come last.
IMAGE_FORMATS = (
    "JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "CUR", "DIB",
    "DDS", "PSD", "QOI",
    "ICNS", "SGI", "SUN", "PCX", "DCX", "XBM", "XPM", "MSP", "FITS", "BLP", "FTEX", "FLI", "GBR",
    "IM", "IMT", "MCIDAS",
    "PIXAR", "XVTHUMB", "PCD", "SPIDER", "TGA",
)  # fmt: skip
# What stands in place of images, by how it begins.
LOOKS = (
    (rb"%!PS", "EPS"),
    (rb"%PDF-", "a PDF"),
    (rb"(?i)\s*(<!doctype html|<html)", "a web page"),
    (rb"(?is)\s*(<svg|<\?xml.{,500}<svg)", "SVG"),
    (rb"(?s)....ftyp(hei|hev|mif1)", "HEIC"),
    (rb"version https://git-lfs", "a pointer of Git LFS, not the file itself"),
)
DATA_URI = re.compile(r"data:[\w.+-]+/[\w.+-]+(?:;[\w=.-]+)*;base64,(?P<data>.*)", re.DOTALL)
BARE_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")
BYTES = {"image": 64 << 20, "video": 1 << 30, "audio": 256 << 20}
PIXELS = 64_000_000  # of an image, or of the frames taken from a video
# long side to short side: processors that scale the short side up would make a giant
SLIMNESS = 200
FRAMES = 8
# decoded to choose the frames: ten minutes of 1920 x 1080 at 30 a second
DECODED_PIXELS = 40_000_000_000
SECONDS = 600
SAMPLES = 120_000_000  # of a sound, all its channels: ten minutes of 96 kHz stereo
# Containers that hold their frames themselves: playlists (HLS, DASH, concat) make FFmpeg open other
# files and URLs.
CONTAINERS = "mov,matroska,webm,avi,mpeg,mpegts,flv,asf,ogg,gif,mpegvideo,h264,hevc,m4v,ivf,3gp,mp4"
# What decoders raise for data that make no sense to them, beside errors of their own.
NONSENSE = (OSError, SyntaxError, ValueError, struct.error, EOFError, LookupError, TypeError,
    AttributeError,
            ArithmeticError, RuntimeError, MemoryError)  # fmt: skip


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


def _bytes(
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


def read_image(data: bytes, name: str) -> Image.Image:
    """Decode one image, the first of several frames, to RGB as a person sees it
    (`pictures.as_seen`).

    Raises MediaError when it is damaged or too large.
    """
    Image.init()
    known = [each for each in IMAGE_FORMATS if each in Image.OPEN]  # AVIF may be missing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own bound is below
        try:
            image = Image.open(io.BytesIO(data), formats=known)
            _check_size(*image.size, name)
            return pictures.as_seen(image)
        except Image.DecompressionBombError as error:
            raise MediaError(f"{name} has more than {PIXELS:,} pixels") from error
        except UnidentifiedImageError as error:
            looks = next(
                (
                    f": it looks like {what}"
                    for start, what in LOOKS
                    if re.match(start, data[:1024])
                ),
                "",
            )
            raise MediaError(
                f"{name} is damaged or no image{looks or ' of a known kind'}"
            ) from error
        except (*NONSENSE, ImportError) as error:
            reason = str(error).split("<")[0].strip() or type(error).__name__
            raise MediaError(f"{name} is damaged or no image: {reason}") from error


def _given_picture(given: Any, kind: str) -> Any:
    """What a program has decoded already: an image object, or an array of one; for a video, its
    frames."""
    name, film = f"{kind} that is no file", kind == "video"
    sizes = [each.size if isinstance(each, Image.Image) else each.shape for each in _items(given)]
    if sum(math.prod(size) for size in sizes) > 4 * PIXELS:  # of four channels
        raise MediaError(f"{name} has more than {PIXELS:,} pixels")
    try:
        return pictures.film(given) if film else pictures.as_seen(given)
    # closed files end in an assertion of Pillow's
    except (*NONSENSE, ImportError, AssertionError) as error:
        raise MediaError(
            f"{name} can't be used: {str(error)[:200] or 'is its file closed?'}"
        ) from error


def _check_size(width: int, height: int, name: str, count: int = 1) -> None:
    if width * height * count > PIXELS:
        many = f" in each of {count} frames" if count > 1 else ""
        raise MediaError(f"{name} has {width} x {height} pixels{many}, more than {PIXELS:,}")
    if max(width, height) > SLIMNESS * min(width, height):
        raise MediaError(
            f"{name} has {width} x {height} pixels: its sides differ by more than {SLIMNESS} to 1"
        )


def resample(sound_T: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Band-limited resampling through the Fourier transform. sound_T: float32 (T,)."""
    length = round(len(sound_T) * wanted / rate)
    if rate == wanted or not length:
        return sound_T
    spectrum = np.fft.rfft(sound_T)[: length // 2 + 1]
    return (np.fft.irfft(spectrum, length) * (length / len(sound_T))).astype(np.float32)


def read_audio(data: bytes, name: str, rate: int) -> np.ndarray:
    """Decode with soundfile to mono float32 (T,) at `rate`. MediaError when damaged, UserError
    without soundfile."""
    try:
        import soundfile
    except ImportError as error:
        raise UserError(
            "audio samples need the package soundfile: pip install soundfile"
        ) from error
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            _check_length(file.frames, file.samplerate, name)
            if file.frames * file.channels > SAMPLES:
                raise MediaError(
                    f"{name} has {file.channels} x {file.frames} samples, more than {SAMPLES:,}"
                )
            sound_TC, source = file.read(dtype="float32", always_2d=True), file.samplerate
    except (*NONSENSE, soundfile.SoundFileError) as error:
        raise MediaError(f"{name} is damaged or no audio: {error}") from error
    if not len(sound_TC):
        raise MediaError(f"{name} is empty")
    return resample(_finite(sound_TC.mean(axis=1), name), source, rate)


def _check_length(frames: int, rate: int, name: str) -> None:
    if frames < 0 or rate < 1:
        raise MediaError(f"{name} says that it has {frames} samples at {rate} Hz")
    if frames > SECONDS * rate:
        raise MediaError(f"{name} lasts longer than {SECONDS} seconds")


def _finite(sound_T: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(sound_T).all():
        raise MediaError(f"{name} holds NaN or infinite values")
    return sound_T


def _frames(data: bytes, name: str) -> Iterator[Any]:
    """The frames of the first video stream, one after the other, until they are too many or too
    large."""
    import av

    # FFmpeg's own refusals come first: containers, protocols, and pictures too large to allocate.
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": ""}
    done = 0
    with av.open(io.BytesIO(data), mode="r", options=options) as file:
        stream = file.streams.video[0]
        # it counts its padding
        stream.codec_context.options = {"max_pixels": str(PIXELS + (1 << 20))}
        for frame in file.decode(stream):
            _check_size(frame.width, frame.height, name)
            done += frame.width * frame.height
            if done > DECODED_PIXELS:
                raise MediaError(
                    f"{name} has more than {DECODED_PIXELS:,} pixels in all its frames"
                )
            yield frame


def _upright(frame: Any) -> np.ndarray:
    """uint8 (H, W, 3) of a decoded frame: turned as its film says, what is transparent white."""
    clear = any(part.is_alpha for part in frame.format.components) or "pal" in frame.format.name
    pixels = frame.to_ndarray(format="rgba" if clear else "rgb24")
    shown = np.asarray(pictures.as_seen(pixels)) if clear else pixels
    return np.ascontiguousarray(np.rot90(shown, round(getattr(frame, "rotation", 0) / 90)))


def read_video(data: bytes, name: str, rate: int = 0) -> np.ndarray:
    """Decode FRAMES evenly spread frames with PyAV to uint8 (T, H, W, 3). MediaError if damaged,
    UserError without."""
    try:
        import av
    except ImportError as error:
        raise UserError("video samples need the package av: pip install av") from error
    try:
        total = sum(1 for _ in _frames(data, name))
        wanted = (
            set(np.linspace(0, total - 1, min(FRAMES, total)).round().astype(int).tolist())
            if total
            else set()
        )
        taken: list[np.ndarray] = []
        for i, frame in enumerate(_frames(data, name)):
            if i in wanted:
                _check_size(frame.width, frame.height, name, len(wanted))
                taken.append(_upright(frame))
    except (*NONSENSE, av.FFmpegError) as error:
        raise MediaError(f"{name} is damaged or no video: {error}") from error
    if not taken:
        raise MediaError(f"{name} has no frames")
    if any(frame.shape != taken[0].shape for frame in taken):
        raise MediaError(f"{name} changes its size on the way")
    return np.stack(taken)


READERS: Mapping[str, Callable[..., Any]] = {
    "image": lambda data, name, rate: read_image(data, name),
    "video": read_video,
    "audio": read_audio,
}


def _given_sound(array: Any, given: Any, rate: int) -> np.ndarray:
    """Sound that a row holds as numbers, at the wanted rate."""
    name = "audio given as an array"
    try:
        sound_T, source = np.asarray(array, dtype=np.float32), int(given or rate)
    except NONSENSE as error:
        raise MediaError(f"{name} holds no numbers: {str(error)[:200]}") from error
    if sound_T.ndim != 1 or not sound_T.size or sound_T.size > SAMPLES:
        raise MediaError(
            f"{name} has the shape {sound_T.shape}: expected one channel of 1 to {SAMPLES:,}"
            " samples"
        )
    _check_length(len(sound_T), source, name)
    return resample(_finite(sound_T, name), source, rate)


def _items(given: Any) -> list[Any]:
    """The images and arrays in lists of them."""
    return (
        [each for item in given for each in _items(item)]
        if isinstance(given, list | tuple)
        else [given]
    )


def _decoded(reference: Any) -> bool:
    """Whether it is an array, a tensor, or a list of frames: what only a program can give, not a
    file of rows."""
    if isinstance(reference, list | tuple):
        return bool(reference) and all(
            isinstance(item, Image.Image) or _decoded(item) for item in reference
        )
    return hasattr(reference, "shape") and hasattr(reference, "dtype")


def load(
    reference: Any,
    kind: str,
    roots: Roots,
    *,
    base: Path | None = None,
    remote: str = "",
    rate: int = 16000,
) -> Any:
    """One medium, decoded: an RGB image, uint8 frames (T, H, W, 3) or float32 sound (T,) at `rate`.

    reference: path, data URI, base64, URL, bytes, {"bytes"/"path": ..}, or an image or array that
    is already decoded ({"array", "sampling_rate"} for sound). base: folder of the dataset's file.
    remote: address that the set's media live under, used with allow_url only. Raises MediaError for
    a missing or damaged one.
    """
    if isinstance(reference, Mapping):
        if kind == "audio" and reference.get("array") is not None:
            return _given_sound(reference["array"], reference.get("sampling_rate"), rate)
        reference = next(
            (reference[k] for k in ("bytes", "path", "url", "data") if reference.get(k)), None
        )
    if isinstance(reference, Image.Image) or _decoded(reference):
        return reference if kind == "audio" else _given_picture(reference, kind)
    if isinstance(reference, str | Path):
        data, name = _bytes(str(reference), kind, roots, base, remote)
    elif isinstance(reference, bytes):
        data, name = reference, f"{kind} given as bytes"
    elif reference is None:
        raise MediaError(f"an {kind} entry is empty")
    else:
        raise MediaError(
            f"an {kind} entry is no path, no URL and no decoded {kind}, but {shown(reference)}"
        )
    if len(data) > BYTES[kind]:
        raise MediaError(f"{name} is larger than {BYTES[kind] >> 20} MiB")
    return READERS[kind](data, name, rate)
