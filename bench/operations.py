#!/usr/bin/env python3
"""Operations of our tuner beside auto-round's, by part: counts that no busy machine changes.

    bench/operations.py [--samples 128] [--length 512] [--depth 24] [--keep DIR]

Models of Qwen2.5-0.5B's shape with random weights, one layer and two, are quantized: a straight
line through both goes on to --depth. Of auto-round's 200 steps 4 and 8 are run, likewise. Products
are counted (`torch.utils.flop_counter`, attention too), and nothing else: search, rounding and sign
steps themselves are not. The unit is one forward pass of all samples through the blocks.
"""

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import kept

SHAPE = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
         "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
         "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
OURS: dict[str, dict[str, Any]] = {
    "gptq": {"algorithm": "gptq"},
    "auto light": {"preset": "light"},
    "auto": {},
    "auto best": {"preset": "best"},
}
PEER = "auto-round"
PARTS = (
    "capture",
    "Fisher",
    "head",
    "teacher, student",
    "moments",
    "solve",
    "held out",
    "steps",
    "rest",
)


class Counted:
    """What is counted, by part; of nested parts the inner one has it. totals: of all so far."""

    def __init__(self, totals: Callable[[], Counter[str]]) -> None:
        self.by_part: dict[str, Counter[str]] = defaultdict(Counter)
        self._totals, self._open, self._seen = totals, ["rest"], totals()

    def _note(self) -> None:
        now = self._totals()
        self.by_part[self._open[-1]] += now - self._seen
        self._seen = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs meanwhile belongs to this part."""
        self._note()
        self._open.append(name)
        try:
            yield
        finally:
            self._note()
            self._open.pop()

    def named(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """The function, counted under a name."""

        def counted(*args: Any, **named: Any) -> Any:
            with self.part(name):
                return work(*args, **named)

        return counted


def mm_flop(sum_shape: Any, a_shape: Any, b_shape: Any, *rest: Any, **named: Any) -> int:
    """Of two matrices, added to a sum."""
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


def mv_flop(sum_shape: Any, a_shape: Any, *rest: Any, **named: Any) -> int:
    """Of a matrix by a vector, added to a sum."""
    return 2 * a_shape[0] * a_shape[1]


def attention_flop(q_shape: Any, k_shape: Any, v_shape: Any, *rest: Any, **named: Any) -> int:
    """Two products, of (B, H, T, D) each."""
    from torch.utils.flop_counter import sdpa_flop_count

    return sdpa_flop_count(q_shape, k_shape, v_shape)


def attention_backward_flop(
    grad_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, *rest: Any, **named: Any
) -> int:
    """Five products."""
    from torch.utils.flop_counter import sdpa_backward_flop_count

    return sdpa_backward_flop_count(grad_shape, q_shape, k_shape, v_shape)


@contextmanager
def counting(more: Callable[[], Mapping[str, int]] = dict) -> Iterator[Counted]:
    """Count operations while open, ours by the functions that do them. more: what else is counted,
    as it stands."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from auto_mmround.model import fisher
    from auto_mmround.model.chains import Chain
    from auto_mmround.numerics import start, tuner
    from auto_mmround.run import pipeline
    from auto_mmround.run.session import Session

    aten = torch.ops.aten
    own = {
        aten.addmm_: mm_flop, aten.addmv_: mv_flop, aten.addmv: mv_flop,
        aten._scaled_dot_product_flash_attention_for_cpu: attention_flop,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flop,
    }  # fmt: skip
    watched = (
        ("capture", Session, "record"), ("Fisher", Session, "fisher"),
        ("head", fisher, "_sampled_gradient"),
        ("teacher, student", Chain, "advanced"), ("moments", Session, "moments"),
        ("solve", start, "closed_forms"), ("held out", tuner, "_mean_error"),
        ("held out", pipeline, "mean_error"), ("steps", pipeline, "tune_block"),
    )  # fmt: skip
    with ExitStack() as undo, FlopCounterMode(display=False, custom_mapping=own) as counter:
        counted = Counted(lambda: Counter(operations=counter.get_total_flops(), **more()))
        for name, owner, attribute in watched:
            work = getattr(owner, attribute)
            undo.callback(setattr, owner, attribute, work)
            setattr(owner, attribute, counted.named(name, work))
        with counted.part("rest"):
            yield counted


def made(layers: int, shape: Mapping[str, Any] = SHAPE) -> tuple[Any, Any]:
    """A model of random weights, and a tokenizer that nothing is read with."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=layers, **shape)).bfloat16().eval()
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    return model, PreTrainedTokenizerFast(tokenizer_object=words, pad_token="a", eos_token="a")


def by_auto_round(job: dict[str, Any], model: Any, tokenizer: Any, rows: Any) -> None:
    """The peer's default, but for its number of steps."""
    from tuner import by_peer

    by_peer(
        job | {"options": {}}, model, tokenizer,
        [row[None] for row in rows], rows.shape[1], batch_size=8, iters=job["iters"],
    )  # fmt: skip


def worker(job: dict[str, Any]) -> None:
    """One method in this process; prints operations by part."""
    import torch

    from auto_mmround import AutoRoundMLLM

    model, tokenizer = made(job["layers"])
    samples, length = job["samples"], job["length"]
    generator = torch.Generator().manual_seed(1)
    shape = samples, length
    rows = torch.randint(SHAPE["vocab_size"], shape, generator=generator)  # type: ignore[call-overload]
    with counting() as counted:
        if job["method"] == PEER:
            by_auto_round(job, model, tokenizer, rows)
        else:
            dataset = [{"input_ids": row.tolist()} for row in rows]
            AutoRoundMLLM(
                model, tokenizer, dataset=dataset, nsamples=samples, seqlen=length, device="cpu",
                bits=4, group_size=128, **OURS[job["method"]],
            ).quantize()  # fmt: skip
    print(json.dumps({part: counted.by_part[part]["operations"] for part in PARTS}))


def main() -> None:
    """A row for every method, in forward passes."""
    parser = kept.options(__doc__)
    parser.add_argument("--worker", type=json.loads)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--methods", nargs="+", default=[*OURS, PEER])
    parser.add_argument("--depth", type=int, default=24, help="layers that are counted on to")
    found = parser.parse_args()
    if found.worker:
        worker(found.worker)
        return
    base = {"samples": found.samples, "length": found.length} | kept.scheme("W4g128")
    unit = forward_pass(found.samples, found.length, found.depth)
    whole = {m: _of_depth(base | {"method": m}, found.depth) for m in found.methods}
    peer = sum(whole.get(PEER, {}).values())
    table = kept.Table("method", *PARTS, "together", "x auto-round")
    for method, parts in whole.items():
        cells = [f"{parts[part] / unit:.2f}" for part in PARTS]
        together = sum(parts.values())
        share = f"{together / peer:.3f}" if peer else ""
        table.add(method, *cells, f"{together / unit:.2f}", share)
    title = f"Operations, {found.samples} x {found.length} tokens, {found.depth} layers"
    kept.keep(found.keep, "operations", title, table)


def _of_depth(job: dict[str, Any], depth: int) -> dict[str, int]:
    one, two = (_counted(job | {"layers": layers}) for layers in (1, 2))
    return _line(one, two, depth - 1)


def _counted(job: dict[str, Any]) -> dict[str, int]:
    if job["method"] != PEER:
        return _answer(job)
    four, eight = (_answer(job | {"iters": steps}) for steps in (4, 8))
    return _line(four, eight, (200 - 4) / 4)


def _line(a: dict[str, int], b: dict[str, int], far: float) -> dict[str, int]:
    """By part: from ``a`` on, ``far`` times as far as ``b`` is."""
    return {part: round(a[part] + far * (b[part] - a[part])) for part in PARTS}


def _answer(job: dict[str, Any]) -> dict[str, int]:
    found = kept.answer(__file__, job)
    if "error" in found:
        sys.exit(f"{job['method']}: {found['error']}")
    return found


def forward_pass(samples: int, length: int, depth: int, shape: Mapping[str, Any] = SHAPE) -> int:
    """Operations of all samples through the blocks: products with weights, and of attention."""
    width, heads, size = (
        shape[k] for k in ("hidden_size", "num_attention_heads", "intermediate_size")
    )
    pairs = shape["num_key_value_heads"] * width // heads
    weights = 2 * width * (width + pairs) + 3 * width * size
    return depth * samples * length * (2 * weights + 4 * length * width)


if __name__ == "__main__":
    main()
