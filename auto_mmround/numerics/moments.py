"""Second moments of a weight's inputs: with H = mean_t w_t x_t x_t^T the squared output error of a
quantized weight is tr((W - W~) H (W - W~)^T). Shapes: O out, I in, T tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

# columns of H accumulated at a time: only panels on and above the diagonal are multiplied
PANEL = 256


class Moments:
    """Running second moments of a layer's inputs, float32. cross: those of student inputs with
    teacher inputs too (see `gptq.retarget`)."""

    def __init__(
        self, features: int, *, cross: bool = False, device: torch.device | str | None = None
    ):
        # on and above the diagonal: H is symmetric
        self._panels_PI = [
            torch.zeros(min(PANEL, features - i), features - i, device=device)
            for i in range(0, features, PANEL)
        ]
        self._features, self._device = features, device
        self._cross_II = torch.zeros(features, features, device=device) if cross else None
        self._total = torch.zeros((), device=device)

    @classmethod
    def pooled(cls, parts: Sequence["Moments"]) -> "Moments":
        """One object with the tokens of several."""
        crossed = all(part.crossed for part in parts)
        whole = cls(parts[0].features, cross=crossed, device=parts[0]._device)
        for part in parts:
            # cross moments come last
            for own, other in zip(whole.sums(), part.sums(), strict=False):
                own += other
        return whole

    @property
    def features(self) -> int:
        """Size of an input."""
        return self._features

    @property
    def crossed(self) -> bool:
        """Whether teacher inputs are seen too."""
        return self._cross_II is not None

    def sums(self) -> list[Tensor]:
        """The running sums themselves, not copies. Sums over parts of the tokens may be added."""
        cross = [] if self._cross_II is None else [self._cross_II]
        return [*self._panels_PI, self._total, *cross]

    def add(self, x: Tensor, weight: Tensor | None = None, teacher: Tensor | None = None) -> None:
        """Add tokens ``x`` (..., in) with weights (...), default 1, pads 0; ``teacher``: the inputs
        W was trained on.

        Raises ValueError when ``teacher`` is given without ``cross``, or missing with it.
        """
        if (teacher is None) != (self._cross_II is None):
            raise ValueError("teacher inputs are needed with cross moments, and only with them")
        root_T1 = None if weight is None else weight.detach().reshape(-1, 1).float().sqrt()
        self._total += x.shape[:-1].numel() if weight is None else weight.detach().float().sum()
        x_TI = _rows(x, root_T1)
        with bf16_products(all(t.dtype == torch.bfloat16 for t in (x, teacher) if t is not None)):
            for i, panel_PI in zip(range(0, self.features, PANEL), self._panels_PI, strict=True):
                _add_product(panel_PI, x_TI[:, i : i + PANEL], x_TI[:, i:])
            if self._cross_II is not None and teacher is not None:
                _add_product(self._cross_II, x_TI, _rows(teacher, root_T1))

    def hessian(self) -> Tensor:
        """H = mean_t w_t x_t x_t^T, (in, in), symmetric; its diagonal is E[x^2]. Zero before the
        first token. For wide layers read `rows` of it: H of 29,568 columns takes 3.5 GB."""
        return self.rows(slice(0, self.features))

    def diagonal(self) -> Tensor:
        """E[x^2] (in,)."""
        return torch.cat([panel_PI.diagonal() for panel_PI in self._panels_PI]) / self._mean_of()

    def rows(self, part: slice) -> Tensor:
        """Some rows of H (rows, in), a copy."""
        start, stop, _ = part.indices(self.features)
        h_RI = torch.empty(stop - start, self.features, device=self._total.device)
        for i, panel_PI in zip(range(0, self.features, PANEL), self._panels_PI, strict=True):
            end = i + len(panel_PI)
            low, high = max(start, i), min(stop, end)
            if low < high:
                h_RI[low - start : high - start, i:] = panel_PI[low - i : high - i]
                upper = panel_PI[:, : end - i].triu()  # the lower half differs by rounding
                whole = upper + upper.triu(1).t()
                h_RI[low - start : high - start, i:end] = whole[low - i : high - i]
            below = max(start, end)
            if below < stop:
                h_RI[below - start :, i:end] = panel_PI[:, below - i : stop - i].t()
        return h_RI.div_(self._mean_of())

    def _mean_of(self) -> Tensor:
        return self._total.clamp(min=1e-30)

    def rest(self) -> None:
        """Keep only the sums that `error` reads, in host memory and bf16. No other method works
        after this."""
        flat = [panel_PI.flatten().bfloat16() for panel_PI in self._panels_PI]
        shapes = [panel_PI.shape for panel_PI in self._panels_PI]
        kept = torch.cat(flat).cpu().split([shape.numel() for shape in shapes])
        self._panels_PI = [part.view(shape) for part, shape in zip(kept, shapes, strict=True)]
        self._cross_II = None

    def error(self, error_OI: Tensor) -> Tensor:
        """tr(E H E^T), summed over the outputs, as `output_error` gives it, exact to a thousandth.
        H is not made whole. The result is on the errors' device, and the host does not wait."""
        total = torch.zeros((), device=error_OI.device)
        with bf16_products(True):
            for i, panel_PI in zip(range(0, self.features, PANEL), self._panels_PI, strict=True):
                along_OI = error_OI[:, i : i + PANEL] @ panel_PI.to(error_OI) * error_OI[:, i:]
                total += along_OI[:, :PANEL].sum() + 2 * along_OI[:, PANEL:].sum()  # H is symmetric
        return total / self._mean_of()

    def cross(self) -> Tensor:
        """C = mean_t w_t x_student x_teacher^T, (in, in). Raises ValueError if they were not asked
        for."""
        if self._cross_II is None:
            raise ValueError("no cross moments were accumulated")
        return self._cross_II / self._mean_of()


# Moments where H whole would not fit: they keep half of it, and give some rows at a time.
Hessian = Tensor | Moments


def hessian_rows(hessian: Hessian, part: slice) -> Tensor:
    """Some rows (.., rows, in) of H (.., in, in)."""
    return hessian[..., part, :] if isinstance(hessian, Tensor) else hessian.rows(part)


def hessian_diagonal(hessian: Hessian) -> Tensor:
    """The diagonal (.., in) of H (.., in, in)."""
    if isinstance(hessian, Tensor):
        return hessian.diagonal(dim1=-2, dim2=-1)
    return hessian.diagonal()


@cache
def sums_wide(device_type: str) -> bool:
    """Whether devices of this type multiply bf16 factors with a float32 result. ROCm has the
    operation too, but refuses it."""
    key = torch._C._dispatch_key_for_device(device_type)
    known = torch._C._dispatch_has_kernel_for_dispatch_key("aten::mm.dtype", key)
    return bool(known) and not (device_type == "cuda" and torch.version.hip)


def _rows(x: Tensor, root_T1: Tensor | None) -> Tensor:
    """Tokens as rows, times the square roots of their weights. float32; bf16 stays on devices
    where `sums_wide` holds."""
    x_TI = x.detach().reshape(-1, x.shape[-1])
    narrow = x.dtype == torch.bfloat16 and sums_wide(x.device.type)
    dtype = torch.bfloat16 if narrow else torch.float32
    return x_TI.to(dtype) if root_T1 is None else (x_TI.float() * root_T1).to(dtype)


def _add_product(sum_PI: Tensor, x_TP: Tensor, y_TI: Tensor) -> None:
    """Add x^T y in float32."""
    if x_TP.dtype == y_TI.dtype == torch.bfloat16:
        sum_PI.add_(torch.mm(x_TP.t(), y_TI, out_dtype=torch.float32))
    else:
        sum_PI.addmm_(x_TP.float().t(), y_TI.float())


@contextmanager
def bf16_products(allowed: bool) -> Iterator[None]:
    """Let float32 products read factors as bf16 and add in float32: about 2.5 times faster, exact
    for bf16 factors."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if allowed else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def output_error(w_OI: Tensor, wq_OI: Tensor, hessian_II: Tensor) -> float:
    """tr((W - W~) H (W - W~)^T): the squared output error a token, summed over outputs."""
    error_OI = w_OI.float() - wq_OI.float()
    return ((error_OI @ hessian_II) * error_OI).sum().item()
