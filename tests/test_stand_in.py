"""The stand-in accelerator refuses what CUDA refuses, computes what the processor does, and
counts."""

import copy

import accelerator
import pytest
import torch
from accelerator import NAME, limited, memory, watched
from torch import nn
from torch.utils.checkpoint import checkpoint

pytestmark = [accelerator.NEEDED, accelerator.STRICT]
HERE, OTHER = torch.device(NAME, 0), torch.device(NAME, 1)


@pytest.fixture(autouse=True, scope="module")
def devices():
    with accelerator.shown():
        yield


def on_host():
    return torch.arange(32.0).view(4, 8) / 7 - 2


MIXED = {
    "sum": lambda x, y: y + x,
    "product": lambda x, y: y @ x.t(),
    "list": lambda x, y: torch.cat([x, y]),
    "in place": lambda x, y: x.add_(y),
    "in place there": lambda x, y: y.add_(x),
    "index on the device": lambda x, y: x[torch.tensor([0, 1]).to(HERE)],
    "number on the device": lambda x, y: x.mul_(torch.tensor(2.0, device=HERE)),
    "numbers": lambda x, y: torch.stack([torch.tensor(1.0), torch.tensor(1.0, device=HERE)]),
    "index_copy": lambda x, y: y.index_copy(0, torch.tensor([0]), y[:1]),
    "two devices": lambda x, y: y + x.to(OTHER),
    "linear": lambda x, y: nn.functional.linear(y, x),
    "convolution": lambda x, y: nn.functional.conv1d(y[None], x[None, :, :4]),
}


@pytest.mark.parametrize("name", MIXED)
def test_tensors_of_two_devices_do_not_meet(name):
    x = on_host()
    with pytest.raises(RuntimeError, match="same device"):
        MIXED[name](x, x.to(HERE))


def test_what_else_cuda_refuses():
    y = on_host().to(HERE)
    with pytest.raises(TypeError, match="can't convert"):
        y.numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, device=HERE, generator=torch.Generator())
    with pytest.raises(RuntimeError, match="products of integers"):
        y.int() @ y.int().t()
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"), limited(1000):
        torch.empty(1 << 20, device=HERE)


SAME = {
    "numbers of the host": lambda x: x * torch.tensor(2.0) + 1,
    "where": lambda x: torch.where(x > 0, x, torch.tensor(0.0)),
    "index of the host": lambda x: x[torch.tensor([0, 2])],
    "mask": lambda x: x[x > 0],
    "views": lambda x: x.view(8, 4).t()[1:3, ::2].unfold(1, 2, 2),
    "diagonal": lambda x: x.clone().diagonal().add_(1),
    "set": lambda x: x.clone().index_fill_(0, torch.tensor([1]).to(x.device), 7),
    "out": lambda x: torch.add(x, x, out=torch.empty(0, device=x.device)),
    "sort": lambda x: x.sort(descending=True)[1],
    "cholesky": lambda x: torch.linalg.cholesky_ex(x @ x.t() + torch.eye(4, device=x.device),
        upper=True)[0],
    "solve": lambda x: torch.linalg.solve(x @ x.t() + torch.eye(4, device=x.device), x),
    "complex": lambda x: torch.view_as_real(torch.view_as_complex(x.view(4, 4, 2)) ** 2),
    "float8": lambda x: x.to(torch.float8_e4m3fn).float(),
    "bits": lambda x: x.view(torch.int32) >> 3,
    "search": lambda x: torch.searchsorted(x[0].contiguous(), x[:, 0].contiguous()),
    "attention": lambda x: nn.functional.scaled_dot_product_attention(x[None], x[None], x[None],
        is_causal=True),
    "quantile": lambda x: x.quantile(0.3, dim=1),
    "histogram of integers": lambda x: torch.histc((x * 3).int(), 5, -6, 6),
    "foreach": lambda x: torch.stack(torch._foreach_mul([x, x], 2.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_results_are_those_of_the_processor(name):
    made = SAME[name](on_host().to(HERE))
    assert made.device == HERE
    if name != "histogram of integers":  # CUDA's alone
        wanted = SAME[name](on_host())
        assert torch.equal(made.cpu(), wanted) or (
            name == "attention" and torch.allclose(made.cpu(), wanted)
        )


def test_setting_by_masks_and_slices():
    x, y = on_host(), on_host().to(HERE)
    for t in (x, y):
        t[1, 2:5] = 7
        t[t > 1] = 0
        t[:, 0] += 1
        t[t < 0] = t[t < 0] * 2
    assert torch.equal(x, y.cpu())


def test_random_numbers_are_the_devices_own():
    drawn = torch.Generator(device=HERE).manual_seed(3)
    first = torch.rand(3, device=HERE, generator=drawn)
    assert torch.equal(first, torch.rand(3, device=HERE, generator=drawn.manual_seed(3)))
    torch.manual_seed(0)
    state, one = torch.accel.get_rng_state(0), torch.rand(3, device=HERE)
    torch.accel.set_rng_state(state, 0)
    assert torch.equal(one, torch.rand(3, device=HERE))
    torch.manual_seed(0)
    torch.rand(100)  # of the processor
    assert torch.equal(one, torch.rand(3, device=HERE))


def train(device):
    torch.manual_seed(0)
    shape = (
        nn.Conv2d(3, 4, 3),
        nn.Flatten(),
        nn.Linear(144, 8),
        nn.LayerNorm(8),
        nn.GELU(),
        nn.Linear(8, 2),
    )
    model, seen = nn.Sequential(*shape).to(device), set()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: seen.add(p.grad.device.type))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pixels = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(device)
    for _ in range(3):
        optimizer.zero_grad()
        loss = checkpoint(model, pixels, use_reentrant=False).square().mean()
        loss.backward()
        optimizer.step()
    assert seen == {torch.device(device).type}
    return loss.item()


def test_gradients_hooks_and_recomputation():
    assert train(HERE) == pytest.approx(train("cpu"), rel=1e-5)


def test_autocast_is_that_of_cuda():
    y, layer = on_host().to(HERE), nn.Linear(8, 8).to(HERE)
    with torch.autocast(NAME, torch.bfloat16):
        low = layer(y)
        assert low.dtype == (y @ y.t()).dtype == torch.bfloat16
        assert (
            low.softmax(-1).dtype
            == low.exp().dtype
            == low.sum().dtype
            == low.norm().dtype
            == torch.float32
        )
        assert (low + low).dtype == torch.bfloat16 and torch.addcmul(
            y, low, low
        ).dtype == torch.float32
        with torch.autocast(NAME, enabled=False):
            assert layer(y).dtype == torch.float32


def test_ties_survive_a_move():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Embedding(4, 4), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

    tied = Tied().to(HERE)
    assert tied.a.weight is tied.b.weight and tied.a.weight.device == HERE
    assert copy.deepcopy(tied).b.weight.device == HERE


def test_memory_is_counted_by_device():
    before = memory(1).used
    kept = torch.empty(1000, device=OTHER)
    accelerator.forget_peak(1)
    del kept
    torch.empty(3, device=OTHER)
    assert memory(1).used == before and memory(1).peak == before + 4096 and memory(1).count == 1


def test_waits_copies_and_launches_are_counted():
    x = on_host()
    with watched() as seen:
        y = x.to(HERE)
        (y > 0).nonzero()
        y[y > 0] = 0  # one number: no need to know how many
        y.sum().item()
        y.cpu()
        y[torch.tensor([1])]
    waits = sorted(
        name for (kind, name, _), n in seen.events.items() for _ in range(n) if kind == "wait"
    )
    assert waits == ["index", "item", "nonzero"]
    assert seen.count("to device") >= 1 and seen.count("to host") == 1 and seen.count("launch") > 2
    assert seen.bytes["to host"] == x.nbytes
    with watched() as quiet:
        y[y > 0]
    assert quiet.count("wait") == 1


def test_shapes_that_depend_on_values_can_be_refused():
    y = on_host().to(HERE)
    refused = (
        lambda: y.nonzero(),
        lambda: y[y > 0],
        lambda: y.int().unique(),
        lambda: y.masked_select(y > 0),
        lambda: y.index_put_((y > 0,), torch.ones(int((y > 0).sum()), device=HERE)),
    )
    with accelerator.refusing(accelerator.SHAPES):
        for work in refused:
            with pytest.raises(RuntimeError, match="depend on values"):
                work()
        y[y > 0] = 0  # one number: nothing to be counted
        assert y[torch.tensor([1], device=HERE)].shape == (1, 8)
    assert y.nonzero().numel() > 0
    double = y.double()
    with accelerator.refusing(accelerator.DOUBLES), pytest.raises(RuntimeError, match="float64"):
        double + 1
    assert (double + 1).dtype == torch.float64


def test_other_tests_see_no_accelerator():
    assert torch.accelerator.is_available() and torch.accelerator.device_count() == 2
    accelerator.library().accel_show(0)
    assert not torch.accelerator.is_available() and torch.accelerator.device_count() == 0
    accelerator.library().accel_show(2)
