"""Small values for the configuration of any class, by names of fields; rows for what resists."""

from typing import Any

WORDS, IMAGE, VIDEO, AUDIO = 100, 120, 121, 122
TOKENS = {"image": IMAGE, "video": VIDEO, "audio": AUDIO}

# Small value -> names of fields that get it, if they hold a number.
SIZES: dict[int, str] = {
    64: """adapter_hidden_size alignment_intermediate_size attention_hidden_size attn_dim
        audio_hidden_size audio_projector_hidden_size backbone_hidden_size
        classifier_proj_size codebook_dim conv_channels conv_dim conv_hidden_size
        adapter_in_dim adapter_input_size adapter_out_dim downsample_channels
        cross_attention_hidden_size cross_hidden_size d_embed d_embeds d_model decoder_dim
        decoder_embed_dim decoder_hidden_size depthwise_separable_out_channel dim
        downsample_hidden_size emb_dim embed_dim embedding_dim embedding_size enc_dim
        encoder_dim encoder_embed_dim encoder_hidden_size encoder_projection_dim
        ext_pw_out_channel fc_hidden_size hidden_dim hidden_size hidden_size_global
        image_text_hidden_size input_embedding_size lang_embed_dim linear_hidden_size
        llm_hidden_size lru_width moe_hidden_size n_embd n_embed nemo_conv_channels
        out_hidden_size output_dim output_embedding_size output_hidden_size output_proj_dims
        patch_embed_hidden_size ple_embed_dim proj_dim projection_dim projection_dimension
        projection_hidden_dim projection_hidden_size projector_hidden_size
        projector_input_dim projector_output_dim pronunciation_embed_dim router_hidden_size
        shape_embed_dim share_dim shared_input_size speaker_embedding_dim
        speech_decoder_postnet_units speech_decoder_prenet_units spkr_embed_dim
        subsampling_conv_channels text_dim text_hidden_size thinker_hidden_size
        unit_embed_dim upsample_initial_channel vector_quantization_hidden_dimension
        vision_hidden_size vision_output_dim width word_embed_proj_dim""",
    96: """adapter_intermediate_size block_auto_adjust_ff_dim centroid_intermediate d_ff
        d_inner decoder_ffn_dim decoder_intermediate_size dense_intermediate_size dff
        dim_feedforward dim_ff encoder_ffn_dim encoder_intermediate_size feed_forward_size
        ffn_dim ffn_hidden_dim ffn_hidden_size inner_dim intermediate_size
        intermediate_size_mlp mlp_dim n_inner projection_intermediate_size
        projector_intermediate_size prompt_intermediate_size share_expert_dim
        shared_intermediate_size speech_encoder_intermediate_size t2u_decoder_ffn_dim
        t2u_encoder_ffn_dim""",
    2: """adapter_layers attention_heads attention_num_heads attention_num_kv_heads
        attn_layers conf_num_attention_heads conf_num_hidden_layers
        cross_num_attention_heads cross_num_key_value_heads decoder_attention_heads
        decoder_layers decoder_num_attention_heads decoder_num_heads
        decoder_num_hidden_layers decoder_num_key_value_heads depth depth_decoder_layers
        encoder_attention_heads encoder_layers encoder_num_attention_heads
        encoder_num_hidden_layers encoder_num_key_value_heads heads hidden_act_layers
        index_n_heads kv_n_heads layers linear_num_heads linear_num_key_heads
        max_symbols_per_step moe_k moe_top_k moe_topk n_head n_heads n_kv_heads n_layer
        n_layers num_adapter_layers num_attention_groups num_attention_heads num_blocks
        num_code_groups num_codebooks num_conv_pos_embedding_groups
        num_decoder_attention_heads num_decoder_layers num_encoder_attention_heads
        num_encoder_layers num_experts_per_tok num_experts_per_token num_global_layers
        num_heads num_hidden_groups num_hidden_layers num_key_value_heads num_kv_heads
        num_kv_heads_total num_layers num_layers_per_stack num_mem_blocks
        num_prediction_layers num_quantizers num_query_heads num_query_heads_per_group
        num_sliding_attention_heads resampler_depth resampler_n_heads sa_num_heads
        speech_encoder_attention_heads speech_encoder_layers swa_num_attention_heads
        swa_num_key_value_heads t2u_decoder_attention_heads t2u_decoder_layers
        t2u_encoder_attention_heads t2u_encoder_layers top_k_experts vision_depth
        vocoder_num_langs vocoder_num_spkrs""",
    4: """index_topk_blocks latent_query_num linear_num_value_heads mamba_n_heads
        mamba_num_heads mm_tokens_per_image moe_num_experts n_experts n_routed_experts
        num_centroids num_codevectors_per_group num_experts num_global_tokens
        num_local_experts num_moe_experts num_negatives num_queries num_query_tokens
        patch_size pos_emb_height pos_emb_width posemb_grid_size prompt_length query_length
        resampler_n_latents resampler_num_latents""",
    1: """first_k_dense_replace mamba_n_groups moe_num_shared_experts n_group n_groups
        n_shared_experts num_dense_layers num_shared_experts topk_group zero_expert_num""",
    16: """window_size adapter_rank base_channels chunk_size codebook_size context_size
        conv_pos_kernel_size crop_size d_rel feature_projection_input_dim
        frequency_embedding_size hc_lowrank image_size index_block_size index_head_dim
        index_topk latent_size linear_key_head_dim linear_value_head_dim mamba_chunk_size
        mamba_d_state max_action_dim max_pos_emb max_source_positions max_state_dim n_window
        num_conv_pos_embeddings num_embeddings num_image_tokens num_position_embeddings
        output_channels position_embedding_size prompt_mid_dim qk_nope_head_dim
        qk_rope_head_dim ssm_state_size state_size""",
    32: """attention_head_dim attention_head_size codevector_dim cross_head_dim d_head d_kv
        dim_head expert_ffn_hidden_size global_head_dim head_dim hidden_size_per_layer_input
        kv_channels kv_lora_rank laurel_rank linear_head_dim mamba_d_head mamba_dt_rank
        mamba_head_dim moe_intermediate_size moe_shared_expert_intermediate_size num_filters
        o_lora_rank proj_codevector_dim q_lora_rank qk_head_dim query_pre_attn_scalar
        resampler_dim_head resampler_head_dim rotary_dim shared_expert_intermediate_size
        swa_head_dim time_mix_dim time_mix_extra_dim time_step_rank v_head_dim""",
    8: """attention_window attention_window_size feature_size input_feat_per_channel
        input_feat_size input_size local_attention_window mel_bins mel_dim n_mel_bins n_mels
        num_mel_bins num_mels sliding_window sliding_window_size""",
    128: """audio_vocab_size char_vocab_size codebook_vocab_size composer_vocab_size
        decoder_vocab_size encoder_hash_byte_group_vocab mamba_d_ssm max_num_patches
        mel_vocab_size ngram_vocab_size_base pronunciation_vocab_size seq_len
        shape_vocab_size src_vocab_size t2u_vocab_size text_vocab_size tgt_vocab_size
        unit_hifi_gan_vocab_size unit_vocab_size unpadded_vocab_size vocab_size
        vocab_size_per_layer_input""",
    256: """context_length mask_length max_2d_position_embeddings
        max_decoder_position_embeddings max_encoder_position_embeddings
        max_position_embeddings max_seq_len max_sequence_length max_speech_positions
        max_target_positions max_text_len max_text_positions n_ctx n_positions
        original_max_position_embeddings seq_length t2u_max_position_embeddings""",
}
PARTS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6],
         "partial_rotary_factor": 1.0}  # fmt: skip
EACH = {kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
        for kind in ("full_attention", "sliding_attention")}  # fmt: skip
SLIDING = {"swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 32, "swa_head_dim": 32, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 32,
    "sliding_window": 8}  # fmt: skip
INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 32,
    "indexer_budget": 16, "indexer_compress_ratio": 4, "ngram_vocab_size_base": 128,
    "split_ngram_parts": 4, "heads_per_ngram": 2}  # fmt: skip
ENCODEC = {f"audio_encoder.{k}": v for k, v in {"num_filters": 4, "hidden_size": 32,
    "codebook_dim": 32, "codebook_size": 16, "upsampling_ratios": [2, 2], "num_lstm_layers": 1,
    "target_bandwidths": [1.5]}.items()}  # fmt: skip
VIBE = {"downsampling_ratios": [2, 5], "depths": [1, 1, 1], "num_filters": 8}
DONUT = dict(model_type="donut-swin", image_size=[32, 32], patch_size=4, embed_dim=32,
    depths=[2, 2], num_heads=[2, 2], window_size=2)  # fmt: skip
WAV2VEC = dict(model_type="wav2vec2", hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=96, conv_dim=[32] * 3, conv_kernel=[10, 3, 3], conv_stride=[5, 2, 2],
    num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)  # fmt: skip
MBART = dict(model_type="mbart", d_model=64, decoder_layers=2, decoder_attention_heads=2,
    decoder_ffn_dim=96, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=96,
    vocab_size=128, max_position_embeddings=64, is_decoder=True, add_cross_attention=True,
    is_encoder_decoder=False)  # fmt: skip
HYBRID = ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"]
NEEDED = {"head_dim": 32, "num_key_value_heads": 2, "num_local_experts": 4}  # even where None
KINDS = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types", "layers_types")
# Model type -> fields, where small numbers alone give no model; "text_config.head_dim" is deeper.
ROWS: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},
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
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "glmasr": {"audio_config.intermediate_size": 256},
    "qwen3_asr": {"eos_token_id": 2, "pad_token_id": 0},
    "zaya": {"num_experts_per_tok": 1},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "lsh"], "axial_pos_shape": [4, 8],
        "axial_pos_embds_dim": [16, 48], "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4,
        "num_buckets": 2},
    "codegen": {"rotary_dim": 16, "n_head": 4},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "emu3_vqgan": {"base_channels": 32},
    "deepseek_v2": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "mimo_v2_flash": {"num_key_value_heads": 1},
    "wav2vec2-bert": {"vocab_size": 128}, "wav2vec2-conformer": {"vocab_size": 128},
    "molmo2": {"image_patch_id": IMAGE, "adapter_config.vision_feature_layer": [-1, -2]},
    "granite_speech_plus": {"encoder_config.input_dim": 16, "downsample_rate": 2, "window_size": 4,
        "encoder_config.context_size": 8, "encoder_config.conv_kernel_size": 3},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 16, "audio_config.num_stacked_frames": 1},
    "janus": {"vq_config.base_channels": 32},
    "chameleon": {"vq_config.base_channels": 32, "vq_config.num_embeddings": 10,
        "vocabulary_map": {"<image>": IMAGE}
        | {f"IMGIMG{letter}Z": 100 + i for i, letter in enumerate("ABCDEFGHIJ")}},
    "glm46v": {"text_config.rope_parameters": PARTS},
    "glm4v_moe": {"text_config.rope_parameters": PARTS},
    "glm_ocr": {"text_config.rope_parameters": PARTS},
    "qwen3_omni_moe_thinker": {"text_config.rope_parameters": PARTS},
    "glm5_next": {"text_config.qk_rope_head_dim": 0},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "blip-2": {"image_token_index": IMAGE}, "instructblip": {"image_token_index": IMAGE},
    "nemotron_h_omni": {"vision_config.video_temporal_patch_size": 2,
        "vision_config.max_img_size": 64},
    "ernie4_5_vl_moe": {"text_config.moe_intermediate_size": [32, 32],
        "text_config.rope_parameters": PARTS | {"mrope_section": [6, 6, 4]},
        "text_config.mlp_layer_types": ["dense", "sparse"]},
    "granite4_vision": {"image_grid_pinpoints": [[16, 32], [32, 16]],
        "deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1, 1, 1, 1],
        "spatial_vision_layer": -1, "downsample_rate": "2/4"},
    "kyutai_speech_to_text": {"codec_config.upsample_groups": 64, "num_codebooks": 4},
    "csm": {"codec_config.upsample_groups": 64, "num_codebooks": 2,
        "depth_decoder_config.num_codebooks": 2},
    "dia": {"decoder_config.num_channels": 3, "delay_pattern": [0, 1, 2]},
    "zamba": {"num_hidden_layers": 5, "layers_block_type": HYBRID, "attention_hidden_size": 128,
        "attention_head_dim": 64},
    "zamba2": {"num_hidden_layers": 5, "layers_block_type": HYBRID, "num_mem_blocks": 1,
        "hybrid_layer_ids": [1, 3]},
    "vision-encoder-decoder": {"encoder": DONUT, "decoder": MBART},
    "speech-encoder-decoder": {"encoder": WAV2VEC, "decoder": MBART},
    "pp_formulanet": {"vision_config.post_conv_in_channels": 16,
        "vision_config.post_conv_mid_channels": 16, "vision_config.post_conv_out_channels": 64},
    "hrm_text": {"num_layers_per_stack": None, "layer_types": None, "num_hidden_layers": 2},
    "minicpmv4_6": {"insert_layer_id": 0, "vision_config.insert_layer_id": 0},
    "minicpmv4_7": {"insert_layer_id": 0, "vision_config.insert_layer_id": 0},
    "pix2struct": {"vision_config.d_kv": 32, "vision_config.seq_len": 64},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"],
        "text_config.num_experts_per_tok": 2},
    "step3p7": {"text_config.sliding_window": 8, "text_config.num_sliding_attention_heads": 2},
    "hunyuan_vl": {"text_config.rope_parameters": PARTS | {"mrope_section": [4, 4, 4, 4]},
        "vision_config.max_image_size": 64, "vision_config.img_max_token_num": 64},
    "diffusion_gemma": {"text_config.num_experts": 4, "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 32, "canvas_length": 4},
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8.0, "d_model": 64,
        "n_heads": 2, "ffn_config.hidden_size": 64},
    "emu3": {"vq_config.base_channels": 32, "vq_config.hidden_size": 128,
        "vocabulary_map": {"<image>": IMAGE, "<|extra_200|>": 119}
        | {f"<|visual token {i:06d}|>": 100 + i for i in range(16)}},
    "instructblipvideo": {"image_token_index": 119, "video_token_index": IMAGE},
    "moonshine_streaming": {"num_key_value_heads": 2,
        "encoder_config.sliding_windows": [[16, 4], [16, 0]]},
    "cohere_compass_text": {"rope_parameters": EACH},
    "cohere_compass": {"text_config.rope_parameters": EACH},
    "gemma4_unified": {
        "vision_config": {"patch_size": 4, "pooling_kernel_size": 1, "mm_embed_dim": 64,
            "mm_posemb_size": 16, "output_proj_dims": 64},
        "audio_config": {"audio_embed_dim": 64}},
    "dots3_note_text": SLIDING, "dots3_note": {f"text_config.{k}": v for k, v in SLIDING.items()},
    "muse_glimmer": {"out_hidden_size": 256}, "muse_spark": {"out_hidden_size": 256},
    "qwen4_exp_text": INDEXER, "qwen4_exp": {f"text_config.{k}": v for k, v in INDEXER.items()},
    "vibevoice": {f"{part}.{k}": v for part in ("audio_config", "semantic_model_config")
        for k, v in VIBE.items()},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 1600} | {f"{part}_tokenizer_encoder_config"
        f".{k}": v for part in ("acoustic", "semantic") for k, v in VIBE.items()},
    "pocket_tts": {"flow_head_config.condition_dim": 64},
    "gradium_phonon_tts": {"flow_head_config.condition_dim": 64},
    "musicgen": ENCODEC, "musicgen_melody": ENCODEC,
    "deepseek_vl_hybrid": {"high_res_vision_config.global_attn_indexes": [0, 1]},
    "longcat_flash": {"head_dim": 16, "qk_head_dim": 32},
}  # fmt: skip
