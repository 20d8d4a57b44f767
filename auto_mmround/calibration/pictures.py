"""Pictures as a person sees them in a viewer with a white page, of every mode and depth that Pillow
opens.

Pillow's own `convert("RGB")` drops transparency (black ink on nothing turns into a black square),
cuts grey of 16 bits off at 255, knows no LAB, and leaves a picture on the side that it was taken
on.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by the orientation tag
ORIENTATION = 0x0112
PHOTOMETRIC, BITS = 262, 258  # tags of TIFF
UNMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
OWN_ALPHA = ("LA", "PA", "RGBA", "P")  # in each pixel, or in the palette
GREY_BITS = {"1": 1, "L;2": 2, "L;4": 4, "I;12": 12}  # by how the file packs them, else 8 or 16
SPANS = {
    "u": (255, 65535),
    "i": (255, 65535),
    "f": (1, 255),
}  # numpy's kinds: values of white, the first that is enough


def as_seen(given: Any) -> Image.Image:
    """RGB, upright by its orientation tag, transparent parts white, grey of any depth scaled to 8
    bits.

    given: an image, of several frames the one that it stands at; or an array or tensor of grey (H,
    W), or with 1 to 4 channels (grey, grey and alpha, RGB, RGBA) last or first. Where both could
    be, arrays of NumPy have them last and tensors of torch first. Any dtype; white is 1 or 255 in
    floats. Raises ValueError for other shapes, and Pillow's own errors for damaged data.
    """
    image = given if isinstance(given, Image.Image) else _from_array(given)
    packed = _packed(image)  # known until the image is loaded
    image.load()
    turn = TURNS.get(_orientation(image))
    alpha = _keyed(image, packed)
    shown = _on_white(_deep(image, packed) if image.mode[0] in "IF" else image, alpha)
    shown = shown if turn is None else shown.transpose(turn)
    shown.info = {}  # or the tag would be followed a second time
    return shown


def film(given: Any) -> np.ndarray:
    """uint8 (T, H, W, 3) of frames as `as_seen` takes them, in a list or in one array.

    Raises ValueError where they differ in size, or are no pictures.
    """
    if isinstance(given, Image.Image) or getattr(given, "ndim", 4) != 4:
        raise ValueError("expected frames (T, height, width, channels), or a list of them")
    if isinstance(given, list | tuple):
        return np.stack([np.asarray(as_seen(frame)) for frame in given])
    first, given = isinstance(given, torch.Tensor), _eight_bits(_numbers(given))
    return np.stack(
        [np.asarray(as_seen(torch.from_numpy(frame) if first else frame)) for frame in given]
    )


def _numbers(given: Any) -> np.ndarray:
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu()
        given = given.float() if given.is_floating_point() else given
    return np.asarray(given)


def _from_array(given: Any) -> Image.Image:
    pixels, order = _numbers(given), (0, 2) if isinstance(given, torch.Tensor) else (2, 0)
    if pixels.ndim == 3:
        places = [axis for axis in order if pixels.shape[axis] <= 4]
        pixels = np.moveaxis(pixels, places[0], 2) if places else pixels
    if (
        pixels.ndim not in (2, 3)
        or not pixels.size
        or pixels.shape[2:] > (4,)
        or pixels.dtype.kind not in "buif"
    ):
        raise ValueError(
            f"shape {pixels.shape} of {pixels.dtype}: expected (height, width, channels)"
        )
    shallow = _eight_bits(pixels, 16 if pixels.dtype == np.uint16 else None)
    return Image.fromarray(
        np.ascontiguousarray(shallow[..., 0] if shallow.shape[2:] == (1,) else shallow)
    )


def _packed(image: Image.Image) -> int | None:
    """Bits of a channel in the file, where Pillow still says."""
    args = next((tile.args for tile in getattr(image, "tile", ())), None)
    raw = args if isinstance(args, str) else args[0] if isinstance(args, tuple) and args else None
    bits = getattr(image, "tag_v2", {}).get(BITS) or (None,)
    return GREY_BITS.get(str(raw)) or (
        12 if bits == (12,) else 16 if ";16" in f"{raw}{image.mode}" else None
    )


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ORIENTATION)
    # a picture for all that
    except (SyntaxError, ValueError, TypeError, LookupError, OSError, ArithmeticError):
        return None


def _eight_bits(pixels: np.ndarray, bits: int | None = None) -> np.ndarray:
    """uint8. The value of white is that of `bits`; else the first of the usual ones that no value
    exceeds; else the values are stretched from the smallest to the largest."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * 255
    if pixels.dtype.kind == "f":
        pixels = np.where(np.isfinite(pixels), pixels, 0)
    low, high = pixels.min(), pixels.max()
    spans = (2**bits - 1,) if bits else SPANS[pixels.dtype.kind]
    white = next((span for span in spans if low >= 0 and high <= span), None)
    dark, white = (float(low), float(high)) if white is None else (0.0, float(white))
    scale = 255 / ((white - dark) or 1)
    return ((pixels.astype(np.float32) - np.float32(dark)) * np.float32(scale) + 0.5).astype(
        np.uint8
    )


def _deep(image: Image.Image, bits: int | None) -> Image.Image:
    """Grey of more than eight bits as "L"."""
    if image.mode == "I" and image.format in ("PPM", "PNG"):
        bits = 16
    shallow = _eight_bits(np.asarray(image), bits)
    # zero is white: Pillow sees to it for 8 bits only
    inverted = getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0
    return Image.fromarray(255 - shallow if inverted else shallow)


def _keyed(image: Image.Image, bits: int | None) -> Image.Image | None:
    """The mask of what is opaque where one value or colour means transparent; it is told in the
    file's own depth."""
    key = image.info.get("transparency")
    if not isinstance(key, int | tuple) or not (
        image.mode in ("1", "L", "RGB") or image.mode.startswith("I")
    ):
        return None
    pixels, wanted = np.atleast_3d(np.asarray(image)), np.asarray(key)
    if wanted.size != pixels.shape[2]:
        return None
    if image.mode in ("1", "L") and bits and bits < 8:
        wanted = wanted * (255 // (2**bits - 1))
    elif image.mode == "RGB" and (bits == 16 or wanted.max() > 255):
        wanted = wanted >> 8
    pixels = pixels * np.uint8(255) if pixels.dtype == np.bool_ else pixels
    return Image.fromarray((pixels != wanted).any(2))


def _on_white(image: Image.Image, alpha: Image.Image | None) -> Image.Image:
    """RGB. alpha: mode "1", instead of what the image itself has."""
    image = image.convert(UNMULTIPLIED.get(image.mode, image.mode))
    if image.mode in OWN_ALPHA and image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    colour = _from_lab(image) if image.mode == "LAB" else image.convert("RGB")
    if alpha is None:
        return colour
    page = Image.new("RGB", image.size, "white")
    page.paste(colour, mask=alpha)
    return page


def _from_lab(image: Image.Image) -> Image.Image:
    lab, screen = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    made = ImageCms.profileToProfile(image, lab, screen, outputMode="RGB")
    assert made is not None  # only in place
    return made
