"""Images, video and audio of a sample: readers with bounds."""

import io
import math
import re
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from auto_mmround.calibration import pictures
from auto_mmround.calibration.roots import BYTES, MediaError, Roots, content
from auto_mmround.errors import UserError
from auto_mmround.untrusted import shown

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


DECODERS: Mapping[str, Callable[..., Any]] = {
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
    if isinstance(given, list | tuple):
        return [each for item in given for each in _items(item)]
    return [given]


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
        data, name = content(str(reference), kind, roots, base, remote)
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
    return DECODERS[kind](data, name, rate)
