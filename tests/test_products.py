"""bfloat16 products made in float32: what torch gives, forwards and backwards, and only where they
are faster."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional

from auto_mmround.model import devices, products
from auto_mmround.model.products import Float32Products
from auto_mmround.model.standins import recomputed
from auto_mmround.run.finished import compute_alike
from auto_mmround.run.processes import Processes


def run(context, function, *shapes):
    """The result of a function of bfloat16 tensors, and its gradients."""
    draw = torch.Generator().manual_seed(0)
    given = [torch.randn(shape, generator=draw).bfloat16().requires_grad_() for shape in shapes]
    with context:
        made = function(*given)
        made.float().square().sum().backward()
    return [made.detach(), *(tensor.grad for tensor in given)]


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (functional.linear, [(3, 7, 33), (50, 33)]),
        (functional.linear, [(3, 7, 33), (50, 33), (50,)]),
        (torch.matmul, [(2, 9, 17), (2, 17, 5)]),
        (lambda a, b: a @ b, [(9, 17), (17, 5)]),
        (torch.addmm, [(5,), (9, 17), (17, 5)]),
        (functional.scaled_dot_product_attention, [(1, 2, 9, 8)] * 3),
        (functional.conv1d, [(1, 4, 20), (6, 4, 3)]),
        (functional.conv3d, [(1, 2, 4, 6, 6), (3, 2, 2, 3, 3)]),
    ],
)
def test_the_same_numbers_as_torch(function, shapes, monkeypatch):
    monkeypatch.setattr(products, "CHUNK", 33 * 16)  # a weight of 50 rows in four parts
    ours, plain = (
        run(context, function, *shapes) for context in (Float32Products(), nullcontext())
    )
    for got, expected in zip(ours, plain, strict=True):
        assert got.dtype == torch.bfloat16
        # Equal but for sums that lie on the edge between two numbers; gradients read a rounded
        # result.
        torch.testing.assert_close(
            got, expected, rtol=2**-7, atol=2**-6 * expected.abs().max().item()
        )


def test_backward_holds_no_wider_copy_of_a_weight():
    layer, seen = nn.Linear(64, 64).bfloat16(), []
    with (
        Float32Products(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t),
    ):
        layer(torch.randn(8, 64).bfloat16().requires_grad_())
    assert {tensor.dtype for tensor in seen} == {torch.bfloat16}


def test_others_are_left_alone():
    with Float32Products():
        assert functional.linear(torch.ones(9, 4), torch.ones(3, 4)).dtype == torch.float32
        assert (
            functional.linear(torch.ones(9, 4).half(), torch.ones(3, 4).half()).dtype == torch.half
        )


@pytest.mark.parametrize(
    ("known", "wide"),
    [
        ({"avx2": True, "avx512_bf16": False}, True),
        ({"avx512_bf16": True, "amx_bf16": True}, False),
        ({"bf16": True}, False),
        ({}, False),
    ],
)
def test_only_where_the_processor_is_slow(monkeypatch, known, wide):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    cpu = torch.device("cpu")
    assert isinstance(devices.products(cpu, torch.bfloat16), Float32Products) == wide
    assert isinstance(devices.products(torch.device("cuda"), torch.bfloat16), nullcontext)
    for dtype, amp in ((torch.float32, True), (torch.float32, False), (torch.bfloat16, True)):
        with devices.autocast(cpu, dtype, amp):
            assert torch.is_autocast_enabled("cpu") == (amp and dtype == torch.float32 and not wide)


@pytest.mark.parametrize("bf16", [0.5, 1.0, 1.7])
def test_avx512_alone_is_timed_once(monkeypatch, bf16):
    """A busy machine makes some of the products slow: the quickest counts."""
    asked = []

    def seconds(x):
        asked.append(x.dtype)
        return (bf16 if x.dtype == torch.bfloat16 else 1.0) * (1.0 if len(asked) % 3 else 50.0)

    monkeypatch.setattr(devices, "_seconds", seconds)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setattr(devices, "_KNOWN_BF16", [])
    threads = torch.get_num_threads()
    found = {devices.fast_bf16(torch.device("cpu")) for _ in range(2)}
    assert found == {bf16 < 1.25} and len(asked) == 2 * devices.TIMES
    assert torch.get_num_threads() == threads


def test_processes_make_products_as_the_first_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setattr(Processes, "gather", lambda self, mine: [False, mine])
    monkeypatch.setattr(devices, "_KNOWN_BF16", [True])
    compute_alike(tmp_path, processes=Processes(1, 2))
    assert not devices.fast_bf16(devices.HOST)


def test_blocks_that_are_computed_again_are_computed_alike(monkeypatch):
    monkeypatch.setattr(devices, "fast_bf16", lambda device: False)
    model, x = (
        nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))).bfloat16(),
        torch.randn(4, 16).bfloat16(),
    )

    def gradient(context):
        given = x.clone().requires_grad_()
        with context, Float32Products():
            model(given).backward(torch.ones_like(x))
        return given.grad

    assert torch.equal(gradient(recomputed(model, ["0", "1", "2"])), gradient(nullcontext()))


def test_small_operations_are_not_asked_about_in_work_of_float32():
    seen = []

    class Asked(Float32Products):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    def twice(x, *, more):
        return x.mul(2).add(more)

    x = torch.ones(3)
    with Asked():
        made = products.unseen(twice)(x, more=1)
        assert not seen
        assert twice(x, more=1).tolist() == made.tolist() == [3, 3, 3]
    assert seen[:2] == [torch.Tensor.mul, torch.Tensor.add]
