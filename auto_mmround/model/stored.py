"""The tensors of a checkpoint's files as floating point: what is stored in FP8 is decoded while it
is read.

Beside a weight in FP8 lies its scale, a multiplier a tensor, a row or a block: `weight_scale_inv`
in the files of DeepSeek and Transformers, `weight_scale` in those of compressed-tensors, ModelOpt
and others. W = q s, rounded to bfloat16. The tensors decide, not the configuration, which may tell
it anywhere or have been lost.

gpt-oss stores its experts in MXFP4: `X_blocks`, two numbers a byte, and `X_scales`, an exponent for
32 of them. They are read as `X`, the way Transformers holds it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_mmround.errors import UserError
from auto_mmround.headers import DAMAGED, OpenFiles, read_header
from auto_mmround.lazy import LazyTensor
from auto_mmround.model.quantized import FLOATS, METHODS, Block, block_sizes, told
from auto_mmround.untrusted import one_line, weight_files

FP8 = ("F8_E4M3", "F8_E5M2")
PACKED = ("U8", "I8", "I16", "I32", "U16", "U32")  # integers of another quantization
SMALL = ("F8_", "F6_", "F4")  # floats that mean nothing without a scale
# Ends of keys that name a weight, where integers can be nothing but packed; masks of old models are
# integers too.
WEIGHTS = (".weight", ".qweight", ".weight_packed", "_proj", "_proj_blocks")
SCALE_ENDS = ("_scale_inv", "_scale")  # behind the key of a weight
EXPONENTS = ("F8_E8M0", "U8")  # 2^(n - 127); files of MXFP8 name them bytes
# What changes a weight besides one scale. It is not read.
SECOND = ("_scale_2", "_zero_point")
SMOOTHED = ".pre_quant_scale"
# Of what runs in FP8 besides weights: nothing that is quantized anew has a use for them.
LEFT_OUT = (".input_scale", ".input_scale_ub", ".activation_scale", ".output_scale", ".q_scale",
    ".k_scale", ".v_scale",
            ".kv_scale", ".prob_scale", ".prob_output_scale")  # fmt: skip
BLOCKS, EXPONENTS_OF = "_blocks", "_scales"  # ends of keys of MXFP4
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # then the same below zero
USUAL: Block = (128, 128)  # where blocks are stored, but their size isn't told


@dataclass(frozen=True)
class Stored:
    """files: the file of every tensor, scales left out. dtypes: its type as safetensors names it.
    scales: key of an FP8 or MXFP4 tensor -> (key, file) of its scale. blocks: sizes (rows, columns)
    of what shares a scale, as far as told. packed: key of an MXFP4 tensor -> that in its file."""

    files: Mapping[str, Path]
    scales: Mapping[str, tuple[str, Path]] = field(default_factory=dict)
    blocks: tuple[Block, ...] = ()
    dtypes: Mapping[str, str] = field(default_factory=dict)
    packed: Mapping[str, str] = field(default_factory=dict)

    def reader(self) -> "Reader":
        """What reads the tensors while it is open."""
        return Reader(self)

    def nbytes(self) -> int:
        """Bytes of all tensors, decoded."""
        with Reader(self) as reader:
            count = sum(
                torch.Size(reader.plain(key).get_shape()).numel() * (3 if key in self.packed else 1)
                for key in self.scales
            )
        return sum(path.stat().st_size for path in set(self.files.values())) + count

    def dtype(self) -> torch.dtype | None:
        """That of the first floating-point tensor, as Transformers takes it; None without any."""
        if self.scales:
            return torch.bfloat16
        return next(
            (FLOATS[self.dtypes[key]] for key in self.files if self.dtypes[key] in FLOATS), None
        )


class Reader(OpenFiles):
    """Reads tensors while it is open."""

    def __init__(self, stored: Stored):
        super().__init__()
        self.stored = stored

    def plain(self, key: str, path: Path | None = None) -> Any:
        """What the file holds, as safetensors' slice."""
        file = self.file(path or self.stored.files[key])
        return file.get_slice(self.stored.packed.get(key, key))

    def slice(self, key: str) -> Any:
        """Something that gives the tensor when it is asked for ``[...]``."""
        if key not in self.stored.scales:
            return self.plain(key)
        q, scale = self.plain(key), self.plain(*self.stored.scales[key])
        if key in self.stored.packed:
            return LazyTensor(lambda: unpacked(key, q[...], scale[...]))
        return LazyTensor(lambda: decoded(key, q[...], scale[...], self.stored.blocks))

    def tensor(self, key: str) -> Tensor:
        """The tensor."""
        return self.counted(self.slice(key)[...])


def stored_tensors(folder: Path) -> Stored:
    """What lies in a checkpoint folder. Raises UserError for files that can't be read, where it is
    quantized in another way than FP8, and for a tensor in FP8 or packed whose scale is not
    known."""
    files, dtypes = _headers(folder)
    configs = told(folder)
    names = {
        key: scale
        for key, dtype in dtypes.items()
        if dtype in FP8 and (scale := _scale_of(key, dtypes))
    }
    pairs = {
        key.removesuffix(BLOCKS): key
        for key, dtype in dtypes.items()
        if dtype == "U8"
        and key.endswith(BLOCKS)
        and dtypes.get(key.removesuffix(BLOCKS) + EXPONENTS_OF) == "U8"
    }
    names |= {stem: stem + EXPONENTS_OF for stem in pairs}
    for stem, key in pairs.items():
        files[stem] = files.pop(key)
        dtypes[stem] = dtypes.pop(key)
    of_scales = set(names.values())
    packed = any(
        dtype in PACKED and key not in of_scales and key not in pairs
        for key, dtype in dtypes.items()
    )
    for method in (config.get("quant_method") for config in configs):
        if method not in METHODS or packed:
            raise UserError(
                f"model {folder} is quantized already ({method}); give the original weights, or FP8"
            )
    problems = (_problem(key, dtypes, of_scales) for key in _ordered(dtypes) if key not in pairs)
    problem = next(filter(None, problems), None)
    if problem:
        raise UserError(
            f"model {folder}: {problem}; give the original weights, or FP8 with its scales"
        )
    if not names and not configs:
        return Stored(files, dtypes=dtypes)
    left_out = of_scales | {key for key in files if key.endswith(LEFT_OUT)}
    blocks = {block for config in configs for block in block_sizes(config, folder)}
    kept = {key: path for key, path in files.items() if key not in left_out}
    return Stored(
        kept,
        {key: (name, files[name]) for key, name in names.items()},
        tuple(sorted(blocks)),
        dtypes,
        pairs,
    )


def _headers(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """The file and the safetensors dtype of each tensor."""
    files: dict[str, Path] = {}
    dtypes: dict[str, str] = {}
    try:
        for path in weight_files(folder):
            headers = read_header(path)
            files |= dict.fromkeys(headers, path)
            dtypes |= {key: header.dtype for key, header in headers.items()}
    except DAMAGED as error:
        raise UserError(
            f"model {folder} can't be loaded: {path.name}: {one_line(str(error))[:300]}"
        ) from None
    return files, dtypes


def _scale_of(key: str, dtypes: Mapping[str, str]) -> str | None:
    return next((key + end for end in SCALE_ENDS if key + end in dtypes), None)


def _ordered(dtypes: Mapping[str, str]) -> list[str]:
    """Weights first, so that a message names one of them and not its scale."""
    return sorted(dtypes, key=lambda key: (not key.endswith(WEIGHTS), key))


def _problem(key: str, dtypes: Mapping[str, str], of_scales: set[str]) -> str | None:
    """Why the values of a tensor are not known, None if they are."""
    dtype, scale = dtypes[key], _scale_of(key, dtypes)
    smoothed = key.removesuffix(".weight") + SMOOTHED
    if key.endswith(".weight") and smoothed in dtypes:
        return f"{key} needs {smoothed} on its inputs, which is not read"
    if key in of_scales:
        if dtype in FLOATS or dtype in EXPONENTS:
            return None
        return f"{key}, a scale, is stored as {dtype}"
    if dtype in FP8 and scale is None:
        return f"{key} is stored in FP8, but the files hold no scale for it"
    second = next((key + end for end in SECOND if key + end in dtypes), None)
    if dtype in FP8 and second:
        return f"{key} is stored in FP8 with {second}, which is not read"
    if dtype.startswith(SMALL) and dtype not in FP8:
        return f"{key} is stored as {dtype}, which is not read"
    if key.endswith(WEIGHTS) and dtype not in FLOATS and dtype not in FP8:
        return f"{key} is stored as {dtype}, packed in a way that is not read"
    if key.endswith(WEIGHTS) and dtype in FLOATS and scale is not None:
        return (
            f"{key} is stored as {dtype} and has a scale beside it, {scale}: whether it is applied"
            " is not known"
        )
    return None


def decoded(key: str, q: Tensor, scale: Tensor, blocks: Sequence[Block] = ()) -> Tensor:
    """bfloat16 (.., O, I) of FP8 values and a scale: one, (O,), (O, 1) or one a block, (.., O /
    rows, I / columns); for a stack of matrices also (E,). Bytes are exponents.

    The last block of a row or column may be cut off, if ``blocks`` says how large the others are.
    Raises UserError.
    """
    s = (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()
    if s.ndim == 1 and 1 < len(s) == q.shape[0]:
        s = s.reshape(-1, *[1] * (q.ndim - 1))
    if s.numel() == 1:
        return (q.float() * s.reshape(())).to(torch.bfloat16)
    sizes, counts = q.shape[-2:], s.shape[-2:]
    leading = s.ndim == q.ndim and all(
        n in (1, size) for n, size in zip(s.shape[:-2], q.shape[:-2], strict=True)
    )
    steps = _steps(sizes, counts, blocks) if leading and len(counts) == 2 and s.numel() else None
    if steps is None:
        raise UserError(
            f"{key}: its scale, {tuple(scale.shape)}, does not fit its shape, {tuple(q.shape)}"
        )
    for dim, size, step in zip((-2, -1), sizes, steps, strict=True):
        s = s.repeat_interleave(step, dim).narrow(dim, 0, size)
    return (q.float() * s).to(torch.bfloat16)


def unpacked(key: str, q_EOGb: Tensor, exponent_EOG: Tensor) -> Tensor:
    """bfloat16 (E, I, O) of MXFP4: bytes with the even column in the low half, and biased exponents
    of their blocks. Raises UserError where their shapes differ."""
    if q_EOGb.shape[:-1] != exponent_EOG.shape or q_EOGb.ndim != 4:
        raise UserError(
            f"{key}: its exponents, {tuple(exponent_EOG.shape)}, do not fit its blocks,"
            f" {tuple(q_EOGb.shape)}"
        )
    levels = torch.tensor([*E2M1, *(-level for level in E2M1)], dtype=torch.bfloat16)
    experts, rows, groups, half = q_EOGb.shape
    whole_EIO = torch.empty(experts, 2 * groups * half, rows, dtype=torch.bfloat16)
    for i in range(experts):
        codes = torch.stack([q_EOGb[i] & 15, q_EOGb[i] >> 4], -1).flatten(-2)
        values = torch.ldexp(levels[codes.int()], exponent_EOG[i, ..., None].int() - 127)
        whole_EIO[i] = values.flatten(1).t()
    return whole_EIO


def _steps(sizes: Sequence[int], counts: Sequence[int], blocks: Sequence[Block]) -> Block | None:
    """Rows and columns that share a scale, None where the counts fit nothing, or more than one
    thing."""
    if all(count in (1, size) for size, count in zip(sizes, counts, strict=True)):
        return sizes[0] // counts[0], sizes[1] // counts[1]
    even = max(1, sizes[0] // counts[0]), max(1, sizes[1] // counts[1])
    fitting = {
        (min(block[0], sizes[0]), min(block[1], sizes[1]))
        for block in blocks or (even, USUAL)
        if all(
            -(-size // step) == count
            for size, step, count in zip(sizes, block, counts, strict=True)
        )
    }
    return fitting.pop() if len(fitting) == 1 else None
