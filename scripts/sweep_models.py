"""Every class of Transformers as a tiny random model, with inputs made from what its forward takes.

A configuration is made small by the names of its fields; what resists has a row in `ROWS`. Inputs
are found by trying: shapes of pictures and sounds, until the model answers and its answer depends
on them.
"""

import dataclasses
import inspect
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny_models import FAMILIES  # noqa: E402

MULTIMODAL = ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SPEECH_SEQ_2_SEQ", "CTC", "RNNT", "TDT")
TEXTS = ("SEQ_TO_SEQ_CAUSAL_LM", "CAUSAL_LM")
WORDS, IMAGE, VIDEO, AUDIO = 100, 120, 121, 122
TOKENS = {"image": IMAGE, "video": VIDEO, "audio": AUDIO}
MOST = 4_000_000  # parameters of what may still be called tiny

# Small values by the names of fields, of those that hold a number.
SIZES: dict[int, str] = {
    64: """hidden_size d_model n_embd embed_dim embedding_dim dim hidden_dim width projection_dim
        projector_hidden_size projection_hidden_size out_hidden_size output_dim encoder_hidden_size
        vision_output_dim projector_input_dim projector_output_dim decoder_hidden_size
        cross_attention_hidden_size word_embed_proj_dim emb_dim embedding_size proj_dim attn_dim
        text_hidden_size audio_hidden_size vision_hidden_size llm_hidden_size output_hidden_size
        state_size_out lru_width attention_hidden_size n_embed conv_hidden_size fc_hidden_size
        linear_hidden_size q_lora_rank_out hidden_size_per_layer_input_out projection_dimension
        audio_projector_hidden_size alignment_intermediate_size encoder_dim output_proj_dims
        ext_pw_out_channel depthwise_separable_out_channel nemo_conv_channels conv_channels
        shared_input_size backbone_hidden_size cross_hidden_size downsample_hidden_size
        input_embedding_size output_embedding_size lang_embed_dim unit_embed_dim spkr_embed_dim
        patch_embed_hidden_size moe_hidden_size ple_embed_dim projection_hidden_dim classifier_proj_size
        router_hidden_size hidden_size_global image_text_hidden_size codebook_dim enc_dim conv_dim
        subsampling_conv_channels num_pos_feats_out vector_quantization_hidden_dimension text_dim
        upsample_initial_channel speaker_embedding_dim thinker_hidden_size share_dim
        pronunciation_embed_dim shape_embed_dim speech_decoder_prenet_units decoder_dim d_embeds
        speech_decoder_postnet_units encoder_projection_dim decoder_embed_dim encoder_embed_dim d_embed adapter_hidden_size""",
    96: """intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner ffn_hidden_size
        mlp_dim d_inner dim_feedforward intermediate_size_mlp encoder_intermediate_size
        decoder_intermediate_size speech_encoder_intermediate_size adapter_intermediate_size
        shared_intermediate_size block_auto_adjust_ff_dim dense_intermediate_size
        projector_intermediate_size inner_dim ffn_hidden_dim share_expert_dim dff dim_ff
        feed_forward_size t2u_encoder_ffn_dim t2u_decoder_ffn_dim projection_intermediate_size
        prompt_intermediate_size centroid_intermediate""",
    2: """num_hidden_layers num_layers n_layer n_layers depth encoder_layers decoder_layers
        num_decoder_layers num_encoder_layers conf_num_hidden_layers num_blocks num_heads n_head
        num_attention_heads encoder_attention_heads decoder_attention_heads attention_heads n_heads
        num_key_value_heads num_kv_heads encoder_num_key_value_heads conf_num_attention_heads
        decoder_num_key_value_heads encoder_num_attention_heads decoder_num_attention_heads
        encoder_num_hidden_layers decoder_num_hidden_layers num_global_layers heads
        speech_encoder_layers t2u_encoder_layers t2u_decoder_layers speech_encoder_attention_heads
        num_experts_per_tok moe_topk moe_k num_experts_per_token top_k_experts moe_top_k
        t2u_encoder_attention_heads t2u_decoder_attention_heads adapter_layers vision_depth
        num_adapter_layers resampler_depth resampler_n_heads hidden_act_layers num_kv_heads_total
        num_mem_blocks num_hidden_groups cross_num_key_value_heads num_query_heads_per_group
        n_kv_heads num_attention_groups attention_num_heads attention_num_kv_heads
        decoder_num_heads linear_num_key_heads depth_decoder_layers num_codebooks
        num_prediction_layers num_query_heads sa_num_heads num_encoder_attention_heads num_decoder_attention_heads
        layers cross_num_attention_heads swa_num_attention_heads swa_num_key_value_heads kv_n_heads
        num_sliding_attention_heads resampler_n_latents_out num_quantizers num_code_groups attn_layers
        num_layers_per_stack index_n_heads linear_num_heads num_conv_pos_embedding_groups
        vocoder_num_langs vocoder_num_spkrs num_groups_out max_symbols_per_step""",
    4: """num_experts num_local_experts n_routed_experts moe_num_experts num_moe_experts patch_size
        patch_size_out linear_num_value_heads mamba_n_heads mamba_num_heads n_experts
        num_queries query_length num_query_tokens
        latent_query_num resampler_n_latents resampler_num_latents pos_emb_height pos_emb_width
        mm_tokens_per_image num_centroids num_negatives prompt_length num_global_tokens
        num_codevectors_per_group window_size index_topk_blocks posemb_grid_size""",
    1: """n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts
        first_k_dense_replace mamba_n_groups n_groups num_zero_experts_out
        pad_token_id_out num_dense_layers moe_layer_start_index_out zero_expert_num""",
    16: """image_size mamba_d_state ssm_state_size state_size qk_rope_head_dim qk_nope_head_dim
        linear_key_head_dim linear_value_head_dim chunk_size mamba_chunk_size max_source_positions
        num_position_embeddings position_embedding_size crop_size index_head_dim
        time_step_rank_out index_topk adapter_rank max_pos_emb codebook_size
        latent_size n_window max_action_dim max_state_dim feature_projection_input_dim
        d_rel index_block_size num_embeddings frequency_embedding_size dim_head_out
        conv_pos_kernel_size num_conv_pos_embeddings hc_lowrank base_channels output_channels
        num_image_tokens context_size prompt_mid_dim""",
    32: """head_dim moe_intermediate_size mamba_d_head mamba_head_dim q_lora_rank kv_lora_rank
        v_head_dim attention_head_dim d_kv moe_shared_expert_intermediate_size
        shared_expert_intermediate_size hidden_size_per_layer_input kv_channels d_head
        global_head_dim key_length_out expert_ffn_hidden_size swa_head_dim time_mix_extra_dim
        laurel_rank o_lora_rank attention_head_size
        cross_head_dim dim_head linear_head_dim qk_head_dim resampler_dim_head resampler_head_dim
        query_pre_attn_scalar mamba_dt_rank time_step_rank codevector_dim proj_codevector_dim
        num_filters time_mix_dim rotary_dim""",
    8: """num_mel_bins sliding_window attention_window num_mels input_feat_per_channel n_mels
        feature_size attention_window_size local_attention_window input_size input_feat_size n_mel_bins mel_dim mel_bins sliding_window_size""",
    128: """vocab_size vocab_size_per_layer_input text_vocab_size decoder_vocab_size
        src_vocab_size tgt_vocab_size mamba_d_ssm dim_att_out t2u_vocab_size unit_vocab_size char_vocab_size
        audio_vocab_size codebook_vocab_size mel_vocab_size shape_vocab_size unit_hifi_gan_vocab_size
        composer_vocab_size pronunciation_vocab_size ngram_vocab_size_base unpadded_vocab_size
        encoder_hash_byte_group_vocab max_num_patches seq_len
        additional_vocab_size_out""",
    256: """max_position_embeddings n_positions max_target_positions max_seq_len n_ctx
        max_sequence_length seq_length max_text_len max_speech_positions max_text_positions context_length
        max_decoder_position_embeddings max_encoder_position_embeddings mask_length
        max_2d_position_embeddings t2u_max_position_embeddings original_max_position_embeddings""",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
MARKS = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 3, "unk": 3, **TOKENS}
PARTS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6],
         "partial_rotary_factor": 1.0}  # fmt: skip
NEEDED = {"head_dim": 32, "num_key_value_heads": 2, "num_local_experts": 4}  # even where None
KINDS = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types", "layers_types")
# Model type -> fields, where small numbers alone give no model; "text_config.head_dim" is deeper.
ROWS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
              "expert_layer_offset": 1},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0]},
    "mamba2": {"num_heads": 4, "head_dim": 32},
    "zaya": {"num_experts_per_tok": 1},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "lsh"], "axial_pos_shape": [4, 8],
        "axial_pos_embds_dim": [16, 48], "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4,
        "num_buckets": 2},
    "codegen": {"rotary_dim": 16, "n_head": 4},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "emu3_vqgan": {"base_channels": 32},
    "deepseek_v2": {"mlp_layer_types": ["dense", "sparse"]},
    "mimo_v2_flash": {"num_key_value_heads": 1},
    "wav2vec2-bert": {"vocab_size": 128}, "wav2vec2-conformer": {"vocab_size": 128},
    "molmo2": {"adapter_config.vision_feature_layers": [-1, -2]},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 16},
    "emu3": {"vq_config.base_channels": 32}, "janus": {"vq_config.base_channels": 32},
    "chameleon": {"vocabulary_map": {"<image>": 120}, "vq_config.base_channels": 32},
    "glm46v": {"text_config.rope_parameters": PARTS},
    "glm4v_moe": {"text_config.rope_parameters": PARTS},
    "glm_ocr": {"text_config.rope_parameters": PARTS},
    "qwen3_omni_moe_thinker": {"text_config.rope_parameters": PARTS},
    "glm5_next": {"text_config.qk_rope_head_dim": 0},
    "dots1": {"num_local_experts": 4}, "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "blip-2": {"image_token_index": IMAGE}, "instructblip": {"image_token_index": IMAGE},
    "nemotron_h_omni": {"vision_config.video_temporal_patch_size": 2},
    "ernie4_5_vl_moe": {"text_config.moe_intermediate_size": [32, 32],
        "text_config.rope_parameters": PARTS, "text_config.mlp_layer_types": ["dense", "sparse"]},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1, 1, 1, 1],
        "spatial_vision_layer": -1},
    "kyutai_speech_to_text": {"codec_config.upsample_groups": 64, "num_codebooks": 4},
    "dia": {"decoder_config.num_channels": 3, "delay_pattern": [0, 1, 2]},
    "moonshine_streaming": {"num_key_value_heads": 2},
}  # fmt: skip


class Case(NamedTuple):
    """A class to try. group: multimodal or text."""

    model_type: str
    architecture: str
    group: str


class NotBuiltError(ValueError):
    """No tiny model, or no inputs, could be made."""


def cases() -> list[Case]:
    """Every class of the mappings once, by its first model type."""
    found: dict[str, Case] = {}
    for group, mappings in (("multimodal", MULTIMODAL), ("text", TEXTS)):
        for name in mappings:
            table = getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES")
            for model_type, classes in table.items():
                architecture = classes if isinstance(classes, str) else classes[0]
                found.setdefault(architecture, Case(model_type, architecture, group))
    return list(found.values())


def small(default: Any, rows: dict[str, Any]) -> dict[str, Any]:
    """Settings of a small configuration of the same class as ``default``."""
    made: dict[str, Any] = {}
    free = iter(range(101, 120))
    for field in dataclasses.fields(default):
        name, value = field.name, vars(default).get(field.name)
        deeper = {k.partition(".")[2]: v for k, v in rows.items() if k.startswith(f"{name}.")}
        token = re.fullmatch(r"(.+)_token_(?:id|index)", name)
        if name in rows:
            made[name] = rows[name]
        elif dataclasses.is_dataclass(value) and hasattr(value, "model_type"):
            made[name] = small(value, deeper) | {"model_type": value.model_type}
        elif token and isinstance(value, int | list):
            id_ = MARKS.get(token[1], next(free) if token[1] not in MARKS else 0)
            made[name] = [id_] if isinstance(value, list) else id_
        elif value is None and name in NEEDED:
            made[name] = NEEDED[name]
        elif name in SMALL and isinstance(value, int) and not isinstance(value, bool):
            made[name] = SMALL[name]
        elif (
            name in SMALL
            and isinstance(value, list | tuple)
            and all(isinstance(n, int) for n in value)
        ):
            made[name] = [SMALL[name]] * len(value)
        elif name == "rope_parameters" and isinstance(value, dict):
            made |= _rope(value)
    return _layers(default, made, rows)


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    """Plain rotary positions, in three parts where there were three."""
    if "mrope_section" not in value:
        return {}
    plain = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    more = {"mrope_interleaved": True} if value.get("mrope_interleaved") else {}
    whole = {"partial_rotary_factor": 1.0} if "partial_rotary_factor" in value else {}
    return {"rope_parameters": plain | more | whole}


def _layers(default: Any, made: dict[str, Any], rows: dict[str, Any]) -> dict[str, Any]:
    """Each kind of layer once, two layers at least, and lists with an entry a layer as short."""
    deep = next((n for n in ("num_hidden_layers", "n_layer", "num_layers") if n in made), None)
    depth = vars(default).get(deep) if deep else None
    lists = {
        field.name: value
        for field in dataclasses.fields(default)
        if isinstance(value := vars(default).get(field.name), list | tuple)
        and len(value) == depth
        and field.name not in rows
    }
    if not deep or deep in rows or not lists:
        return made
    kinds = list(zip(*(v for k, v in lists.items() if k in KINDS))) or [0] * (depth or 0)
    first = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())
    chosen = sorted({*first, *range(max(0, 2 - len(first) + 1))})[: max(2, len(first))]
    made[deep] = len(chosen)
    return made | {k: [v[i] for i in chosen] for k, v in lists.items()}


def build(case: Case) -> PreTrainedModel:
    """A random model, the same each time. Raises NotBuiltError for one that is not tiny."""
    cls = getattr(transformers, case.architecture)
    if row := FAMILIES.get(case.model_type):
        if row.architecture == case.architecture:
            return row.build()
    default = (cls.config_class or CONFIG_MAPPING[case.model_type])()
    config = type(default)(**small(default, ROWS.get(default.model_type, {})))
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in cls(config).named_parameters()}
    if sum(sizes.values()) > MOST:
        large = sorted(sizes, key=lambda name: -sizes[name])[:3]
        raise NotBuiltError(f"{sum(sizes.values()):,} parameters, most in {', '.join(large)}")
    torch.manual_seed(0)
    model = cls(config)
    with torch.no_grad():  # as large as trained weights, and no norm or gate at its neutral start
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
            elif parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval().requires_grad_(False)


# Inputs


def words(length: int, seed: int) -> Tensor:
    """Ids (1, length) of plain words."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(4, WORDS, (1, length), generator=draw)


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Features of the given shape, between 0 and 1."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def _numbers(config: Any, names: tuple[str, ...]) -> list[int]:
    """Values of fields, in the configuration or those in it."""
    found: list[int] = []
    for field in dataclasses.fields(config):
        value = vars(config).get(field.name)
        if dataclasses.is_dataclass(value) and hasattr(value, "model_type"):
            found += _numbers(value, names)
        elif field.name in names and isinstance(value, int | list | tuple):
            found += [value] if isinstance(value, int) else [n for n in value if type(n) is int]
    return list(dict.fromkeys(found))


def picture_shapes(config: Any) -> Iterator[tuple[int, ...]]:
    """Shapes that pictures may have: whole, in tiles, as flat patches."""
    side = _numbers(config, ("image_size", "crop_size")) or [16]
    patch = _numbers(config, ("patch_size",)) or [4]
    for size in [*side[:2], 32]:
        yield from ((*lead, 3, size, size) for lead in ((1,), (1, 1), (1, 2), (1, 1, 2)))
    for p, frames in product(patch[:2], (1, 2)):
        yield (16, 3 * frames * p * p)
        yield (1, 16, 3 * frames * p * p)
    yield from ((16, 3, patch[0], patch[0]), (1, 16, 3, patch[0], patch[0]))


def sound_shapes(config: Any) -> Iterator[tuple[int, ...]]:
    """Shapes that sounds may have: mel bins by frames, frames by bins, samples."""
    names = ("num_mel_bins", "feature_size", "input_dim", "input_size", "n_mels", "num_mels",
             "input_feat_per_channel", "feat_dim", "feature_projection_input_dim",
             "mel_bins", "audio_channels")  # fmt: skip
    for bins, frames in product(_numbers(config, names), (32, 64, 128, 100)):
        yield from ((1, bins, frames), (1, frames, bins))
    yield from ((1, n) for n in (1600, 6400))
    yield from ((1, 1, n) for n in (1920, 6400))


def companions(name: str, shape: tuple[int, ...]) -> list[Any]:
    """What another input of this name may be beside a picture or sound of the given shape."""
    side, frames = shape[-1], shape[-1] if len(shape) < 3 else max(shape[1:])
    ones = torch.ones
    grid = torch.cartesian_prod(torch.arange(4), torch.arange(4))[None].flip(-1)
    known: dict[str, list[Any]] = {
        "image_grid_thw": [torch.tensor([[1, 4, 4]])],
        "grid_thw": [torch.tensor([[1, 4, 4]])],
        "image_grid_hw": [torch.tensor([[4, 4]])],
        "image_grid_hws": [torch.tensor([[4, 4]])],
        "image_sizes": [torch.tensor([[side, side]]), torch.tensor([[side, 2 * side]])],
        "target_sizes": [torch.tensor([[4, 4]])],
        "spatial_shapes": [torch.tensor([[4, 4]])],
        "image_position_ids": [grid], "pixel_position_ids": [grid],
        "pixel_attention_mask": [ones(1, 16, dtype=torch.long)] if len(shape) == 3 else [],
        "feature_attention_mask": [ones(1, frames, dtype=torch.long)],
        "input_features_mask": [ones(1, frames, dtype=torch.long)],
        "audio_attention_mask": [ones(1, frames, dtype=torch.long)],
        "padding_mask": [ones(1, frames, dtype=torch.long)],
        "audio_embed_sizes": [torch.tensor([4])],
        "audio_sizes": [torch.tensor([4])],
        "num_image_tokens": [torch.tensor([4])],
    }  # fmt: skip
    return known.get(name, [])


class Finder:
    """Looks for inputs that a model takes."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.config = model, model.config
        self.takes = tuple(inspect.signature(model.forward).parameters)
        self.pairs = bool(self.config.is_encoder_decoder)
        self.why: list[str] = []

    def answer(self, inputs: dict[str, Any]) -> Tensor | None:
        """The model's logits, None (and why) where it takes no such inputs."""
        try:
            with torch.no_grad():
                out = self.model(**inputs)
        except (ValueError, TypeError, RuntimeError, LookupError, AttributeError, AssertionError,
                ArithmeticError, NotImplementedError, StopIteration) as error:  # fmt: skip
            self.why.append(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
            return None
        logits = logits_of(out)
        return logits if logits is not None and bool(logits.isfinite().all()) else None

    def text(self, seed: int, count: int = 0, token: int = 0) -> dict[str, Any]:
        """Words, with ``count`` placeholders among them."""
        row = words(10 + 3 * seed, seed)
        row = torch.cat([row[:, :3], torch.full((1, count), token), row[:, 3:]], 1)
        made: dict[str, Any] = {"input_ids": row}
        if "attention_mask" in self.takes:
            made["attention_mask"] = torch.ones_like(row)
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in self.takes and count:
                made[name] = (row == token).long() * (3 if token == AUDIO else 1)
        return made | self.decoded(seed)

    def decoded(self, seed: int) -> dict[str, Any]:
        """What the decoder of an encoder-decoder reads."""
        return {"decoder_input_ids": words(8 + 2 * seed, seed + 7)} if self.pairs else {}

    def plain(self) -> list[dict[str, Any]] | None:
        """Two samples of text alone."""
        made = [self.text(seed) for seed in range(2)]
        return made if "input_ids" in self.takes and self.answer(made[0]) is not None else None

    def media(self, kind: str) -> list[dict[str, Any]] | None:
        """Two samples with a picture or a sound."""
        names = [name for name in self.takes if re.fullmatch(MEDIA[kind], name)]
        shapes = list((picture_shapes if kind == "image" else sound_shapes)(self.config))
        for name, shape in product(names[:2], shapes):
            for extra in self._extras(name, shape):
                for text in self._texts(kind, name, shape, extra):
                    made = [self._sample(name, shape, extra, text, seed) for seed in range(2)]
                    first = self.answer(made[0])
                    if first is not None and self._depends(made[0], name, first):
                        return made
        return None

    def _extras(self, name: str, shape: tuple[int, ...]) -> Iterator[dict[str, Any]]:
        found = {n: v for n in self.takes if (v := companions(n, shape))}
        for chosen in product(*found.values()):
            yield dict(zip(found, chosen))
        if found:
            yield {}

    def _texts(
        self, kind: str, name: str, shape: tuple[int, ...], extra: dict[str, Any]
    ) -> Iterator[int | None]:
        """Numbers of placeholders to try; None: no text but the decoder's."""
        if "input_ids" not in self.takes or self.pairs:
            yield None
        if "input_ids" in self.takes:
            count = self._features(kind, name, shape, extra)
            yield from dict.fromkeys([*([count] if count else []), 4, 16, 1, 17])

    def _features(
        self, kind: str, name: str, shape: tuple[int, ...], extra: dict[str, Any]
    ) -> int | None:
        """How many tokens the model makes of it."""
        read = getattr(self.model, f"get_{kind}_features", None)
        if read is None:
            return None
        takes = inspect.signature(read).parameters
        given = {k: v for k, v in ({name: noise(shape, 0)} | extra).items() if k in takes}
        try:
            with torch.no_grad():
                found = read(**given)
        except (ValueError, TypeError, RuntimeError, LookupError, AttributeError,
                AssertionError, ArithmeticError, NotImplementedError):  # fmt: skip
            return None
        found = getattr(found, "pooler_output", found)
        rows = [found] if isinstance(found, Tensor) else list(found)
        return sum(r.numel() // r.shape[-1] for r in rows if isinstance(r, Tensor))

    def _sample(
        self, name: str, shape: tuple[int, ...], extra: dict[str, Any], count: int | None, seed: int
    ) -> dict[str, Any]:
        kind = "audio" if re.fullmatch(MEDIA["audio"], name) else "image"
        text = self.decoded(seed) if count is None else self.text(seed, count, TOKENS[kind])
        return text | extra | {name: noise(shape, seed)}

    def _depends(self, inputs: dict[str, Any], name: str, first: Tensor) -> bool:
        other = self.answer(inputs | {name: noise(tuple(inputs[name].shape), 5)})
        return other is not None and other.shape == first.shape and not torch.equal(other, first)


MEDIA = {
    "image": "pixel_values|image_pixel_values|images|flattened_patches|pixel_values_images",
    "audio": "input_features|input_values|audio_input_features|audio_values|audio_features|input_audio_embeds",
}


def logits_of(out: Any) -> Tensor | None:
    """What a model answers: its logits, else its first tensor."""
    found = getattr(out, "logits", None)
    if found is None:
        found = next((v for v in out.values() if isinstance(v, Tensor)), None)
    return found[0] if isinstance(found, tuple) else found


def samples(model: PreTrainedModel) -> dict[str, list[dict[str, Any]]]:
    """Kind -> inputs. Raises NotBuiltError where none of them runs."""
    row = FAMILIES.get(model.config.model_type)
    if row and row.architecture == type(model).__name__:
        kinds = {kind: [make(seed) for seed in range(2)] for kind, make in row.media.items()}
        return ({"text": replace(row, media={}).samples()} if row.plain else {}) | kinds
    finder = Finder(model)
    found = {"text": finder.plain()} | {kind: finder.media(kind) for kind in MEDIA}
    made = {kind: inputs for kind, inputs in found.items() if inputs}
    if not made:
        often = "; ".join([*finder.why[:1], *(w for w, _ in Counter(finder.why).most_common(2))])
        raise NotBuiltError(f"no inputs found: {often}")
    return made


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Lists of modules with linear weights, those inside of others left out."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{p}.") for p in found):
            if len(module) and all(
                not isinstance(b, nn.Linear) and any(isinstance(m, nn.Linear) for m in b.modules())
                for b in module
            ):
                found[path] = module
    return found
