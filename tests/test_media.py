"""Media: where they may come from, and that damaged or oversized ones are refused by name."""

import base64
import io
import os

import numpy as np
import pytest
from PIL import Image

from auto_mmround.calibration import media
from auto_mmround.calibration.media import MediaError, load, parse_roots
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
    assert color(load(str(tree / "given" / "a.png"), "image", roots)) == "red"  # absolute, but inside


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
    assert load(array, "image", roots) is array
    with pytest.raises(MediaError, match="damaged"):
        load("data:image/png;base64,@@@", "image", roots)
    with pytest.raises(MediaError, match="empty"):
        load(None, "image", roots)


def test_urls_only_when_allowed(tree, monkeypatch):
    asked = []

    def answer(url, timeout):
        asked.append(url)
        return io.BytesIO(png("green"))

    monkeypatch.setattr(media.urllib.request, "urlopen", answer)
    url = "http://example.org/a.png"
    with pytest.raises(MediaError, match="not fetched unless allowed"):
        load(url, "image", parse_roots(None))
    assert not asked
    assert color(load(url, "image", parse_roots(tree / "given"))) == "red"  # a copy in the folder is preferred
    assert color(load(url, "image", parse_roots(None, allow_url=True))) == "green"
    assert color(load("z.png", "image", parse_roots(None, True), remote="http://example.org/train/")) == "green"
    assert asked == [url, "http://example.org/train/z.png"]
    with pytest.raises(MediaError, match="not found"):
        load("file:///etc/hostname", "image", parse_roots(None, allow_url=True))


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
    with pytest.raises(MediaError, match="larger than"):
        load("wide.png", "image", parse_roots(tmp_path))
    with pytest.raises(MediaError, match="larger than"):
        load(png(), "image", parse_roots(tmp_path))


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
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "v.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), i * 12, np.uint8), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    frames = load("v.mp4", "video", parse_roots(tmp_path))
    assert frames.shape == (media.FRAMES, 48, 64, 3) and frames.dtype == np.uint8
    assert frames[0].mean() < 10 and frames[-1].mean() > 200
    (tmp_path / "v.mp4").write_bytes(b"nothing")
    with pytest.raises(MediaError, match="damaged"):
        load("v.mp4", "video", parse_roots(tmp_path))
