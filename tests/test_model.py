"""Structure, capture and replay, names: on tiny random models of real classes."""

import pytest
import torch
from torch import nn
from transformers import (
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from auto_mmround.errors import UserError
from auto_mmround.model import devices
from auto_mmround.model.capture import capture, recapture
from auto_mmround.model.chains import as_dtype, difference
from auto_mmround.model.devices import autocast, resolve
from auto_mmround.model.keys import parameter_names
from auto_mmround.model.loading import find_folder, load
from auto_mmround.model.structure import Stage, find_stages, select_stages

IMAGE = 260


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    text = dict(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=128,
        vocab_size=300, bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4},
    )  # fmt: skip
    vision = dict(depth=2, embed_dim=64, hidden_size=64, num_heads=2, mlp_ratio=2)
    config = Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE)
    return Qwen2VLForConditionalGeneration(config).eval().requires_grad_(False)


def text_input(length):
    return {
        "input_ids": torch.randint(0, 250, (1, length)),
        "attention_mask": torch.ones(1, length, dtype=torch.long),
    }


def image_input(images=1):
    ids = torch.tensor([[1, *([2] + [IMAGE] * 4) * images, 5]])
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.randn(16 * images, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * images),
    }


def test_stages_are_found_by_structure(model):
    stages = find_stages(model)
    assert stages == [
        Stage("vision", "model.visual.blocks", 2),
        Stage("text", "model.language_model.layers", 3),
    ]
    assert [s.name for s in select_stages(stages, False, None)] == ["text"]
    assert [s.name for s in select_stages(stages, True, None)] == ["vision", "text"]
    assert [s.name for s in select_stages(stages, False, "visual")] == ["vision"]
    with pytest.raises(UserError, match=r"model\.visual\.blocks"):
        select_stages(stages, False, "audio")


def test_encoder_and_decoder_are_two_stages():
    config = WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=100, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )  # fmt: skip
    stages = find_stages(WhisperForConditionalGeneration(config))
    assert [(s.path, s.depth) for s in stages] == [
        ("model.encoder.layers", 2),
        ("model.decoder.layers", 3),
    ]
    assert stages[1].name == "text"


def test_replay_reproduces_the_model_for_every_length_and_modality(model):
    inputs = [text_input(5), image_input(), text_input(9), text_input(5), image_input(2)]
    chains = capture(model, find_stages(model), inputs)
    vision, text = chains["model.visual.blocks"], chains["model.language_model.layers"]
    assert list(chains) == ["model.visual.blocks", "model.language_model.layers"]
    assert vision.sample == [1, 4] and text.sample == [0, 1, 2, 3, 4] and text.batched
    blocks = list(model.model.language_model.layers)
    chain = text
    for first, block in enumerate(blocks):
        chain = chain.advanced([block], first, batch_size=8)
    for sample, hidden in zip(inputs, chain.hidden):
        logits = model.lm_head(model.model.language_model.norm(hidden))
        assert difference(logits, model(**sample).logits) < 1e-5


def test_equal_shapes_run_together_and_give_the_same(model):
    inputs = [text_input(6) for _ in range(4)]
    chain = capture(model, find_stages(model), inputs)["model.language_model.layers"]
    block = [model.model.language_model.layers[0]]
    together = list(chain.forward(block, 0, range(4)))
    assert len(together) == 1 and together[0][1].shape == (4, 6, 64)
    chain.batched = False
    alone = torch.cat([out for _, out in chain.forward(block, 0, range(4))])
    torch.testing.assert_close(together[0][1], alone)
    part = chain.advanced(block, 0, 8, only=[1, 3]).hidden
    assert [hidden.numel() for hidden in part] == [0, 6 * 64, 0, 6 * 64]
    torch.testing.assert_close(torch.cat([part[1], part[3]]), alone[[1, 3]])


class Glued(nn.Module):
    """Three layers, and something between them."""

    def __init__(self, glue):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.glue = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), glue

    def forward(self, x, use_cache=False):
        for i, layer in enumerate(self.layers):
            x = layer(x if i == 0 else self.glue(x))
        return x


STAGE = [Stage("text", "layers", 3)]


def add_in_place(x):
    x += torch.arange(4)[:, None] // 2  # two of four tokens change, as deep-stacked features do
    return x


@pytest.mark.parametrize(
    "glue, live",
    [
        (lambda x: x, False),
        (add_in_place, False),
        (lambda x: x * x.mean(), True),
        (lambda x: x[:, ::2], True),
    ],
)
def test_glue_between_blocks_is_replayed(glue, live):
    model = Glued(glue)
    inputs = [{"x": torch.randn(1, 4, 8)}, {"x": torch.randn(1, 4, 8)}]
    chain = capture(model, STAGE, inputs)["layers"]
    assert chain.live is live
    with torch.no_grad():
        for (i,), output in chain.forward(list(model.layers), 0, [0]):
            torch.testing.assert_close(output, model(**inputs[i]))
        # as quantizing does: the next inputs are not the captured ones
        model.layers[0].weight.mul_(1.5)
        after = chain.advanced([model.layers[0]], 0, 2)
        if live:
            after = recapture(model, after, 1, inputs)
        for (i,), output in after.forward(list(model.layers)[1:2], 1, [1]):
            torch.testing.assert_close(
                output, model.layers[1](glue(model.layers[0](inputs[i]["x"])))
            )


def test_inputs_are_cast_however_nested():
    """CogVLM2 takes its images as lists of lists."""
    given = {"images": [[torch.ones(2)], []], "input_ids": torch.ones(1, 2, dtype=torch.long)}
    made = as_dtype(given, torch.bfloat16)
    assert made["images"][0][0].dtype == torch.bfloat16 and made["input_ids"].dtype == torch.long
    assert given["images"][0][0].dtype == torch.float32 and made["images"][1] == []


def test_glue_of_several_samples_at_once():
    inputs = [{"x": torch.randn(1, 4, 8)} for _ in range(3)]
    model = Glued(lambda x: torch.cat([x[:, :1], x[:, 1:] + 1], 1))
    chain = capture(model, STAGE, inputs)["layers"]
    assert chain.batched and not chain.live
    (group, together), *others = chain.forward(list(model.layers), 0, range(3))
    chain.batched = False
    alone = torch.cat([output for _, output in chain.forward(list(model.layers), 0, range(3))])
    assert group == [0, 1, 2] and not others
    torch.testing.assert_close(together, alone)


def test_blocks_that_use_what_they_are_not_given_are_refused():
    noise = iter(torch.randn(20, 8))
    model = Glued(lambda x: x)
    model.layers[1].register_forward_hook(lambda layer, args, output: output + next(noise))
    with pytest.raises(UserError, match="misses the model's own output"):
        capture(model, STAGE, [{"x": torch.randn(1, 4, 8)}])


def test_a_stage_that_runs_twice_gives_two_entries():
    class TwoImages(Glued):
        def forward(self, x, use_cache=False):
            return super().forward(x) + super().forward(-x)

    chain = capture(TwoImages(lambda x: x), STAGE, [{"x": torch.randn(1, 4, 8)}])["layers"]
    assert chain.sample == [0, 0] and torch.equal(chain.hidden[0], -chain.hidden[1])


def test_samples_with_several_images_stay_alone():
    model = Glued(lambda x: x)
    inputs = [{"x": torch.randn(n, 4, 8)} for n in (1, 1, 2, 2)]
    chain = capture(model, STAGE, inputs)["layers"]
    assert chain.batched
    after = chain.advanced(list(model.layers), 0, 4)
    for sample, hidden in zip(inputs, after.hidden, strict=True):
        torch.testing.assert_close(hidden, model(**sample))


def test_a_sample_that_skips_a_block_is_named():
    class Sometimes(Glued):
        def forward(self, x, use_cache=False):
            return self.layers[2](self.layers[0](x))

    with pytest.raises(UserError, match="sample 0 does not run block 1"):
        capture(Sometimes(lambda x: x), STAGE, [{"x": torch.randn(1, 4, 8)}])


def test_blocks_out_of_order_are_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x, use_cache=False):
            return self.layers[1](self.layers[0](self.layers[0](x)))

    with pytest.raises(UserError, match="once and in order"):
        capture(Twice(), [Stage("text", "layers", 2)], [{"x": torch.randn(1, 4, 8)}])


def test_checkpoint_names(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = load_names(tmp_path)
    names = parameter_names(model, loaded)
    assert set(names) == set(model.state_dict()) and set(names.values()) == loaded
    assert (
        names["model.language_model.layers.0.mlp.up_proj.weight"]
        == "model.layers.0.mlp.up_proj.weight"
    )


def load_names(folder):
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_unusable_folders(tmp_path, model):
    with pytest.raises(UserError, match="no such folder"):
        find_folder(str(tmp_path / "missing"))
    with pytest.raises(UserError, match=r"no config\.json"):
        find_folder(str(tmp_path))
    model.config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="safetensors"):
        find_folder(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{broken}")
    with pytest.raises(UserError, match="can't be loaded"):
        load(str(tmp_path))
    with pytest.raises(UserError, match="model_dtype"):
        load(str(tmp_path), dtype="int3")


def test_missing_weights_are_named(tmp_path, model):
    from safetensors.torch import load_file, save_file

    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj"):
        load(str(tmp_path))


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "99", "hpu", "cuda:x", ""])
def test_devices_that_are_not_there(name):
    with pytest.raises(UserError):
        resolve(name)


def test_default_device_works_everywhere():
    assert resolve("0").type in ("cpu", "cuda", "hpu") and resolve("cpu").type == "cpu"


def test_autocast_sees_weights_that_change_in_place(monkeypatch):
    monkeypatch.setattr(devices, "fast_bf16", lambda device: True)
    layer, x = nn.Linear(4, 4, bias=False), torch.randn(1, 4)
    with autocast(torch.device("cpu"), torch.float32, amp=True):
        first = layer(x)
        assert first.dtype == torch.bfloat16
        layer.weight.data.mul_(2)
        assert torch.equal(layer(x), 2 * first)
