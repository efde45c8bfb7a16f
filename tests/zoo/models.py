"""Tiny random models of every family that the tests build, and generate kwargs for them.

Weights are scaled so that greedy choices aren't near-ties: a wrong program shows as a wrong token.
"""

from collections.abc import Callable

import torch
import transformers as hf

VOCABULARY = 200
IMAGE_TOKEN = 197

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZES, "num_attention_heads": 8}  # four query heads to a key head
_WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}

TEXT: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES)),
    "llama_tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED, tie_word_embeddings=True)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_SIZES, head_dim=16)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_SIZES, sliding_window=8)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**_SIZES, head_dim=16, query_pre_attn_scalar=16, **_WINDOWS)
    ),
    "gemma3_text": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**_GROUPED, head_dim=16, query_pre_attn_scalar=16, **_WINDOWS)
    ),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_SIZES)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(
            n_embd=64, n_layer=2, n_head=4, n_positions=256, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2
        )
    ),
    "olmo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**_SIZES)),
    "smollm3": lambda: hf.SmolLM3ForCausalLM(
        hf.SmolLM3Config(**_SIZES, no_rope_layers=[1, 0], use_sliding_window=False)
    ),
}

_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def _llava() -> hf.PreTrainedModel:
    vision = hf.CLIPVisionConfig(**_VISION, image_size=30, patch_size=10, projection_dim=32)
    text = hf.LlamaConfig(**_GROUPED)
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, vision_feature_layer=-1)
    )


def _idefics3() -> hf.PreTrainedModel:
    vision = {**_VISION, "image_size": 32, "patch_size": 8}
    return hf.Idefics3ForConditionalGeneration(
        hf.Idefics3Config(
            vision_config=vision,
            text_config=hf.LlamaConfig(**_SIZES),
            image_token_id=IMAGE_TOKEN,
            scale_factor=2,
            pad_token_id=0,
        )
    )


def _paligemma() -> hf.PreTrainedModel:
    vision = hf.SiglipVisionConfig(**_VISION, image_size=32, patch_size=8, projection_dim=64)
    text = hf.GemmaConfig(**_SIZES, head_dim=16)
    return hf.PaliGemmaForConditionalGeneration(
        hf.PaliGemmaConfig(
            vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, projection_dim=64, hidden_size=64
        )
    )


def _qwen3_vl() -> hf.PreTrainedModel:
    text = {
        **_SIZES,
        "head_dim": 16,
        "num_hidden_layers": 3,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 4,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    return hf.Qwen3VLForConditionalGeneration(
        hf.Qwen3VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=IMAGE_TOKEN,
            video_token_id=198,
            vision_start_token_id=195,
            vision_end_token_id=196,
        )
    )


IMAGE_TEXT: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "llava": _llava,
    "idefics3": _idefics3,
    "paligemma": _paligemma,
    "qwen3_vl": _qwen3_vl,
}


def make(name: str, seed: int = 0) -> hf.PreTrainedModel:
    """The tiny model `name`, in float32 eval mode."""
    torch.manual_seed(seed)
    model = {**TEXT, **IMAGE_TEXT}[name]().eval().requires_grad_(False)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = 2
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(4.0)
    return model


def text_ids(length: int, seed: int = 0) -> torch.Tensor:
    """`[1, length]` random ids that are no special token."""
    return torch.randint(5, 190, (1, length), generator=torch.Generator().manual_seed(seed))


def image_inputs(
    name: str, before: int = 4, after: int = 5, *, seed: int = 0, grid=(1, 4, 6)
) -> dict[str, torch.Tensor]:
    """Generate kwargs with one picture between two pieces of text."""
    generator = torch.Generator().manual_seed(seed)
    if name == "qwen3_vl":
        patches = grid[0] * grid[1] * grid[2]
        image = [torch.tensor([[195]]), torch.full((1, patches // 4), IMAGE_TOKEN), torch.tensor([[196]])]
    else:
        image = [torch.full((1, {"llava": 9, "idefics3": 4, "paligemma": 16}[name]), IMAGE_TOKEN)]
    texts = text_ids(before, seed), text_ids(after, seed + 1)
    # PaliGemma's processor puts the picture first.
    parts = [*image, *texts] if name == "paligemma" else [texts[0], *image, texts[1]]
    ids = torch.cat(parts, 1)
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "qwen3_vl":
        kwargs["pixel_values"] = torch.randn(patches, 96, generator=generator)
        kwargs["image_grid_thw"] = torch.tensor([grid])
        kwargs["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int()
    else:
        shape = {"llava": (1, 3, 30, 30), "idefics3": (1, 1, 3, 32, 32), "paligemma": (1, 3, 32, 32)}[name]
        kwargs["pixel_values"] = torch.randn(shape, generator=generator)
    if name == "paligemma":
        kwargs["token_type_ids"] = torch.zeros_like(ids)  # all of it is prefix: it attends both ways
    return kwargs


def samples(name: str) -> list[dict[str, torch.Tensor]] | None:
    """What to give `build_bundle` as inputs: two pictures that differ in what shall be dynamic; None for text."""
    if name in TEXT:
        return None
    return [image_inputs(name), image_inputs(name, 7, 3, seed=2, grid=(1, 4, 4))]


def phi3(threshold: int) -> hf.PreTrainedModel:
    """A tiny Phi-3 that computes its positions otherwise beyond `threshold` tokens, as the 128k checkpoints do."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    config = hf.Phi3Config(
        **_SIZES,
        original_max_position_embeddings=threshold,
        rope_parameters={**rope, "original_max_position_embeddings": threshold},
    )
    torch.manual_seed(0)
    model = hf.Phi3ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embed" not in name:
            parameter.data.mul_(8)
    return model
