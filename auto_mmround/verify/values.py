"""Are the numbers in a checkpoint right? Plain and packed tensors, each read once.

They are compared with all that is there: always with ranges; with the checksums of our run in
`run.json`; with the model before quantization, if its folder is given.
"""

import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from auto_mmround.checkpoint.findings import Finding, fault
from auto_mmround.checkpoint.reading import CONTRADICTIONS, Shards, dequantized_state_dict
from auto_mmround.checkpoint.subject import Subject
from auto_mmround.errors import UserError, several
from auto_mmround.export.format import PackedFormat, WholeFormat
from auto_mmround.model.stored import Reader, Stored
from auto_mmround.numerics.grids import Codes, dequantize
from auto_mmround.numerics.pieces import pieces_of, rows_of
from auto_mmround.run.record import checksum, codes_record

# With the right layout, even a weight of 2 bits has a correlation above 0.7 with its source; with a
# wrong one about 0.
LEAST_CORRELATION = 0.5
CONSTANT = 0.1  # of a matrix of one value: largest sum of squared errors, over its sum of squares
PIECE = 2**22  # values looked at together
WEIGHT_FILE = re.compile(r"[\w.-]+\.(gguf|xml|bin|safetensors)\b")
DIFFERS = "(its checksum in run.json differs)"
# By the tensors of a weight, see `Format.parts`.
HELD = ("q", "scale", "zero", "input_scale", "global_scale")


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.to(other.dtype), other)


def check_plain_values(s: Subject) -> Iterator[Finding]:
    """Plain tensors are finite, and equal to the run's, or else to the source's."""
    written, weights = s.record.get("tensors") or {}, s.weights()
    source = s.originals(weights)
    with Reader(weights) as originals:
        for name, tensor in s.read(s.plain()):
            if tensor.is_floating_point() and not _is_finite(tensor):
                yield fault(name, "holds NaN or infinite values")
            elif name in written:
                if checksum(tensor) != written[name]:
                    yield fault(name, f"is not what the run wrote {DIFFERS}")
            elif name in source and not _same(tensor, originals.tensor(source[name])):
                yield Finding(s.hygiene, name, "differs from the source")


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite. It looks at pieces, since embeddings can be very large."""
    return all(bool(torch.isfinite(part.float()).all()) for part in tensor.reshape(-1).split(PIECE))


def check_codes(s: Subject) -> Iterator[Finding]:
    """Packed weights have sound scales and zero points, equal the tuned codes, and resemble the
    source."""
    with Shards() as shards, Reader(s.weights()) as originals:
        yield from _check_codes(s, shards, originals)


def _check_codes(s: Subject, shards: Shards, originals: Reader) -> Iterator[Finding]:
    source = _comparable(s, originals.stored)
    for module in sorted(s.packed):
        wanted = s.schemes.get(module)
        if wanted is None or not isinstance(s.fmt, PackedFormat):
            continue
        tensors = {
            name: shards.tensor(s.folder / part.file, name)
            for name, part in s.parts(module).items()
        }
        try:
            codes = s.fmt.unpack(module, tensors, wanted)
        except CONTRADICTIONS as error:
            yield fault(module, f"can't be decoded: {' '.join(str(error).split())}")
            continue
        if codes.group_size == 1 != wanted.group_size and not (s.quantization or {}).get(
            "desc_act"
        ):
            text = (
                "reorders the inputs, but quantization_config does not say desc_act: vLLM would"
                " ignore it"
            )
            yield fault(f"{module}.g_idx", text)
            continue
        broken = list(_ranges(s, module, codes, tensors))
        yield from broken or _against_record(s, module, codes)
        name = f"{module}.weight"
        if not broken and name in source:
            layer = s.skeleton.linears.get(module) if s.skeleton is not None else None
            original = originals.tensor(source[name])
            turned = layer is not None and layer.turned  # a square one does not show it
            yield from _against_source(name, codes, original.T if turned else original)


def check_decoded(s: Subject) -> Iterator[Finding]:
    """Whole files, decoded by their format, hold finite values, equal to what the run tuned."""
    if not isinstance(s.fmt, WholeFormat):
        return
    rest: dict[str, str] = dict(s.record.get("tensors") or {}) if s.fmt.exact_rest else {}
    written: dict[str, str] = {
        n: r["weight"] for n, r in (s.record.get("codes") or {}).items() if "weight" in r
    }
    weights = s.weights()
    source = _comparable(s, weights)
    try:
        for name, tensor in dequantized_state_dict(s.folder, torch.float32):
            if not _is_finite(tensor):
                yield fault(name, "holds NaN or infinite values")
            elif not _tuned_so(tensor, written.pop(name.removesuffix(".weight"), None)):
                yield fault(name, f"does not decode to what was tuned {DIFFERS}")
            elif name in rest and not _sums_to(tensor, rest.pop(name)):
                yield fault(name, f"is not what the run wrote {DIFFERS}")
            elif name in source and tensor.ndim == 2:
                with Reader(weights) as originals:
                    yield from _against_source(name, tensor, originals.tensor(source[name]))
    except (UserError, OSError, *CONTRADICTIONS) as error:
        reason = " ".join(str(error).split())
        named = WEIGHT_FILE.search(reason)
        yield fault(
            named[0] if named else "quantization_config", f"the weights can't be decoded: {reason}"
        )
        return
    gone = {**{f"{name}.weight": sums for name, sums in written.items()}, **rest}
    if gone:
        yield fault(min(gone), f"is gone according to run.json{several([*gone])}")


def _tuned_so(tensor: Tensor, wanted: str | None) -> bool:
    """Whether a float32 weight has that checksum, if one is known. A scale below zero makes -0.0,
    which older records hold, and which a sum with a minimum does not."""
    return wanted is None or any(checksum(each) == wanted for each in (tensor + 0.0, tensor))


def _sums_to(tensor: Tensor, wanted: str) -> bool:
    """Whether a float32 tensor has that checksum in a dtype that holds it exactly."""
    casts = (tensor.to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32))
    return any(torch.equal(cast.float(), tensor) and checksum(cast) == wanted for cast in casts)


def _ranges(
    s: Subject, module: str, codes: Codes, tensors: Mapping[str, Tensor]
) -> Iterator[Finding]:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not _is_finite(tensor):
            yield fault(name, "holds NaN or infinite values")
    if bool((codes.scale_OG == 0).any()):
        yield Finding(s.hygiene, _part(s, tensors, "scale", module), "holds scales of zero")
    if codes.data_type != "int":
        return
    middle, top = 2 ** (codes.bits - 1), 2**codes.bits - 1
    where = _part(s, tensors, "zero", module)
    if int(codes.zero_OG.max()) > top:
        yield fault(where, f"holds a zero point of {int(codes.zero_OG.max())}, above {top}")
    elif codes.sym and bool((codes.zero_OG != middle).any()):
        other = int(codes.zero_OG[codes.zero_OG != middle][0])
        yield fault(
            where,
            f"holds a zero point of {other}; the configuration is symmetric, so all are {middle}",
        )
    elif not codes.sym and bool((codes.zero_OG == middle).all()) and not s.record:
        yield Finding(
            "warning",
            where,
            "every zero point is the middle, but the configuration says asymmetric",
        )


def _against_record(s: Subject, module: str, codes: Codes) -> Iterator[Finding]:
    written = (s.record.get("codes") or {}).get(module)
    if written is None:
        return
    now = codes_record(codes)
    for key in ("bits", "group_size", "sym"):
        if now[key] != written[key]:
            text = (
                f"the configuration gives it {key} = {now[key]}, the run tuned it with"
                f" {written[key]}"
            )
            yield fault(f"{module}: quantization_config", text)
    older = {"global_scale"} - written.keys()  # a record from before it was summed
    for key in (key for key in HELD if key not in older):
        if now.get(key) != written.get(key):
            where = _part(s, s.parts(module), key, module)
            yield fault(where, f"does not decode to what was tuned {DIFFERS}")


def _comparable(s: Subject, weights: Stored) -> dict[str, str]:
    """Weights that are about those of the source. Of a run that moved magnitude between them, or
    turned them, its own checksums tell alone."""
    moved = s.record.get("codes") and s.record.get("equalize", "none") != "none"
    return {} if moved else s.originals(weights)


def _against_source(name: str, decoded: Tensor | Codes, wanted: Tensor) -> Iterator[Finding]:
    shape = decoded.q_OI.shape if isinstance(decoded, Codes) else decoded.shape
    correlation = _correlation(decoded, wanted if wanted.shape == shape else wanted.T)
    if not correlation >= LEAST_CORRELATION:
        yield fault(
            name, f"decoded, it has a correlation of {correlation:.2f} with the source's weight"
        )


def _correlation(decoded: Tensor | Codes, wanted: Tensor) -> float:
    """Of two matrices, some rows at a time. Where one has the same value throughout, as a weight
    that starts at zero, 1 if they are equal but for rounding."""
    count, total = wanted.numel(), torch.zeros(5, dtype=torch.float64)
    for rows in pieces_of(wanted.shape):
        part = dequantize(rows_of(decoded, rows)) if isinstance(decoded, Codes) else decoded[rows]
        x, y = part.double(), wanted[rows].double()
        total += torch.stack([x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()])
    x, y, xx, yy, xy = (total / count).tolist()
    spread = (max(xx - x * x, 0.0) * max(yy - y * y, 0.0)) ** 0.5
    if count < 2:
        return 1.0
    return (xy - x * y) / spread if spread else float(xx - 2 * xy + yy <= CONSTANT * yy)


def _part(s: Subject, tensors: Iterable[str], held: str, module: str) -> str:
    """The tensor of a module that holds its scales, or whatever is asked for; the module where
    there is none."""
    parts = s.fmt.parts.items() if s.fmt else ()
    names = (f"{module}.{part}" for part, what in parts if what == held)
    return next((name for name in names if name in tensors), module)
