"""Tiny random models of real families, and inputs for them: what `tests/test_families.py` takes
through the journey.

Each entry builds a configuration of the family's own class in Transformers: two blocks a stage, 64
channels, 128 words. Inputs are made directly, as the family's processor would hand them over.
Families whose code comes with the checkpoint have a stand-in under `standins/`, and go from rows
with images through our own calibration.
"""

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

IMAGE, VIDEO, AUDIO = 120, 121, 122
WORDS = 110
TEXT = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    vocab_size=128,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=32)
VISION = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=16,
    patch_size=4,
)
QWEN_VISION = dict(
    depth=2, hidden_size=64, intermediate_size=96, num_heads=2, patch_size=4, out_hidden_size=64
)
SPEECH = dict(
    d_model=64,
    encoder_layers=2,
    encoder_attention_heads=2,
    encoder_ffn_dim=96,
    num_mel_bins=8,
    max_source_positions=16,
)
PLACEHOLDERS = dict(image_token_id=IMAGE, video_token_id=VIDEO)
GRID = dict(image_grid_thw=torch.tensor([[1, 4, 4]]))

Inputs = dict[str, Tensor]


def ids(*placeholders: int, before: int = 3, after: int = 9, seed: int = 0) -> Inputs:
    """Random words around the placeholders, all attended to."""
    draw = torch.Generator().manual_seed(seed)
    words = torch.randint(3, WORDS, (before + after,), generator=draw).tolist()
    row = torch.tensor([[*words[:before], *placeholders, *words[before:]]])
    return {"input_ids": row, "attention_mask": torch.ones_like(row)}


def pixels(*shape: int, seed: int = 0) -> Tensor:
    """Features of the given shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the words w0, w1, ..."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="w1", eos_token="w2", pad_token="w0"
    )


def tiny_texts(count: int, words: int) -> list[str]:
    """Texts of the tokenizer's words, all different."""
    return [" ".join(f"w{(7 * i + j * j) % 110 + 3}" for j in range(words)) for i in range(count)]


@dataclass(frozen=True)
class Tiny:
    """config: settings of the family's configuration. media: modality -> inputs of the seed's
    sample."""

    model_type: str
    architecture: str
    config: dict[str, Any]
    media: dict[str, Callable[[int], Any]] = field(default_factory=dict)
    stages: tuple[str, ...] = ("text",)
    plain: bool = True  # takes text without media
    standin: str | None = None  # module with its code

    def build(self) -> PreTrainedModel:
        """A random model of the family, the same each time."""
        torch.manual_seed(0)
        if self.standin:
            code = importlib.import_module(self.standin)
            model = getattr(code, self.architecture)(
                getattr(code, self.architecture).config_class(**self.config)
            )
        else:
            # configurations write into dictionaries that families share
            config = AutoConfig.for_model(self.model_type, **copy.deepcopy(self.config))
            model = getattr(transformers, self.architecture)(config)
        # as large as trained weights are, and no norm or gate at its neutral start
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.1)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        return model.eval().requires_grad_(False)

    def save(self, folder: Path, tokenizer: Any) -> None:
        """A checkpoint as people download it."""
        if self.standin:
            code = importlib.import_module(self.standin)
            model = getattr(code, self.architecture)
            model.config_class.register_for_auto_class()
            model.register_for_auto_class("AutoModelForCausalLM")
            if hasattr(code, "Phi3VProcessor"):
                code.Phi3VImageProcessor.register_for_auto_class()
                code.Phi3VProcessor.register_for_auto_class()
                code.Phi3VProcessor(code.Phi3VImageProcessor(), tokenizer).save_pretrained(folder)
        self.build().save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def samples(self, count: int = 2) -> list[Any]:
        """Of each modality ``count`` samples, of different lengths."""
        plain = [ids(after=12 + 3 * seed, seed=seed) for seed in range(count)] if self.plain else []
        return plain + [make(seed) for make in self.media.values() for seed in range(count)]


def sliding_gemma(folder: Path) -> Path:
    """A random Gemma 3 on disk: sliding (8 tokens) and full attention, two rotary bases, a tied
    embedding."""
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        **{**TEXT, "vocab_size": 256, "intermediate_size": 128, "num_hidden_layers": 3},
        sliding_window=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        query_pre_attn_scalar=32,
        initializer_range=0.1,
    )
    config._sliding_window_pattern = 3  # what mlx-lm reads
    transformers.Gemma3ForCausalLM(config).save_pretrained(folder)
    return folder


def media(
    count: int, token: int, features: Callable[[int], Inputs], types: str | None = None
) -> Callable[..., Inputs]:
    """Inputs with ``count`` placeholders and what `features` makes; ``types``: the input that marks
    their places."""

    def make(seed: int) -> Inputs:
        found = ids(*[token] * count, after=6 + 2 * seed, seed=seed) | features(seed)
        if types:
            found[types] = (found["input_ids"] == token).int()
        return found

    return make


def patches(
    width: int, types: str | None = "mm_token_type_ids"
) -> dict[str, Callable[..., Inputs]]:
    """Sixteen flat patches of one image, merged two by two."""
    return {
        "image": media(
            4, IMAGE, lambda seed: {"pixel_values": pixels(16, width, seed=seed), **GRID}, types
        )
    }


def picture(
    count: int, *lead: int, types: str | None = None, **more: Tensor
) -> dict[str, Callable[..., Inputs]]:
    """One image of 16 x 16 with leading dimensions ``lead`` that becomes ``count`` tokens."""
    return {
        "image": media(
            count,
            IMAGE,
            lambda seed: {"pixel_values": pixels(*lead, 3, 16, 16, seed=seed), **more},
            types,
        )
    }


def text_and_vision(vision: dict[str, Any], **text: Any) -> dict[str, Any]:
    return dict(text_config=TEXT | text, vision_config=vision)


def mllama_image(seed: int) -> Inputs:
    found = ids(IMAGE, after=8 + seed, seed=seed)
    length = found["input_ids"].shape[1]
    return found | {
        "pixel_values": pixels(1, 1, 2, 3, 16, 16, seed=seed),
        "aspect_ratio_ids": torch.tensor([[2]]),
        "aspect_ratio_mask": torch.ones(1, 1, 2, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, length, 1, 2, dtype=torch.long),
    }


def whisper_audio(seed: int) -> Inputs:
    return {
        "input_features": pixels(1, 8, 32, seed=seed),
        "decoder_input_ids": torch.tensor(
            [[3, *ids(after=6 + seed, seed=seed)["input_ids"][0].tolist()]]
        ),
    }


def phi4_image(seed: int) -> Inputs:
    return {
        "image_pixel_values": pixels(1, 2, 3, 16, 16, seed=seed),
        "image_sizes": torch.tensor([[16, 16]]),
        "image_attention_mask": torch.ones(1, 2, 4, 4, dtype=torch.bool),
    }


def phi4_audio(seed: int) -> Inputs:
    return {
        "audio_input_features": pixels(1, 32, 8, seed=seed),
        "audio_embed_sizes": torch.tensor([4]),
    }


def conversation(seed: int) -> dict[str, Any]:
    """A row with a picture, as in a file of LLaVA's form."""
    turns = [
        ("human", f"<image>\nw{5 + seed} w9 w10"),
        ("gpt", " ".join(f"w{20 + i}" for i in range(12 + seed))),
    ]
    return {
        "image": Image.new("RGB", (20, 20), (40 * seed, 90, 200)),
        "conversations": [{"from": who, "value": text} for who, text in turns],
    }


MROPE = dict(
    rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
)
GEMMA = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
SHARED = dict(  # the last two layers read the keys and values of the first two
    num_hidden_layers=4, num_kv_shared_layers=2, sliding_window=8, vocab_size_per_layer_input=128,
    layer_types=["sliding_attention", "full_attention"] * 2, hidden_size_per_layer_input=32,
)  # fmt: skip
DEEPSTACK = QWEN_VISION | dict(deepstack_visual_indexes=[0], num_position_embeddings=16)
WINDOWS = QWEN_VISION | dict(window_size=16, fullatt_block_indexes=[1])
CLIP, SIGLIP = (
    VISION | dict(model_type="clip_vision_model"),
    VISION | dict(model_type="siglip_vision_model"),
)
MARKS = dict(boi_token_index=118, eoi_token_index=119)
TILES = dict(image_grid_pinpoints=[[16, 32], [32, 16]])
BOTH, HEARD = ("vision", "text"), ("audio", "text")


def sound(count: int, *shape: int, **more: Tensor) -> dict[str, Callable[..., Inputs]]:
    """Sound features of the given shape that become ``count`` tokens."""
    return {
        "audio": media(
            count, AUDIO, lambda seed: {"input_features": pixels(*shape, seed=seed), **more}
        )
    }


OMNI_IDS = dict(audio_start_token_id=114, position_id_per_seconds=25)
THINKER = dict(
    audio_token_index=AUDIO,
    image_token_index=IMAGE,
    video_token_index=VIDEO,
    vision_start_token_id=119,
    audio_config=SPEECH | dict(output_dim=64, n_window=8),
    text_config=TEXT | MROPE,
    vision_config=WINDOWS,
)
TALKER = dict(
    {key: TEXT[key] for key in TEXT if not key.endswith("token_id")},
    embedding_size=64,
    audio_token_index=AUDIO,
    image_token_index=IMAGE,
    video_token_index=VIDEO,
    vision_start_token_id=119,
    **MROPE,
)
TOKEN2WAV = dict(
    dit_config=dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=16,
        emb_dim=16,
        num_embeds=32,
        mel_dim=8,
        enc_emb_dim=8,
        enc_dim=8,
        enc_channels=[16, 16, 16, 16, 32],
        enc_attention_channels=8,
        enc_se_channels=8,
        look_ahead_layers=[0],
        look_backward_layers=[0],
    ),
    bigvgan_config=dict(
        mel_dim=8,
        upsample_initial_channel=16,
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3, 5]],
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
    ),
)
MROPE3 = dict(
    rope_parameters={
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    }
)
MIXTURE = {key: TEXT[key] for key in TEXT if key != "head_dim"} | EXPERTS | dict(num_experts=4)
THINKER3 = dict(
    audio_token_id=AUDIO,
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    vision_start_token_id=119,
    **OMNI_IDS,
    audio_config=SPEECH
    | dict(output_dim=64, n_window=50, n_window_infer=100, downsample_hidden_size=8),
    text_config=MIXTURE | MROPE3,
    vision_config=DEEPSTACK,
)
TALKER3 = dict(
    thinker_hidden_size=64,
    accept_hidden_layer=1,
    spatial_merge_size=2,
    num_code_groups=2,
    text_config=MIXTURE | MROPE3 | dict(shared_expert_intermediate_size=32),
    code_predictor_config={key: TEXT[key] for key in TEXT if not key.endswith("token_id")}
    | dict(num_code_groups=2),
    speaker_id={"ethan": 5},
)
CODE2WAV = dict(
    codebook_size=16,
    hidden_size=32,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=32,
    num_hidden_layers=2,
    num_quantizers=2,
    upsample_rates=[2, 2],
    upsampling_ratios=[2],
    decoder_dim=32,
)


MROPE_GLM = dict(
    rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
)
GLM_MARKS = dict(
    image_start_token_id=116,
    image_end_token_id=117,
    video_start_token_id=118,
    video_end_token_id=119,
)
LINEAR_ATTENTION = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=2,
    linear_key_head_dim=32,
    linear_value_head_dim=32,
    layer_types=["linear_attention", "full_attention"],
)


def omni_sound(frames: int) -> dict[str, Callable[..., Inputs]]:
    """Sound of 32 frames that becomes ``frames`` tokens."""
    return sound(frames, 1, 8, 32, feature_attention_mask=torch.ones(1, 32, dtype=torch.long))


def gemma4_image(seed: int) -> Inputs:
    return {
        "pixel_values": torch.rand(1, 16, 48, generator=torch.Generator().manual_seed(seed)),
        "image_position_ids": torch.cartesian_prod(torch.arange(4), torch.arange(4))[None].flip(-1),
    }


def lfm2_image(seed: int) -> Inputs:
    return {
        "pixel_values": pixels(1, 16, 48, seed=seed),
        "spatial_shapes": torch.tensor([[4, 4]]),
        "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
    }


# fmt: off
FAMILIES: dict[str, Tiny] = {family.model_type: family for family in (
    Tiny("llama", "LlamaForCausalLM", TEXT),
    Tiny("qwen2", "Qwen2ForCausalLM", TEXT),
    Tiny("qwen3", "Qwen3ForCausalLM", TEXT),
    Tiny("phi3", "Phi3ForCausalLM", TEXT),
    Tiny("gemma3_text", "Gemma3ForCausalLM", TEXT | GEMMA),
    Tiny("gpt2", "GPT2LMHeadModel", dict(
        n_embd=64, n_layer=2, n_head=2, vocab_size=128, n_positions=256, bos_token_id=1,
        eos_token_id=2)),
    Tiny("qwen3_moe", "Qwen3MoeForCausalLM", TEXT | EXPERTS | dict(num_experts=4)),
    Tiny("gemma3n_text", "Gemma3nForCausalLM", TEXT | SHARED | dict(
        laurel_rank=32, activation_sparsity_pattern=[0.5, 0.5, 0.0, 0.0], altup_num_inputs=2)),
    Tiny("qwen2_vl", "Qwen2VLForConditionalGeneration", PLACEHOLDERS | dict(
        text_config=TEXT | MROPE,
        vision_config=dict(depth=2, embed_dim=64, hidden_size=64, num_heads=2, mlp_ratio=2,
            patch_size=4),
    ), patches(96), BOTH),
    Tiny("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration",
         PLACEHOLDERS | text_and_vision(WINDOWS, **MROPE), patches(96), BOTH),
    Tiny("qwen3_vl", "Qwen3VLForConditionalGeneration",
         PLACEHOLDERS | text_and_vision(DEEPSTACK, **MROPE), patches(96), BOTH),
    Tiny("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration",
         PLACEHOLDERS | text_and_vision(DEEPSTACK, **MROPE, **EXPERTS, num_experts=4), patches(96),
         BOTH),
    Tiny("mllama", "MllamaForConditionalGeneration", dict(
        image_token_index=IMAGE,
        text_config=TEXT | dict(num_hidden_layers=3, cross_attention_layers=[1]),
        vision_config=dict(
            hidden_size=64, num_hidden_layers=2, num_global_layers=2, attention_heads=2,
            intermediate_size=96,
            vision_output_dim=128, image_size=16, patch_size=4, max_num_tiles=2,
            intermediate_layers_indices=[1],
            supported_aspect_ratios=[[1, 1], [1, 2]],
        ),
    ), dict(image=mllama_image), ("vision", "vision", "text"), plain=False),
    Tiny("llava", "LlavaForConditionalGeneration",
         text_and_vision(CLIP, model_type="llama") | dict(image_token_index=IMAGE), picture(16, 1),
         BOTH),
    Tiny("llava_next", "LlavaNextForConditionalGeneration",
         text_and_vision(CLIP, model_type="llama") | dict(image_token_index=IMAGE) | TILES,
         picture(16 + 36, 1, 3, image_sizes=torch.tensor([[16, 32]])), BOTH),
    Tiny("llava_onevision", "LlavaOnevisionForConditionalGeneration",
         text_and_vision(SIGLIP, model_type="qwen2") | dict(image_token_index=IMAGE,
             video_token_index=VIDEO) | TILES,
         picture(16 + 36, 1, 3, image_sizes=torch.tensor([[16, 32]])), BOTH),
    Tiny("gemma3", "Gemma3ForConditionalGeneration",
         text_and_vision(VISION, **GEMMA) | MARKS | dict(image_token_index=IMAGE,
             mm_tokens_per_image=4),
         picture(4, 1, types="token_type_ids"), BOTH),
    Tiny("gemma4", "Gemma4ForConditionalGeneration", PLACEHOLDERS | dict(
        audio_token_id=AUDIO, boi_token_id=118, eoi_token_id=119, boa_token_id=117,
        eoa_token_index=116,
        text_config=TEXT | SHARED | dict(per_layer_config={}),
        vision_config=dict(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32, patch_size=4, pooling_kernel_size=2, position_embedding_size=16,
        ),
    ), dict(image=media(4, IMAGE, gemma4_image, "mm_token_type_ids")), BOTH),
    Tiny("smolvlm", "SmolVLMForConditionalGeneration",
         text_and_vision(VISION, model_type="llama") | dict(image_token_id=IMAGE), picture(4, 1, 1),
         BOTH),
    Tiny("idefics3", "Idefics3ForConditionalGeneration",
         text_and_vision(VISION, model_type="llama") | dict(image_token_id=IMAGE), picture(4, 1, 1),
         BOTH),
    Tiny("mistral3", "Mistral3ForConditionalGeneration",
         text_and_vision(VISION | dict(model_type="pixtral", head_dim=32), model_type="mistral")
         | dict(image_token_index=IMAGE), picture(4, 1, image_sizes=torch.tensor([[16, 16]])),
         BOTH),
    Tiny("internvl", "InternVLForConditionalGeneration",
         text_and_vision(VISION | dict(image_size=[16, 16], patch_size=[4, 4]), model_type="qwen2")
         | dict(image_token_id=IMAGE, image_seq_length=4), picture(4, 1), BOTH),
    Tiny("glm4v", "Glm4vForConditionalGeneration", PLACEHOLDERS | dict(
        image_start_token_id=116, image_end_token_id=117, video_start_token_id=118,
        video_end_token_id=119,
    ) | text_and_vision(QWEN_VISION | dict(image_size=16), **MROPE), patches(96), BOTH),
    Tiny("llama4", "Llama4ForConditionalGeneration", MARKS | dict(
        image_token_index=IMAGE,
        text_config=TEXT | dict(
            num_local_experts=4, num_experts_per_tok=1, intermediate_size=32,
            intermediate_size_mlp=96,
            interleave_moe_layer_step=2, attention_chunk_size=64,
        ),
        vision_config=VISION | dict(
            vision_output_dim=64, projector_input_dim=64, projector_output_dim=64,
            intermediate_size=256),
    ), picture(4, 1), BOTH),
    Tiny("lfm2_vl", "Lfm2VlForConditionalGeneration", text_and_vision(
        {key: VISION[key] for key in VISION if key != "image_size"} | dict(num_patches=16),
        layer_types=["conv", "full_attention"], block_multiple_of=32,
    ) | dict(image_token_id=IMAGE, projector_hidden_size=64), dict(image=media(4, IMAGE,
        lfm2_image)), BOTH),
    Tiny("deepseek_vl", "DeepseekVLForConditionalGeneration",
         text_and_vision(SIGLIP, model_type="llama") | dict(image_token_id=IMAGE), picture(16, 1),
         BOTH),
    Tiny("kimi_k25", "Kimi_K25ForConditionalGeneration", PLACEHOLDERS | dict(
        vision_start_token_id=118, vision_end_token_id=119, projection_hidden_size=64,
        text_config=TEXT | EXPERTS | dict(
            num_key_value_heads=2, n_routed_experts=4, n_group=1, topk_group=1,
            first_k_dense_replace=1, head_dim=16,
            kv_lora_rank=32, q_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16,
            v_head_dim=32,
        ),
        vision_config=dict(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
            patch_size=4,
            pos_emb_height=4, pos_emb_width=4,
        ),
    ), dict(image=media(4, IMAGE, lambda seed: {"pixel_values": pixels(16, 3, 4, 4, seed=seed),
        **GRID})), BOTH),
    Tiny("phi3_v", "Phi3VForCausalLM", {}, dict(image=conversation), BOTH,
        standin="standins.phi3_v"),
    Tiny("cogvlm2", "CogVLMForCausalLM", {}, dict(image=conversation), BOTH,
        standin="standins.cogvlm2"),
    Tiny("whisper", "WhisperForConditionalGeneration", SPEECH | dict(
        decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=96, vocab_size=128,
        pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, max_target_positions=64,
    ), dict(audio=whisper_audio), ("encoder", "text"), plain=False),
    Tiny("qwen2_audio", "Qwen2AudioForConditionalGeneration",
         dict(audio_config=SPEECH, text_config=TEXT | dict(model_type="qwen2"),
             audio_token_index=AUDIO),
         sound(8, 1, 8, 32, feature_attention_mask=torch.ones(1, 32, dtype=torch.long)), HEARD),
    Tiny("voxtral", "VoxtralForConditionalGeneration", dict(
        audio_config=dict(
            hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
            num_mel_bins=8,
            max_source_positions=16,
        ),
        text_config=TEXT | dict(model_type="llama"), audio_token_id=AUDIO, hidden_size=64,
    ), sound(4, 1, 8, 32), HEARD),
    Tiny("granite_speech", "GraniteSpeechForConditionalGeneration", dict(
        audio_token_index=AUDIO, has_lora_adapter=False, downsample_rate=2, window_size=4,
        text_config=TEXT | dict(model_type="granite"),
        encoder_config=dict(
            input_dim=16, num_layers=2, hidden_dim=64, num_heads=2, dim_head=32, output_dim=32,
            context_size=8,
            max_pos_emb=16, conv_kernel_size=3,
        ),
        projector_config=dict(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96,
            encoder_hidden_size=64, cross_attention_frequency=1,
        ),
    ), sound(4, 1, 8, 16, input_features_mask=torch.ones(1, 4, dtype=torch.bool)), ("audio",
    "nontext", "text")),
    Tiny("qwen2_5_omni_thinker", "Qwen2_5OmniThinkerForConditionalGeneration", THINKER,
         patches(96, None) | omni_sound(8), ("audio", "vision", "text")),
    Tiny("qwen2_5_omni", "Qwen2_5OmniForConditionalGeneration",
         dict(thinker_config=THINKER, talker_config=TALKER, token2wav_config=TOKEN2WAV),
         patches(96, None) | omni_sound(8), ("audio", "vision", "text")),
    Tiny("qwen3_omni_moe_thinker", "Qwen3OmniMoeThinkerForConditionalGeneration", THINKER3,
         patches(96, None) | omni_sound(4), ("audio", "vision", "text")),
    Tiny("qwen3_omni_moe", "Qwen3OmniMoeForConditionalGeneration",
         dict(thinker_config=THINKER3, talker_config=TALKER3, code2wav_config=CODE2WAV),
         patches(96, None) | omni_sound(4), ("audio", "vision", "text")),
    Tiny("qwen3_5", "Qwen3_5ForConditionalGeneration", PLACEHOLDERS | text_and_vision(
        QWEN_VISION | dict(num_position_embeddings=16), **MROPE, **LINEAR_ATTENTION),
        patches(96), BOTH),
    Tiny("qwen3_next", "Qwen3NextForCausalLM", TEXT | EXPERTS | LINEAR_ATTENTION | dict(
        num_experts=4, shared_expert_intermediate_size=32)),
    Tiny("qwen3_asr", "Qwen3ASRForConditionalGeneration", dict(
        audio_token_id=AUDIO, pad_token_id=0, eos_token_id=2,
        audio_config=SPEECH | dict(output_dim=64, n_window=50, n_window_infer=100,
            downsample_hidden_size=8),
        text_config=TEXT | dict(model_type="qwen3"),
    ), sound(13, 1, 8, 100, input_features_mask=torch.ones(1, 100, dtype=torch.long)), HEARD),
    Tiny("glm4v_moe", "Glm4vMoeForConditionalGeneration", PLACEHOLDERS | GLM_MARKS
         | text_and_vision(QWEN_VISION | dict(image_size=16), **MROPE_GLM, **EXPERTS,
             n_routed_experts=4), patches(96), BOTH),
    Tiny("glm46v", "Glm46VForConditionalGeneration", PLACEHOLDERS | GLM_MARKS | text_and_vision(
        QWEN_VISION | dict(image_size=16), **MROPE), patches(96), BOTH),
    Tiny("ministral3", "Ministral3ForCausalLM", TEXT),
    Tiny("paddleocr_vl", "PaddleOCRVLForConditionalGeneration", PLACEHOLDERS | text_and_vision(
        VISION, **MROPE), dict(image=media(4, IMAGE, lambda seed: {
            "pixel_values": pixels(16, 3, 4, 4, seed=seed), **GRID}, "mm_token_type_ids")), BOTH),
    Tiny("phi4_multimodal", "Phi4MultimodalForCausalLM", TEXT | dict(
        vision_config=VISION | dict(crop_size=16, image_token_id=IMAGE),
        audio_config=dict(
            hidden_size=64, intermediate_size=96, num_blocks=2, num_attention_heads=2, input_size=8,
            ext_pw_out_channel=64, depthwise_separable_out_channel=64, nemo_conv_channels=64,
            nemo_final_size=1,
            audio_token_id=AUDIO,
        ),
    ), dict(image=media(13, IMAGE, phi4_image), audio=media(4, AUDIO, phi4_audio)), ("vision",
    "audio", "text")),
)}
