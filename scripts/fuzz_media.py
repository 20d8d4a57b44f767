"""Pictures, sounds, films and their names, for the fuzzer: small files that are right, and their
readers."""

import io
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_inputs import VALUES, WORDS, Target, damaged_bytes, file_reader
from hypothesis import strategies as st
from PIL import Image

from auto_mmround.calibration import media
from auto_mmround.calibration.roots import MEDIA, MediaError, parse_roots
from auto_mmround.errors import UserError

PARTICULAR = ("XBM", "MSP", "BLP", "SPIDER")  # written from other modes only


def picture(kind: str, size: tuple[int, int] = (16, 12), **options: Any) -> bytes:
    sink = io.BytesIO()
    pixels = np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(size[1], size[0], 3)
    Image.fromarray(pixels).save(sink, kind, **options)
    return sink.getvalue()


def sounds() -> list[bytes]:
    import soundfile

    sink, made = io.BytesIO(), []
    with wave.open(sink, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(800))
    for kind in ("FLAC", "OGG", "AIFF", "AU"):
        other = io.BytesIO()
        soundfile.write(other, np.sin(np.arange(400) / 9).astype(np.float32), 8000, format=kind)
        made.append(other.getvalue())
    return [sink.getvalue(), *made]


def film() -> list[bytes]:
    import av

    made = []
    for kind, codec in (
        ("mp4", "mpeg4"),
        ("matroska", "mpeg4"),
        ("avi", "mpeg4"),
        ("mpegts", "mpeg2video"),
    ):
        sink = io.BytesIO()
        with av.open(sink, "w", format=kind) as file:
            stream = file.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            for i in range(10):
                pixels = np.full((32, 32, 3), i * 20, np.uint8)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            file.mux(stream.encode())
        made.append(sink.getvalue())
    return [
        *made,
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n",
        b"ffconcat version 1.0\nfile 'secret'\n",
    ]


def all_media(work: Path) -> list[Target]:
    (work / "outside" / "secret").write_bytes(picture("PNG"))
    (work / "given" / "link.png").symlink_to(work / "outside" / "secret")
    roots, accepted = parse_roots(work / "given"), (UserError, MediaError)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "text"
    Image.init()
    images = [
        picture(kind)
        for kind in media.IMAGE_FORMATS
        if kind in Image.SAVE and kind not in PARTICULAR
    ]
    images.append(picture("JPEG", exif=exif))

    def by(kind: str) -> Callable[[Path], object]:
        return lambda path: media.load(path.name, kind, roots)

    readers = [Target("image", damaged_bytes(*images), file_reader("m.img", by("image")), accepted)]
    for kind, make, package in (("audio", sounds, "soundfile"), ("video", film, "av")):
        try:
            readers.append(
                Target(kind, damaged_bytes(*make()), file_reader(f"m.{kind}", by(kind)), accepted)
            )
        except ImportError:
            print(f"{kind}: left out, the package {package} is not installed")
    names = (
        st.sampled_from(
            [*WORDS, "a.png", "link.png", "../outside/secret", str(work / "outside" / "secret")]
        )
        | st.text()
    )
    entry = (
        VALUES
        | names
        | st.builds(dict, path=names)
        | st.builds(lambda a, r: {"array": a, "sampling_rate": r}, VALUES, VALUES)
    )
    pairs = st.tuples(entry, st.sampled_from(MEDIA))
    return [
        *readers,
        Target("media names", pairs, lambda _, pair: media.load(pair[0], pair[1], roots), accepted),
    ]
