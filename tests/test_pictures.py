"""What calibration sees of a picture is what a viewer with a white page shows, for every mode,
depth and entrance."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from auto_mmround.calibration import media, pictures
from auto_mmround.calibration.media import load
from auto_mmround.calibration.roots import MediaError, parse_roots

ROWS, COLUMNS = np.mgrid[0:24, 0:32]
RGB = np.stack([COLUMNS * 8, ROWS * 10, (ROWS + COLUMNS) * 4], -1).astype(np.uint8)
GREY = RGB[..., 0]
GREY3 = GREY[..., None].repeat(3, 2)
ALPHA = np.zeros((24, 32), np.uint8)
ALPHA[6:18, 8:24] = 255
ALPHA[2:4] = 128
SOFT = ALPHA[..., None] / 255
WHITE = (RGB * SOFT + 255 * (1 - SOFT)).round().astype(np.uint8)
WHITE_GREY = (GREY3 * SOFT + 255 * (1 - SOFT)).round().astype(np.uint8)
RGBA, LA = np.dstack([RGB, ALPHA]), np.dstack([GREY, ALPHA])
MUTED = RGB // 4 + np.uint8(96)  # LAB in eight bits is coarse where colours are strong


def seen(reference, folder=None):
    image = load(reference, "image", parse_roots(folder))
    assert image.mode == "RGB" and not image.info
    return np.asarray(image).astype(int)


def stored(image, kind, **options):
    sink = io.BytesIO()
    others = [other.copy() for other in options.pop("append_images", ())]
    # saving leaves options behind on the images
    image.copy().save(sink, kind, append_images=others, **options)
    return sink.getvalue()


def lab(rgb):
    return ImageCms.profileToProfile(
        Image.fromarray(rgb),
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )


def with_palette_alpha():
    """Colours whose palette holds alpha."""
    image = Image.fromarray(ALPHA // 127, "L")
    image.putpalette(bytes([0, 0, 0, 0, 0, 0, 255, 127, 255, 0, 0, 255]), "RGBA")
    return image


def keyed(image, key):
    image.info["transparency"] = key
    return image


PALETTE = np.array([[0, 0, 0], [0, 0, 255], [255, 0, 0]])[ALPHA // 127]
ON_PALETTE = np.array([[255, 255, 255], [128, 128, 255], [255, 0, 0]])[ALPHA // 127]


def indexed(key=None):
    image = Image.fromarray(ALPHA // 127, "L")
    image.putpalette(bytes([0, 0, 0, 0, 0, 255, 255, 0, 0]))
    return image if key is None else keyed(image, key)


WIDE = (GREY.astype(np.uint16) * 257).astype(np.uint16)
FIRST = np.where(GREY3 == 0, 255, GREY3)  # black is transparent
DEEP = {
    "I;16": Image.fromarray(WIDE),
    "I;16B": Image.frombytes("I;16B", (32, 24), WIDE.astype(">u2").tobytes()),
    "I;16L": Image.frombytes("I;16L", (32, 24), WIDE.tobytes()),
    "I": Image.fromarray(WIDE.astype(np.int32)),
    "I, 8 bits": Image.fromarray(GREY.astype(np.int32)),
    "I, from below zero": Image.fromarray((GREY.astype(np.int32) - 100) * 1000),
    "F to 1": Image.fromarray(GREY.astype(np.float32) / np.float32(255)),
    "F to 255": Image.fromarray(GREY.astype(np.float32)),
    "F, keeps NaN out": Image.fromarray(np.where(GREY == 0, np.nan, GREY / 255).astype(np.float32)),
}
OBJECTS = {
    "1": (Image.fromarray(GREY > 99), np.where(GREY3 > 99, 255, 0)),
    "1, keyed": (keyed(Image.fromarray(GREY > 99), 0), np.full_like(GREY3, 255)),
    "L": (Image.fromarray(GREY), GREY3),
    "L, keyed": (keyed(Image.fromarray(GREY), 0), FIRST),
    "I;16, keyed": (keyed(Image.fromarray(WIDE), 0), FIRST),
    "LA": (Image.fromarray(LA), WHITE_GREY),
    "La": (Image.fromarray(LA).convert("La"), WHITE_GREY),
    "P": (indexed(), PALETTE),
    "P, an index": (indexed(0), np.where(ALPHA[..., None] == 0, 255, PALETTE)),
    "P, bytes": (indexed(bytes([0, 127])), ON_PALETTE),
    "P, palette of RGBA": (with_palette_alpha(), ON_PALETTE),
    "PA": (with_palette_alpha().convert("PA"), ON_PALETTE),
    "RGB": (Image.fromarray(RGB), RGB),
    "RGB, keyed": (
        keyed(Image.fromarray(RGB), tuple(RGB[5, 5].tolist())),
        np.where((RGB[5, 5] == RGB).all(-1, keepdims=True), 255, RGB),
    ),
    "RGBA": (Image.fromarray(RGBA), WHITE),
    "RGBa": (Image.fromarray(RGBA).convert("RGBa"), WHITE),
    "RGBX": (Image.fromarray(RGB).convert("RGBX"), RGB),
    "CMYK": (Image.fromarray(RGB).convert("CMYK"), RGB),
    "YCbCr": (Image.fromarray(RGB).convert("YCbCr"), RGB),
    "HSV": (Image.fromarray(RGB).convert("HSV"), RGB),
    "LAB": (lab(MUTED), MUTED),
    "a key that no channel has": (keyed(Image.fromarray(RGB), 3), RGB),
} | {name: (image, GREY3) for name, image in DEEP.items() if name != "I, from below zero"}
# eight bits of another space hold no more
CLOSE = {"La": 2, "RGBa": 2, "YCbCr": 3, "HSV": 6, "LAB": 4}
MODES = {"I;16N"}  # only in passing: no image has it


def test_every_mode_of_pillow_is_here():
    assert {image.mode for image, _ in OBJECTS.values()} == set(Image.MODES) - MODES


@pytest.mark.parametrize("name", OBJECTS)
def test_a_mode_as_a_viewer_shows_it(name):
    image, shown = OBJECTS[name]
    before = (image.mode, dict(image.info), image.tobytes())
    assert np.abs(seen(image) - shown).max() <= CLOSE.get(image.mode, 1)
    assert (image.mode, dict(image.info), image.tobytes()) == before  # the user's own object stays


def test_values_beyond_any_usual_span_are_stretched():
    shown = seen(DEEP["I, from below zero"])[..., 0]
    assert (shown[0, 0], shown[0, -1]) == (0, 255)
    assert np.abs(shown - GREY / GREY.max() * 255).max() <= 1
    assert not seen(Image.new("F", (4, 4), 7e4)).any()  # one value says nothing


def png(bits, colour, pixels, key=b"", palette=b""):
    """A PNG of a depth that Pillow does not write. pixels: rows of packed bytes."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    pixels = pixels.view(np.uint8)
    width, height = pixels.shape[1] * 8 // bits // {0: 1, 2: 3, 3: 1}[colour], len(pixels)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))]
    parts += [(b"PLTE", palette)] * bool(palette) + [(b"tRNS", key)] * bool(key)
    whole = [*parts, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in whole)


TWO = np.array([[0b00011011] * 2] * 4, np.uint8)  # values 0 1 2 3 0 1 2 3
DEEP_RGB = np.tile(
    np.array([[0x1234, 0x5678, 0x9ABC], [0xFFFF, 0, 0x8000]], ">u2").reshape(1, -1), (2, 1)
)
KEYED_PNG = {
    "1 bit": (png(1, 0, np.full((8, 1), 0b00001111, np.uint8), b"\0\0"), [255] * 8),
    "1 bit, white": (png(1, 0, np.full((8, 1), 0b00001111, np.uint8), b"\0\1"),
        [0] * 4 + [255] * 4),
    "2 bits": (png(2, 0, TWO, b"\0\1"), [0, 255, 170, 255] * 2),
    "4 bits": (png(4, 0, np.full((2, 1), 0x2F, np.uint8), b"\0\2"), [255, 255]),
    "8 bits": (png(8, 0, np.tile(np.array([3, 200], np.uint8), (2, 1)), b"\0\3"), [255, 200]),
    "16 bits": (png(16, 0, np.tile(np.array([0x0301, 0x8000], ">u2"), (2, 1)), b"\3\1"), [255,
        128]),
    "16 bits of colour": (png(16, 2, DEEP_RGB, struct.pack(">HHH", 0x1234, 0x5678, 0x9ABC)), [255,
        255]),
    "palette of 2 bits": (png(2, 3, TWO, b"\0\xff", bytes(range(0, 120, 10))), [255, 30, 60,
        90] * 2),
}  # fmt: skip


@pytest.mark.parametrize("name", KEYED_PNG)
def test_keys_are_told_in_the_depth_of_the_file(name):
    data, row = KEYED_PNG[name]
    assert np.abs(seen(data)[0, :, 0] - row).max() <= 1


def patched(data, tag, value):
    """A TIFF in which a tag of one small number has another value."""
    (entry,) = (
        struct.pack("<HHI", tag, kind, 1)
        for kind in (3, 4)
        if struct.pack("<HHI", tag, kind, 1) in data
    )
    at = data.index(entry) + len(entry)
    return data[:at] + struct.pack("<H", value) + data[at + 2 :]


TWELVE = np.packbits(np.unpackbits((GREY.astype(int) * 4095 // 255).astype(">u2").view(np.uint8),
    axis=1)
                     .reshape(24, 32, 16)[..., 4:].reshape(24, -1), axis=1)  # fmt: skip
WIDER_TIFF = stored(Image.frombytes("L", (48, 24), TWELVE.tobytes()), "TIFF")
FRAMES = [Image.fromarray(np.full_like(RGB, value)) for value in (40, 120, 200)]
MANY = {"save_all": True, "append_images": FRAMES[1:]}
PLAIN, GLASS = Image.fromarray(RGB), Image.fromarray(RGBA)
FLAT = np.full_like(RGB, 40)
FILES = {
    "PNG of 16 bits": (stored(DEEP["I;16"], "PNG"), GREY3),
    "TIFF of 16 bits": (stored(DEEP["I;16"], "TIFF"), GREY3),
    "TIFF of 16 bits, big": (stored(DEEP["I;16B"], "TIFF"), GREY3),
    "TIFF of 16 bits, zero is white": (patched(stored(DEEP["I;16"], "TIFF"), 262, 0), 255 - GREY3),
    "TIFF of 8 bits, zero is white": (
        patched(stored(Image.fromarray(GREY), "TIFF"), 262, 0),
        255 - GREY3,
    ),
    "TIFF of floats": (stored(DEEP["F to 1"], "TIFF"), GREY3),
    "TIFF of 12 bits": (patched(patched(WIDER_TIFF, 258, 12), 256, 32), GREY3),
    "TIFF of 32 bits": (stored(DEEP["I"], "TIFF"), GREY3),
    "TIFF of LAB": (stored(lab(MUTED), "TIFF"), MUTED),
    "TIFF of CMYK": (stored(PLAIN.convert("CMYK"), "TIFF"), RGB),
    "TIFF of RGBA": (stored(GLASS, "TIFF"), WHITE),
    "PGM of 16 bits": (b"P5 32 24 65535\n" + WIDE.astype(">u2").tobytes(), GREY3),
    "PGM of 16 bits, dark": (b"P5 2 1 65535\n\0\0\0\xff", np.array([[[0] * 3, [1] * 3]])),
    "PFM": (b"Pf 32 24 -1.0\n" + (GREY[::-1] / np.float32(255)).astype("<f4").tobytes(), GREY3),
    "JPEG 2000 of 16 bits": (stored(DEEP["I;16"], "JPEG2000"), GREY3),
    "JPEG of CMYK, inverted as Adobe does": (
        stored(PLAIN.convert("CMYK"), "JPEG", quality=98),
        RGB,
    ),
    "PNG of RGBA": (stored(GLASS, "PNG"), WHITE),
    "PNG of LA": (stored(Image.fromarray(LA), "PNG"), WHITE_GREY),
    "WebP": (stored(GLASS, "WEBP", lossless=True, exact=True), WHITE),
    "GIF, an index": (
        stored(indexed(), "GIF", transparency=0),
        np.where(ALPHA[..., None] == 0, 255, PALETTE),
    ),
    "ICO": (stored(GLASS, "ICO", sizes=[(32, 24)]), WHITE),
    "DDS": (stored(GLASS, "DDS"), WHITE),
    "TGA": (stored(GLASS, "TGA"), WHITE),
    "QOI": (stored(GLASS, "QOI"), WHITE),
    "BMP": (stored(PLAIN, "BMP"), RGB),
    "PCX": (stored(PLAIN, "PCX"), RGB),
    "SGI": (stored(PLAIN, "SGI"), RGB),
    "MPO": (stored(FRAMES[0], "MPO", **MANY), FLAT),
    "TIFF of pages": (stored(FRAMES[0], "TIFF", **MANY), FLAT),
    "GIF that moves": (stored(FRAMES[0], "GIF", **MANY), FLAT),
    "WebP that moves": (stored(FRAMES[0], "WEBP", lossless=True, **MANY), FLAT),
    "PNG that moves": (stored(FRAMES[0], "PNG", **MANY), FLAT),
}
LOSSY = {"JPEG of CMYK, inverted as Adobe does": 12, "TIFF of LAB": 4, "MPO": 2}


@pytest.mark.parametrize("name", FILES)
def test_a_file_as_a_viewer_shows_it(name):
    data, shown = FILES[name]
    assert np.abs(seen(data) - shown).max() <= LOSSY.get(name, 1)


def test_every_format_that_pillow_decodes_is_read():
    Image.init()
    # another program, no decoder, a file of news
    unread = {"EPS", "WMF"} | {"BUFR", "GRIB", "HDF5", "MPEG"} | {"IPTC"}
    assert set(Image.OPEN) - set(media.IMAGE_FORMATS) <= unread


@pytest.mark.parametrize("tag", range(1, 9))
def test_orientation_holds_at_every_entrance(tmp_path, tag):
    exif = Image.Exif()
    exif[0x0112] = tag
    turned = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.transpose(1, 0, 2),
        6: np.rot90(RGB, -1),
        7: RGB[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(RGB),
    }[tag]
    data = stored(PLAIN, "PNG", exif=exif)
    (tmp_path / "a.png").write_bytes(data)
    text = base64.b64encode(data).decode()
    entrances = [
        "a.png",
        data,
        {"bytes": data, "path": None},
        {"bytes": None, "path": "a.png"},
        text,
        f"data:image/png;base64,{text}",
        Image.open(io.BytesIO(data)),
        stored(PLAIN, "TIFF", exif=exif),
        stored(PLAIN, "WEBP", exif=exif, lossless=True),
    ]
    for entrance in entrances:
        once = load(entrance, "image", parse_roots(tmp_path))
        assert np.array_equal(seen(once), turned)  # a second reading does not turn it again
    loaded = Image.open(io.BytesIO(data))
    loaded.load()
    assert np.array_equal(seen(loaded.convert("RGB")), turned)


def test_a_broken_tag_is_no_damage():
    data = stored(PLAIN, "PNG", exif=b"Exif\0\0II")
    assert np.array_equal(seen(data), RGB)


ARRAYS = {
    "HWC": (RGB, RGB),
    "CHW": (RGB.transpose(2, 0, 1), RGB),
    "HW": (GREY, GREY3),
    "HW1": (GREY[..., None], GREY3),
    "grey and alpha": (LA, WHITE_GREY),
    "RGBA": (RGBA, WHITE),
    "bool": (GREY > 99, np.where(GREY3 > 99, 255, 0)),
    "16 bits": (WIDE, GREY3),
    "int64": (RGB.astype(np.int64), RGB),
    "to 1": (RGB / 255, RGB),
    "to 255": (RGB.astype(np.float16), RGB),
    "tensor": (torch.from_numpy(RGB).permute(2, 0, 1), RGB),
    "tensor to 1": ((torch.from_numpy(RGB) / 255).permute(2, 0, 1), RGB),
    "tensor, channels last": (torch.from_numpy(RGB), RGB),
    "a slim tensor": (torch.from_numpy(RGB[:3]).permute(2, 0, 1)[:, :3, :], RGB[:3]),
}  # fmt: skip


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(name):
    array, shown = ARRAYS[name]
    assert np.abs(seen(array) - shown).max() <= 1


def test_bfloat16():
    assert np.abs(seen((torch.from_numpy(RGB) / 255).bfloat16()) - RGB).max() <= 1


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((5, 6, 7)),
        np.zeros(9),
        np.zeros((2, 2, 2, 2)),
        np.zeros((0, 4, 3)),
        np.zeros((4, 4, 3), complex),
        [np.zeros((4, 4, 3))],
    ],
)
def test_arrays_that_are_no_picture(wrong):
    with pytest.raises(MediaError, match=r"^image that is no file can't be used: [^\n]+$"):
        seen(wrong)


def test_objects_are_bounded_and_closed_ones_named(tmp_path, monkeypatch):
    PLAIN.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        pass
    with pytest.raises(MediaError, match="can't be used"):
        seen(image)
    monkeypatch.setattr(media, "PIXELS", 10)
    for wide in (np.zeros((7, 7)), Image.new("L", (41, 1)), [Image.new("L", (30, 1))] * 2):
        with pytest.raises(MediaError, match="more than 10 pixels"):
            load(wide, "video" if isinstance(wide, list) else "image", parse_roots(None))


@pytest.mark.parametrize("frames", [
    np.stack([RGBA, RGBA]),
    [GLASS, GLASS],
    [RGBA, RGBA],
    torch.from_numpy(np.stack([RGBA, RGBA])).permute(0, 3, 1, 2) / 255,
])  # fmt: skip
def test_frames_of_a_video(frames):
    film = load(frames, "video", parse_roots(None))
    assert film.shape == (2, 24, 32, 3) and film.dtype == np.uint8
    assert np.abs(film.astype(int) - WHITE).max() <= 1


def test_a_dark_frame_has_the_span_of_its_film():
    film = load(
        np.stack([np.full((4, 4, 3), value, np.float32) for value in (1, 200)]),
        "video",
        parse_roots(None),
    )
    assert film[:, 0, 0, 0].tolist() == [1, 200]


@pytest.mark.parametrize("wrong", [GLASS, [GLASS, GLASS.rotate(90, expand=True)], np.zeros((4, 4))])
def test_frames_that_are_no_film(wrong):
    with pytest.raises(MediaError, match="video that is no file can't be used"):
        load(wrong, "video", parse_roots(None))


def test_a_film_stands_upright_and_on_white(tmp_path):
    av = pytest.importorskip("av")
    half = np.full((48, 64, 3), 250, np.uint8)
    half[:24] = 5  # dark above
    for degrees, dark in (
        (0, np.s_[4:20, 4:60]),
        (90, np.s_[4:60, 4:20]),
        (-90, np.s_[4:60, 28:44]),
    ):
        with av.open(str(tmp_path / "v.mp4"), "w") as file:
            stream = file.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            stream.set_display_rotation(degrees)
            for _ in range(3):
                file.mux(stream.encode(av.VideoFrame.from_ndarray(half, format="rgb24")))
            file.mux(stream.encode())
        frames = load("v.mp4", "video", parse_roots(tmp_path))
        assert frames.shape == ((3, 48, 64, 3) if degrees == 0 else (3, 64, 48, 3))
        assert frames[0][dark].mean() < 20 and frames[0].mean() > 110
    gif = stored(
        indexed(), "GIF", transparency=0, save_all=True, append_images=[indexed(0)], duration=100
    )
    frames = load(gif, "video", parse_roots(None))
    assert np.abs(frames[0].astype(int) - np.where(ALPHA[..., None] == 0, 255, PALETTE)).max() <= 1


@pytest.mark.parametrize(
    "start, said",
    [
        (b"%PDF-1.7", "a PDF"),
        (b"<svg xmlns=", "SVG"),
        (b"<?xml version='1.0'?>\n<svg", "SVG"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS"),
        (b"%!PS-Adobe", "EPS"),
    ],
)
def test_what_stands_in_place_of_an_image_is_named(start, said):
    with pytest.raises(MediaError, match=rf"looks like .*{said}"):
        seen(start + b"\n" * 50)


def test_too_large_is_not_called_damaged(recwarn):
    for size in (12_000, 60_000):
        data = bytearray(stored(Image.new("L", (1, 1)), "PNG"))
        data[16:24] = struct.pack(">II", size, size)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        with pytest.raises(MediaError, match=r"more than 64,000,000") as caught:
            seen(bytes(data))
        assert "damaged" not in str(caught.value)
    assert not recwarn.list


def test_truncated_files_are_one_line():
    for name in (
        "PNG of RGBA",
        "WebP",
        "TIFF of 16 bits",
        "JPEG of CMYK, inverted as Adobe does",
        "TGA",
        "QOI",
    ):
        with pytest.raises(
            MediaError, match=r"^image given as bytes is damaged or no image[^\n]*$"
        ):
            seen(FILES[name][0][: len(FILES[name][0]) // 2])


def test_rows_and_evaluation_take_this_way():
    """What a row of a dataset, a question and a prompt are shown."""
    from auto_mmround.evaluate.prompts import asked
    from auto_mmround.evaluate.tasks import picture
    from auto_mmround.model.loading import load as load_model

    loaded = load_model("demo")
    ink = Image.fromarray(
        np.dstack([np.zeros((56, 56, 3), np.uint8), np.zeros((56, 56), np.uint8)])
    )
    blank = asked(loaded, "What?", [Image.new("RGB", (56, 56), "white")]).kwargs["pixel_values"]
    assert torch.equal(asked(loaded, "What?", [ink]).kwargs["pixel_values"], blank)
    assert picture(ink) == picture(Image.new("RGB", (56, 56), "white"))
    assert pictures.as_seen(ink).getpixel((3, 3)) == (255, 255, 255)
