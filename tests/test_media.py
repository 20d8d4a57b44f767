"""Media: where they may come from, and that damaged or oversized ones are refused by name."""

import base64
import io
import os
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from auto_mmround.calibration import media
from auto_mmround.calibration import roots as roots_module
from auto_mmround.calibration.media import load
from auto_mmround.calibration.roots import MEDIA, MediaError, Roots, parse_roots
from auto_mmround.errors import UserError


def png(color="red", size=(8, 6), mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def tree(tmp_path):
    """given/, given/sub/, next/ with one image each of its own colour; outside.png beside them."""
    for name, color in (
        ("given/a.png", "red"),
        ("given/sub/b.png", "green"),
        ("next/c.png", "blue"),
        ("outside.png", "black"),
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(color))
    return tmp_path


def color(image):
    return {(255, 0, 0): "red", (0, 128, 0): "green", (0, 0, 255): "blue"}[image.getpixel((0, 0))]


def test_look_up_order(tree):
    roots, base = parse_roots(tree / "given"), tree / "next"
    assert color(load("sub/b.png", "image", roots)) == "green"
    assert color(load("train2017/a.png", "image", roots)) == "red"  # by its bare name
    assert color(load("c.png", "image", roots, base=base)) == "blue"  # next to the JSON
    (tree / "next" / "a.png").write_bytes(png("blue"))
    assert color(load("a.png", "image", roots, base=base)) == "red"  # the given folder first
    (tree / "next" / "images").mkdir()
    (tree / "next" / "images" / "d.png").write_bytes(png("green"))
    assert color(load("d.png", "image", roots, base=base)) == "green"
    # absolute, but inside
    assert color(load(str(tree / "given" / "a.png"), "image", roots)) == "red"


def test_nothing_outside_the_given_folders(tree):
    roots, base = parse_roots(tree / "given"), tree / "next"
    os.symlink(tree / "outside.png", tree / "given" / "link.png")
    for reference in (
        "../outside.png",
        str(tree / "outside.png"),
        "link.png",
        "sub/../../outside.png",
        "a\0.png",
        "x" * 5000,
    ):
        with pytest.raises(MediaError, match=r"not found|damaged"):
            load(reference, "image", roots, base=base)


def test_names_that_no_file_has(tree):
    os.symlink(tree / "given" / "circle.png", tree / "given" / "circle.png")
    os.mkfifo(tree / "given" / "pipe.png")  # reading it would wait for ever
    for reference in ("circle.png", "pipe.png", "x" * 300, "\ud800.png", "sub", ".", ""):
        with pytest.raises(MediaError):
            load(reference, "image", parse_roots(tree / "given"))


def test_forms_of_extra_data_dir(tree):
    given, sub, other = tree / "given", tree / "given" / "sub", tree / "next"
    assert parse_roots(None).folders["image"] == ()
    assert parse_roots(f"{given},{other}").folders["audio"] == (given, other)
    roots = parse_roots(f"image={given},video={sub},image={other}")
    assert roots.folders == {"image": (given, other), "video": (sub,), "audio": ()}
    assert parse_roots([given, f"audio={sub}"]).folders["audio"] == (given, sub)
    odd = tree / "a=b,c"
    odd.mkdir()
    assert parse_roots(str(odd)).folders["image"] == (odd,)
    with pytest.raises(UserError, match="doesn't exist"):
        parse_roots(str(tree / "none"))
    with pytest.raises(UserError, match="did you mean 'image'"):
        parse_roots(f"images={given}")


def test_inline_forms():
    roots, data = parse_roots(None), png("red")
    text = base64.b64encode(data).decode()
    for reference in (
        f"data:image/png;base64,{text}",
        text,
        data,
        {"bytes": data, "path": None},
        {"url": f"data:image/png;base64,{text}"},
    ):
        assert color(load(reference, "image", roots)) == "red"
    assert load(Image.new("L", (4, 4)), "image", roots).mode == "RGB"
    array = np.zeros((4, 4, 3), np.uint8)
    assert np.array_equal(load(array, "image", roots), array)
    with pytest.raises(MediaError, match="damaged"):
        load("data:image/png;base64,@@@", "image", roots)
    with pytest.raises(MediaError, match="empty"):
        load(None, "image", roots)


def test_urls_only_when_allowed(tree, web):
    site, asked = web({"/a.png": png("green"), "/train/z.png": png("green")})
    url, roots = (
        f"{site}/a.png",
        Roots(dict.fromkeys(MEDIA, ()), allow_url=True, permitted=lambda _: True),
    )
    with pytest.raises(MediaError, match="not fetched unless allowed"):
        load(url, "image", replace(roots, allow_url=False))
    with pytest.raises(MediaError, match=r"127\.0\.0\.1, which is not on the public internet"):
        load(url, "image", parse_roots(None, allow_url=True))
    assert not asked
    # a copy in the folder is preferred
    assert color(load(url, "image", parse_roots(tree / "given"))) == "red"
    assert color(load(url, "image", roots)) == "green"
    assert color(load("z.png", "image", roots, remote=f"{site}/train/")) == "green"
    assert asked == ["/a.png", "/train/z.png"]
    with pytest.raises(MediaError, match="not found"):
        load("file:///etc/hostname", "image", roots)


@pytest.mark.parametrize("damage", ["half", "empty", "text", "eps", "flipped"])
def test_damaged_images_are_named(tmp_path, damage):
    data = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(data).save(buffer, "PNG")
    good = buffer.getvalue()
    bad = {
        "half": good[: len(good) // 2],
        "empty": b"",
        "text": b"not an image",
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "flipped": good[:60] + bytes(b ^ 0xFF for b in good[60:400]) + good[400:],
    }[damage]
    (tmp_path / "bad.png").write_bytes(bad)
    with pytest.raises(MediaError, match=r"bad\.png is damaged or no image") as caught:
        load("bad.png", "image", parse_roots(tmp_path))
    assert "\n" not in str(caught.value)


def test_bounds(tmp_path, monkeypatch):
    (tmp_path / "wide.png").write_bytes(png(size=(300, 300)))
    monkeypatch.setattr(media, "PIXELS", 300 * 300 - 1)
    with pytest.raises(MediaError, match="300 x 300 pixels"):
        load("wide.png", "image", parse_roots(tmp_path))
    monkeypatch.setattr(media, "BYTES", {"image": 10})
    monkeypatch.setattr(roots_module, "BYTES", {"image": 10})
    with pytest.raises(MediaError, match="larger than"):
        load("wide.png", "image", parse_roots(tmp_path))
    with pytest.raises(MediaError, match="larger than"):
        load(png(), "image", parse_roots(tmp_path))


def test_a_file_that_grows_while_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(media, "BYTES", {"image": 1000})
    monkeypatch.setattr(roots_module, "BYTES", {"image": 1000})
    (tmp_path / "a.png").write_bytes(png() + bytes(2000))
    with pytest.raises(MediaError, match="larger than"):
        load("a.png", "image", parse_roots(tmp_path))


def test_decompression_bomb_is_refused_before_it_unfolds(tmp_path):
    """60,000 x 60,000 pixels in the header of a file of a few bytes: 10 GB if it were believed."""
    data = bytearray(png(size=(1, 1)))
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "bomb.png").write_bytes(data)
    with pytest.raises(MediaError, match=r"bomb\.png"):
        load("bomb.png", "image", parse_roots(tmp_path))


def test_slim_images_are_refused(tmp_path):
    """A processor that scales the short side to 224 would make 11 million pixels of each row."""
    (tmp_path / "slim.png").write_bytes(png(size=(50_000, 1)))
    with pytest.raises(MediaError, match="its sides differ"):
        load("slim.png", "image", parse_roots(tmp_path))


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"array": [0.0] * 100, "sampling_rate": -1}, "at -1 Hz"),
        ({"array": [0.0] * 2000, "sampling_rate": 1}, "lasts longer"),
        ({"array": [[0.0], [0.0, 1.0]], "sampling_rate": 8000}, "holds no numbers"),
        ({"array": "words", "sampling_rate": 8000}, "holds no numbers"),
        ({"array": [0.0, float("nan")], "sampling_rate": 8000}, "NaN"),
        ({"array": [], "sampling_rate": 8000}, "shape"),
        (5, "no decoded audio"),
        ([1, 2, 3], "no decoded audio"),
    ],
)
def test_sound_in_a_row_is_judged_too(row, reason):
    with pytest.raises(MediaError, match=reason):
        load(row, "audio", parse_roots(None))


def test_sound_that_lasts_too_long_or_has_too_many_channels(tmp_path, monkeypatch):
    soundfile = pytest.importorskip("soundfile")
    # 700 s in some kilobytes
    soundfile.write(tmp_path / "long.flac", np.zeros(700 * 1000, np.float32), 1000)
    soundfile.write(tmp_path / "wide.wav", np.zeros((100, 64), np.float32), 8000)
    monkeypatch.setattr(media, "SAMPLES", 64 * 99)
    for name, reason in (("long.flac", "lasts longer than 600"), ("wide.wav", "64 x 100 samples")):
        with pytest.raises(MediaError, match=reason):
            load(name, "audio", parse_roots(tmp_path))


def test_colours_and_exif(tmp_path):
    for mode in ("L", "P", "RGBA", "1", "LA"):
        (tmp_path / "m.png").write_bytes(png(color=0, mode=mode))
        assert load("m.png", "image", parse_roots(tmp_path)).mode == "RGB"
    exif = Image.Exif()
    exif[0x0112] = 6  # stands on its side
    Image.new("RGB", (8, 4)).save(tmp_path / "e.jpg", exif=exif)
    assert load("e.jpg", "image", parse_roots(tmp_path)).size == (4, 8)


def test_resample_keeps_a_tone():
    time = np.arange(8000) / 8000
    tone = np.sin(2 * np.pi * 440 * time).astype(np.float32)
    up = media.resample(tone, 8000, 16000)
    assert up.dtype == np.float32 and len(up) == 16000
    assert np.abs(up - np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)).max() < 1e-3
    assert np.abs(media.resample(up, 16000, 8000) - tone).max() < 1e-3
    sound = load({"array": tone, "sampling_rate": 8000}, "audio", parse_roots(None), rate=16000)
    assert len(sound) == 16000


@pytest.mark.parametrize("kind, package", [("audio", "soundfile"), ("video", "av")])
def test_missing_reader_is_named(kind, package, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        load(b"x", kind, parse_roots(None))


def test_audio_file(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    tone = np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
    soundfile.write(tmp_path / "a.wav", np.stack([tone, tone], 1), 8000)
    sound = load("a.wav", "audio", parse_roots(f"audio={tmp_path}"))
    assert sound.dtype == np.float32 and sound.shape == (16000,)
    (tmp_path / "a.wav").write_bytes(b"RIFFxxxx")
    with pytest.raises(MediaError, match="damaged"):
        load("a.wav", "audio", parse_roots(tmp_path))


def test_video_file(tmp_path):
    film(tmp_path / "v.mp4")
    frames = load("v.mp4", "video", parse_roots(tmp_path))
    assert frames.shape == (media.FRAMES, 48, 64, 3) and frames.dtype == np.uint8
    assert frames[0].mean() < 10 and frames[-1].mean() > 200
    (tmp_path / "v.mp4").write_bytes(b"nothing")
    with pytest.raises(MediaError, match="damaged"):
        load("v.mp4", "video", parse_roots(tmp_path))


def film(path, count=20, size=(64, 48), codec="mpeg4"):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=10)
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        for i in range(count):
            pixels = np.full((*size[::-1], 3), i * 12 % 256, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())


def test_bounds_of_a_video(tmp_path, monkeypatch):
    film(tmp_path / "v.mp4")
    roots = parse_roots(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(media, "DECODED_PIXELS", 64 * 48 * 19)
        with pytest.raises(MediaError, match="pixels in all its frames"):
            load("v.mp4", "video", roots)
    with monkeypatch.context() as patch:
        patch.setattr(media, "PIXELS", 64 * 48 * 8 - 1)
        with pytest.raises(MediaError, match="in each of 8 frames"):
            load("v.mp4", "video", roots)
    whole = (tmp_path / "v.mp4").read_bytes()
    (tmp_path / "v.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MediaError, match="damaged"):
        load("v.mp4", "video", roots)


@pytest.mark.parametrize("target", ["web", "file"])
def test_a_playlist_opens_nothing(tmp_path, web, target, monkeypatch):
    """FFmpeg would read a list, whatever the file is called, and open what it names."""
    film(tmp_path / "secret.ts", codec="mpeg2video")
    site, asked = web({"/secret.ts": (tmp_path / "secret.ts").read_bytes()})
    place = f"{site}/secret.ts" if target == "web" else str(tmp_path / "secret.ts")
    for name in ("v.mp4", "v.m3u8"):
        text = f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{place}\n#EXT-X-ENDLIST\n"
        (tmp_path / name).write_text(text)
        with pytest.raises(MediaError, match="damaged or no video"):
            load(name, "video", parse_roots(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v.mp4").write_text("ffconcat version 1.0\nfile 'secret.ts'\n")
    with pytest.raises(MediaError, match="damaged or no video"):
        load("v.mp4", "video", parse_roots(tmp_path))
    assert not asked
