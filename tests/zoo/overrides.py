"""What the names of a config's fields can't tell, per model type and per class."""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from tests.zoo import config_rules


def _mrope(*sections: int, **more: Any) -> dict[str, Any]:
    """Rotary parameters whose sections the model's code, not its config, gives a default for."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **more}}


_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
_TYPES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "num_hidden_layers": 2, "mamba_d_head": 16, "mamba_n_heads": 8},
    # Both go over to it for good at their first short input.
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blt": {"encoder_hash_byte_group_vocab": 64, "local_attention_window_len": 8},
    "blt_global_transformer": {"hidden_size": 128, "intermediate_size": 96},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
        "layer_types": ["full_attention", "full_attention"],
        "num_hidden_layers": 2,
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"},
    # The default, as in every published model: as long as the longest sequence.
    "doge": {"keep_window_size": 2048},
    "dots1": {**_EXPERTS, "n_group": 1, "topk_group": 1},
    "dots3_note_text": {
        "layer_types": ["indexed_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "num_hidden_layers": 2,
        "sliding_window": 8,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 16,
    },
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "gemma3n_text": {"intermediate_size": 96},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "hrm_text": {"num_hidden_layers": 1, "num_layers_per_stack": None, "H_cycles": 2, "L_cycles": 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "longcat_flash": {"head_dim": 8, "qk_head_dim": 16, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 64,
        "split_ngram_parts": 2,
        "make_ngram_vocab_size_divisible_by": 8,
        "heads_per_ngram": 2,
        "eos_token_id": 2,
        "hc_lowrank": 8,
        "ple_layer_ids": [1],
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [32, 32],
        "num_buckets": 4,
        "hash_seed": 0,
        "is_decoder": True,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
    },
    "aria": {"projector_patch_to_query_dict": {16: 4}, "max_value_projector_patch_to_query_dict": 4},
    "canary": {},
    "chameleon": {
        "max_position_embeddings": 1024,
        "vocabulary_map": {"<image>": 230, **{f"IMGIMG{i}Z": 240 + i for i in range(8)}},
        "image_token_id": 230,
    },
    "chameleon_vqgan": {
        "num_embeddings": 8,
        "base_channels": 32,
        "channel_multiplier": [1, 2],
        "num_res_blocks": 1,
        "resolution": 8,
        "latent_channels": 32,
        "embed_dim": 32,
    },
    "deepseek_ocr2_text": {
        "max_position_embeddings": 1024,
        **_EXPERTS,
        "n_group": 1,
        "topk_group": 1,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "emu3": {
        "vocabulary_map": {
            "<image>": 230,
            "<|extra_200|>": 231,
            **{f"<|visual token {i:06d}|>": 240 + i for i in range(8)},
        }
    },
    "emu3_vqgan": {
        "codebook_size": 8,
        "base_channels": 32,
        "channel_multiplier": [1, 2],
        "num_res_blocks": 1,
        "embed_dim": 32,
        "latent_channels": 32,
        "attn_resolutions": [1],
    },
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [32, 32],
        "moe_k": 2,
        "moe_num_experts": 4,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
    },
    "fun_asr_nano_adaptor": {"intermediate_size": 16},
    "": {"intermediate_size": 16},
    "gemma3": {"mm_tokens_per_image": 4},
    "t5gemma2_encoder": {"mm_tokens_per_image": 4},
    "glm4v_text": _mrope(2, 3, 3),
    "glm46v_text": _mrope(2, 3, 3),
    "glm4v_moe_text": _mrope(2, 1, 1, partial_rotary_factor=0.5),
    "glm_ocr_text": _mrope(2, 3, 3),
    "paddleocr_vl_text": _mrope(2, 3, 3),
    "qwen2_vl_text": _mrope(2, 3, 3),
    "qwen2_5_vl_text": _mrope(2, 3, 3),
    "qwen2_5_omni_text": _mrope(2, 3, 3),
    "glm5_next_text": {"index_kpool": 2, "qk_rope_head_dim": 0, "qk_nope_head_dim": 16, "head_dim": 0},
    "glmasr_encoder": {"intermediate_size": 256},
    "hunyuan_vl_text": {"head_dim": 16, **_mrope(2, 2, 2, 2)},
    "idefics": {},
    "kyutai_speech_to_text": {"num_codebooks": 4, "codebook_vocab_size": 64},
    "mimi": {
        "upsample_groups": 32,
        "num_filters": 8,
        "num_quantizers": 8,
        "codebook_dim": 32,
        "vector_quantization_hidden_dimension": 32,
    },
    "llama4_vision_model": {
        "vision_output_dim": 64,
        "projector_input_dim": 64,
        "projector_output_dim": 64,
        "intermediate_size": 256,
    },
    "mistral_large4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["indexed_attention"] * 4,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "indexer_types": ["full"] * 4,
        "kv_source_layers": [0, 1, 2, 3],
        "no_rope_layers": [1, 1, 1, 0],
    },
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "muse_spark_vision": {},
    "voxtral_encoder": {"intermediate_size": 256},
    "speech_to_text": {"conv_channels": 64},
    "step3p5": {"sliding_window": 8, "n_routed_experts": 4, "num_sliding_attention_heads": 4},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 6400},
    "vipllava": {"vision_feature_layer": [-2, -1], "image_seq_length": 16},
    "seamless_m4t": {"feature_projection_input_dim": 64},
    "llava_next": {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]},
    "llava_next_video": {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]},
    "llava_onevision": {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "mllama_vision_model": {"intermediate_layers_indices": [0, 1], "vision_output_dim": 192, "num_global_layers": 1},
    "muse_glimmer": {"out_hidden_size": 256},
    "muse_spark": {"out_hidden_size": 256},
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [32, 64], "output_channels": 64},
    "unlimited_ocr_sam_vision_model": {"downsample_channels": [32, 64], "output_channels": 64},
    "pix2struct_vision_model": {"patch_embed_hidden_size": 192},
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64},
    "dots3_note_vision_encoder": {"adapter_in_dim": 64, "adapter_out_dim": 64},
    "parakeet_encoder": {"subsampling_conv_channels": 16},
    "granite_speech": {"window_size": 15},
    "granite_speech_plus": {"window_size": 15},
    "blt_local_encoder": {"hidden_size_global": 128},
    "blt_local_decoder": {"hidden_size_global": 128},
    "xlstm": {"num_blocks": 2, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
}
_TYPES["granite_moe_hybrid"] = _TYPES["granitemoehybrid"]
_DECODERS = (
    "BertLMHeadModel",
    "BertGenerationDecoder",
    "BigBirdForCausalLM",
    "CamembertForCausalLM",
    "Data2VecTextForCausalLM",
    "ElectraForCausalLM",
    "ErnieForCausalLM",
    "MegatronBertForCausalLM",
    "RemBertForCausalLM",
    "RoCBertForCausalLM",
    "RoFormerForCausalLM",
    "RobertaForCausalLM",
    "RobertaPreLayerNormForCausalLM",
    "XLMRobertaForCausalLM",
    "XLMRobertaXLForCausalLM",
    "XmodForCausalLM",
)
_CLASSES: dict[str, dict[str, Any]] = {name: {"is_decoder": True} for name in _DECODERS}
_BOUNDARIES = {"vision_start_token_id": 248, "vision_end_token_id": 249, "position_id_per_seconds": 25}
_CLASSES |= {
    "BltForCausalLM": {"num_hidden_layers": 2},
    "Qwen2_5OmniThinkerForConditionalGeneration": _BOUNDARIES,
    "Qwen3OmniMoeThinkerForConditionalGeneration": _BOUNDARIES,
}


def tiny_config(cls: type[PreTrainedModel]) -> PreTrainedConfig:
    """The tiny config of a class."""
    default = cls.config_class()  # pyright: ignore[reportOptionalCall]
    config = config_rules.shrink(default, _TYPES, config_rules.TokenIds())
    for name, value in _CLASSES.get(cls.__name__, {}).items():
        setattr(config, name, value)
    for number, name in enumerate(("image_token_id", "image_token_index", "audio_token_id", "video_token_index")):
        if getattr(config, name, 0) is None:
            setattr(config, name, 250 + number)
    if cls.__name__ in ("InstructBlipVideoForConditionalGeneration", "VideoLlavaForConditionalGeneration"):
        config.text_config.max_position_embeddings = 1024  # a clip takes 136 places
    if cls.__name__ == "DbrxForCausalLM":
        config.attn_config.clip_qkv = 8.0
        config.attn_config.rope_theta = 1e4  # the default config lacks both, which the model reads
    return config


def finish(model: PreTrainedModel) -> None:
    """What only the finished model can be told."""
    if type(model).__name__ in ("MusicgenForCausalLM", "MusicgenMelodyForCausalLM"):
        model.generation_config.decoder_start_token_id = config_rules.BOS
        model.generation_config.guidance_scale = 1
    if type(model).__name__ == "Pop2PianoForConditionalGeneration":
        model.generation_config.composer_to_feature_token = {
            f"composer{number}": 10 + number % 200 for number in range(model.config.composer_vocab_size)
        }
