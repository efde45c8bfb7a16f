"""Pictures and sounds for the tiny models, as the arrays that their processors would give."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Media:
    """One picture or sound: its arrays, and the tokens that stand for it in the prompt."""

    inputs: Inputs
    tokens: list[int] = field(default_factory=list)
    placeholder: int = -1
    only: bool = False  # nothing but these arrays: an encoder's input


GRIDS = ((1, 4, 8), (1, 4, 4), (1, 8, 4))
FRAMES = (48, 64, 80)


def noise(seed: int, *shape: int) -> torch.Tensor:
    """Random values of this shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 77))


def number(value: Any) -> int:
    """The one number of a size that may be a pair."""
    while isinstance(value, list | tuple):
        value = value[-1]
    return int(value)


def sub_config(model: PreTrainedModel, *names: str) -> Any:
    """The first of these sub-configs that the model has, by name; its own config as the last resort."""
    config = model.config
    places = [config, getattr(config, "thinker_config", None)]
    for place in places:
        for name in names:
            found = getattr(place, name, None)
            if found is not None and not isinstance(found, dict):
                return found
    return config


def first_of(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these fields that the config has and that isn't None."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    return default


def placeholder(model: PreTrainedModel, kind: str) -> int:
    """The id of the picture's or sound's placeholder."""
    names = [f"{kind}_token_id", f"{kind}_token_index", f"{kind}_patch_id", "video_token_index"]
    found = first_of(model.config, *names)
    if found is None:
        found = first_of(model.config.get_text_config(), *names)
    return 230 if found is None else int(found)


def rows(features: Any) -> int:
    """How many feature vectors an encoder's output holds."""
    for name in ("pooler_output", "last_hidden_state"):
        if getattr(features, name, None) is not None:
            features = getattr(features, name)
            break
    if isinstance(features, torch.Tensor):
        return features.numel() // features.shape[-1]
    return sum(rows(item) for item in features)


def features_of(model: PreTrainedModel, method: str, inputs: Inputs) -> Any:
    """What `get_image_features` or its like gives for `inputs`."""
    places = [model, *(getattr(model, name, None) for name in ("model", "thinker", "base_model"))]
    functions = [getattr(place, method) for place in places if place is not None and hasattr(place, method)]
    if not functions:
        raise NotImplementedError(f"{type(model).__name__} has no {method}")
    # The outer ones of some models only pass their keywords on.
    function = max(functions, key=lambda each: len(set(inspect.signature(each).parameters) & set(inputs)))
    wanted = inspect.signature(function).parameters
    with torch.no_grad():
        return function(**{name: value for name, value in inputs.items() if name in wanted})


def media(model: PreTrainedModel, size: int, seed: int) -> Media | None:
    """The picture or sound of a prompt for `model`; None for a model of text alone."""
    name = type(model).__name__
    wanted = inspect.signature(model.forward).parameters
    if name in TEXT_ALONE:
        return None
    if "pixel_values" in wanted or "image_pixel_values" in wanted or name in _PICTURES:
        inputs = (_PICTURES.get(name) or _picture)(model, size, seed)
        if name in _PICTURE_ALONE:
            return Media(inputs, only=True)
        return _placed(model, inputs, "image", "get_image_features")
    if any(item in wanted for item in ("input_features", "input_values")) or name in _SOUNDS:
        inputs = (_SOUNDS.get(name) or _sound)(model, size, seed)
        if (
            name not in _COUNTS
            and not hasattr(model, "get_audio_features")
            and not hasattr(getattr(model, "model", None), "get_audio_features")
        ):
            return Media(inputs, only=True)
        return _placed(model, inputs, "audio", "get_audio_features")
    return None


def _placed(model: PreTrainedModel, inputs: Inputs, kind: str, method: str) -> Media:
    token = placeholder(model, kind)
    name = type(model).__name__
    count = _COUNTS[name](model, inputs) if name in _COUNTS else rows(features_of(model, method, inputs))
    tokens = [token] * count
    start = (
        first_of(model.config, "vision_start_token_id", "boi_token_id", "image_start_token_id")
        if kind == "image"
        else None
    )
    end = (
        first_of(model.config, "vision_end_token_id", "eoi_token_id", "image_end_token_id") if kind == "image" else None
    )
    indicators = first_of(model.config, "visual_indicator_token_ids")
    if indicators:
        start, end = indicators[0], indicators[-1]
    if count and start is not None and end is not None:
        tokens = [int(start), *tokens, int(end)]
    return Media(inputs, tokens, token)


def _picture(model: PreTrainedModel, size: int, seed: int) -> Inputs:
    """A picture in one of the layouts that most families share, told by what forward takes."""
    wanted = inspect.signature(model.forward).parameters
    vision = sub_config(model, "vision_config", "encoder", "vq_config", "image_config")
    channels = first_of(vision, "in_channels", "num_channels", "in_chans", default=3)
    patch = number(first_of(vision, "patch_size", default=8))
    side = number(first_of(vision, "image_size", default=32))
    if "target_sizes" in wanted:
        _, height, width = GRIDS[size]
        return {
            "pixel_values": noise(seed, 1, 3, patch, height * width * patch),
            "target_sizes": torch.tensor([[height, width]]),
        }
    if "spatial_shapes" in wanted:
        _, height, width = GRIDS[size]
        pixels = noise(seed, 1, 32, 3 * patch * patch)
        mask = torch.zeros(1, 32, dtype=torch.long)
        mask[:, : height * width] = 1
        return {"pixel_values": pixels, "spatial_shapes": torch.tensor([[height, width]]), "pixel_attention_mask": mask}
    if "image_grid_hw" in wanted:
        _, height, width = GRIDS[size]
        return {
            "pixel_values": noise(seed, height * width, 3 * patch * patch),
            "image_grid_hw": torch.tensor([[height, width]]),
        }
    if "image_grid_thw" in wanted:
        grid = GRIDS[size]
        count = grid[0] * grid[1] * grid[2]
        temporal = number(first_of(vision, "temporal_patch_size", "patch_temporal", default=1))
        return {
            "pixel_values": noise(seed, count, channels * temporal * patch * patch),
            "image_grid_thw": torch.tensor([grid]),
        }
    if "pixel_attention_mask" in wanted and "spatial_shapes" not in wanted:
        result = {"pixel_values": noise(seed, 1, 1, 3, side, side)}
        if "tile_fine_mask" in wanted:
            result["tile_fine_mask"] = torch.ones(1, 1, dtype=torch.bool)
        return result
    if "high_res_pixel_values" in wanted:
        high = number(first_of(sub_config(model, "high_res_vision_config"), "image_size", default=32))
        return {"pixel_values": noise(seed, 1, 3, side, side), "high_res_pixel_values": noise(seed, 1, 3, high, high)}
    if "qformer_input_ids" in wanted:
        ids = torch.randint(5, 200, (1, 6), generator=torch.Generator().manual_seed(seed))
        shape = (1, 4, 3, side, side) if "Video" in type(model).__name__ else (1, 3, side, side)
        return {
            "pixel_values": noise(seed, *shape),
            "qformer_input_ids": ids,
            "qformer_attention_mask": torch.ones_like(ids),
        }
    return {"pixel_values": noise(seed, 1, channels, side, side)}


def _pixtral(model: PreTrainedModel, size: int, seed: int) -> Inputs:
    patch = number(model.config.vision_config.patch_size)
    _, height, width = GRIDS[size]
    return {
        "pixel_values": noise(seed, 1, 3, height * patch, width * patch),
        "image_sizes": torch.tensor([[height * patch, width * patch]]),
    }


def _tiled(model: PreTrainedModel, size: int, seed: int) -> Inputs:
    side = number(model.config.vision_config.image_size)
    tall = size == 1
    return {
        "pixel_values": noise(seed, 1, 3, 3, side, side),
        "image_sizes": torch.tensor([[2 * side, side] if tall else [side, 2 * side]]),
    }


def _patches_chw(model: PreTrainedModel, size: int, seed: int) -> Inputs:
    grid, patch = GRIDS[size], number(model.config.vision_config.patch_size)
    count = grid[0] * grid[1] * grid[2]
    return {"pixel_values": noise(seed, count, 3, patch, patch), "image_grid_thw": torch.tensor([grid])}


def _merged(model: PreTrainedModel, size: int, seed: int) -> Inputs:
    return {**_picture(model, size, seed), "image_merge_sizes": torch.tensor([2])}


_PICTURES: dict[str, Callable[[PreTrainedModel, int, int], Inputs]] = {
    "Mistral3ForConditionalGeneration": _pixtral,
    "LightOnOcrForConditionalGeneration": _pixtral,
    "MistralLarge4ForConditionalGeneration": _pixtral,
    "LlavaNextForConditionalGeneration": _tiled,
    "LlavaNextVideoForConditionalGeneration": _tiled,
    "LlavaOnevisionForConditionalGeneration": _tiled,
    "PaddleOCRVLForConditionalGeneration": _patches_chw,
    "Kimi_K25ForConditionalGeneration": _patches_chw,
    "VideoLlama3ForConditionalGeneration": _merged,
}


def _sound(model: PreTrainedModel, size: int, seed: int) -> Inputs:
    audio = sub_config(model, "audio_config", "encoder_config", "speech_encoder", "encoder")
    mels = first_of(
        audio,
        "num_mel_bins",
        "n_mel_bins",
        "input_feat_per_channel",
        "feature_projection_input_dim",
        "input_dim",
        default=16,
    )
    wanted = inspect.signature(model.forward).parameters
    name = type(model).__name__
    frames = 2 * audio.max_source_positions if name in _FULL_LENGTH else FRAMES[size]
    if "input_values" in wanted and "input_features" not in wanted:
        return {"input_values": noise(seed, 1, 100 * frames)}
    shape = (1, frames, mels) if name in _TIME_FIRST else (1, mels, frames)
    result = {"input_features": noise(seed, *shape)}
    for mask in ("input_features_mask", "feature_attention_mask"):
        # Granite Speech's counts encoded tokens; without it all are heard.
        if mask in wanted and not name.startswith("GraniteSpeech"):
            result[mask] = torch.ones(1, frames, dtype=torch.long)
    return result


_FULL_LENGTH = {
    "AudioFlamingo3ForConditionalGeneration",
    "MusicFlamingoForConditionalGeneration",
    "Qwen2AudioForConditionalGeneration",
    "VoxtralForConditionalGeneration",
    "WhisperForConditionalGeneration",
}
_TIME_FIRST = {
    "CanaryForConditionalGeneration",
    "CohereAsrForConditionalGeneration",
    "FunAsrNanoForConditionalGeneration",
    "GraniteSpeechForConditionalGeneration",
    "GraniteSpeechPlusForConditionalGeneration",
    "Nemotron3_5TranscribeForConditionalGeneration",
    "SeamlessM4TForSpeechToText",
    "SeamlessM4Tv2ForSpeechToText",
    "Speech2TextForConditionalGeneration",
}
_SOUNDS: dict[str, Callable[[PreTrainedModel, int, int], Inputs]] = {
    "Pop2PianoForConditionalGeneration": lambda model, size, seed: {
        "input_features": noise(seed, 1, FRAMES[size], model.config.d_model)
    },
    "FunAsrNanoForConditionalGeneration": lambda model, size, seed: {
        "input_features": noise(seed, 1, FRAMES[size], 7 * 16),
        "input_features_mask": torch.ones(1, FRAMES[size], dtype=torch.long),
    },
    "Qwen3ASRForConditionalGeneration": lambda model, size, seed: {
        "input_features": noise(seed, 1, 16, 100 + 100 * (size == 1)),
        "input_features_mask": torch.ones(1, 100 + 100 * (size == 1), dtype=torch.long),
    },
    "VoxtralRealtimeForConditionalGeneration": lambda model, size, seed: {
        "input_features": noise(seed, 1, 16, 400 + 80 * size)
    },
    "SpeechEncoderDecoderModel": lambda model, size, seed: {"input_values": noise(seed, 1, 200 * FRAMES[size])},
    "VibeVoiceAsrForConditionalGeneration": lambda model, size, seed: {
        "input_values": noise(seed, 1, 1, 3200 * (size + 1)),
    },
}
_COUNTS: dict[str, Callable[[PreTrainedModel, Inputs], int]] = {
    "VoxtralRealtimeForConditionalGeneration": lambda model, inputs: 0,
    "FuyuForCausalLM": lambda model, inputs: inputs["image_patches"].shape[1],
    "Qwen2AudioForConditionalGeneration": lambda model, inputs: (inputs["input_features"].shape[2] // 2 - 2) // 2 + 1,
    "MusicFlamingoForConditionalGeneration": lambda model, inputs: inputs["input_features"].shape[2] // 4,
    "BlipForConditionalGeneration": lambda model, inputs: 0,
    "GitForCausalLM": lambda model, inputs: 0,
    "UdopForConditionalGeneration": lambda model, inputs: 0,
    "IdeficsForVisionText2Text": lambda model, inputs: 0,
    "MllamaForConditionalGeneration": lambda model, inputs: 1,
    "Kosmos2ForConditionalGeneration": lambda model, inputs: model.config.latent_query_num,
    "InstructBlipVideoForConditionalGeneration": lambda model, inputs: 4 * model.config.num_query_tokens,
}
WHOLE: dict[str, Callable[[PreTrainedModel, int, int, int], Inputs]] = {}
SINGLE: set[str] = set()
# They take pictures or sounds too, in layouts that aren't made here.
TEXT_ALONE = {
    "DiffusionGemmaForBlockDiffusion",
    "GraniteDoclingForConditionalGeneration",
    "Inkling2ForConditionalGeneration",
    "InklingForConditionalGeneration",
    "Molmo2ForConditionalGeneration",
    "MiniCPMOcrForConditionalGeneration",
    "MiniCPMV4_6ForConditionalGeneration",
    "MiniCPMV4_7ForConditionalGeneration",
    "MossTranscribeDiarizeForConditionalGeneration",
    "Phi4MultimodalForCausalLM",
}
_PICTURE_ALONE = {"VisionEncoderDecoderModel", "PPFormulaNetForConditionalGeneration"}


def _mllama(model: PreTrainedModel, size: int, seed: int) -> Inputs:
    vision = model.config.vision_config
    side, tiles = vision.image_size, vision.max_num_tiles
    mask = torch.zeros(1, 1, tiles, dtype=torch.long)
    mask[..., 0] = 1
    return {
        "pixel_values": noise(seed, 1, 1, tiles, 3, side, side),
        "aspect_ratio_ids": torch.tensor([[1]]),
        "aspect_ratio_mask": mask,
    }


_PICTURES["MllamaForConditionalGeneration"] = _mllama


def _gemma4(model: PreTrainedModel, size: int, seed: int) -> Inputs:
    patch, (_, height, width) = number(model.config.vision_config.patch_size), ((1, 6, 6), (1, 3, 6), (1, 6, 3))[size]
    if "Unified" in type(model).__name__:
        patch *= 3
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(-1)[None]
    room = 36 - height * width
    pad = torch.nn.functional.pad
    return {
        "pixel_values": pad(noise(seed, 1, height * width, 3 * patch * patch), (0, 0, 0, room)),
        "image_position_ids": pad(places, (0, 0, 0, room), value=-1),
    }


def _emu3(model: PreTrainedModel, size: int, seed: int) -> Inputs:
    height, width = ((8, 16), (8, 8), (16, 8))[size]
    return {"pixel_values": noise(seed, 1, 3, height, width), "image_sizes": torch.tensor([[height, width]])}


def _fuyu(model: PreTrainedModel, size: int, seed: int) -> Inputs:
    return {"image_patches": noise(seed, 1, 6, 3 * number(model.config.patch_size) ** 2)}


def _pix2struct(model: PreTrainedModel, length: int, size: int, seed: int) -> Inputs:
    patch, (_, height, width) = 8, GRIDS[size]
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width))[None] + 1.0
    patches = torch.cat([places, noise(seed, 1, height * width, 3 * patch * patch)], -1)
    return {"flattened_patches": patches, "attention_mask": torch.ones(1, height * width, dtype=torch.long)}


def _codebooks(model: PreTrainedModel, length: int, size: int, seed: int) -> Inputs:
    shape = (model.config.num_codebooks, length)
    return {"input_ids": torch.randint(10, 220, shape, generator=torch.Generator().manual_seed(seed))}


WHOLE["MusicgenForCausalLM"] = WHOLE["MusicgenMelodyForCausalLM"] = _codebooks
SINGLE |= {"MusicgenForCausalLM", "MusicgenMelodyForCausalLM"}
# Its step mixes the rows of a batch: what eager gives them together isn't the model's answer to any of them, and its
# bundle refuses more than one. Two prompts of different lengths check it.
SINGLE.add("RwkvForCausalLM")
WHOLE["Pix2StructForConditionalGeneration"] = _pix2struct
_PICTURES["Gemma4ForConditionalGeneration"] = _PICTURES["Gemma4UnifiedForConditionalGeneration"] = _gemma4
_PICTURES["Emu3ForConditionalGeneration"] = _emu3
_PICTURES["FuyuForCausalLM"] = _fuyu
_PICTURES["IdeficsForVisionText2Text"] = lambda model, size, seed: {
    "pixel_values": noise(seed, 1, 1, 3, model.config.vision_config.image_size, model.config.vision_config.image_size)
}


def finished(model: PreTrainedModel, inputs: Inputs, media: Media) -> Inputs:
    """`inputs` with what depends on the whole prompt."""
    name = type(model).__name__
    length = inputs["input_ids"].shape[1]
    if name.startswith("Kosmos2"):
        return {**inputs, "image_embeds_position_mask": inputs["input_ids"] == media.placeholder}
    if name == "MllamaForConditionalGeneration":
        tiles = torch.zeros(1, length, 1, model.config.vision_config.max_num_tiles, dtype=torch.long)
        tiles[..., 0] = 1
        return {**inputs, "cross_attention_mask": tiles}
    if name == "IdeficsForVisionText2Text":
        return {**inputs, "image_attention_mask": torch.ones(1, length, 1, dtype=torch.long)}
    if name == "UdopForConditionalGeneration":
        boxes = torch.rand(1, length, 4, generator=torch.Generator().manual_seed(length))
        return {**inputs, "bbox": boxes.sort(-1).values}
    return inputs


CLIPS = ((2, 4, 4), (3, 4, 4), (2, 4, 8))


def clip(model: PreTrainedModel, size: int, seed: int) -> Media:
    """A clip for `model`: frames in packed patches with their grid, or as pictures."""
    wanted = inspect.signature(model.forward).parameters
    vision = sub_config(model, "vision_config")
    token = placeholder(model, "video")
    if "video_grid_thw" not in wanted:
        side = number(first_of(vision, "image_size", default=32))
        frames = 8 if "VideoLlava" in type(model).__name__ else 2 + size
        inputs: Inputs = {"pixel_values_videos": noise(seed, 1, frames, 3, side, side)}
        return Media(inputs, [token] * rows(features_of(model, "get_video_features", inputs)), token)
    time, height, width = CLIPS[size]
    patch, pieces = number(vision.patch_size), number(vision.temporal_patch_size)
    inputs = {
        "pixel_values_videos": noise(seed, time * height * width, 3 * pieces * patch * patch),
        "video_grid_thw": torch.tensor([[time, height, width]]),
    }
    if "second_per_grid_ts" in wanted:
        inputs["second_per_grid_ts"] = torch.tensor([1.0 + size / 2])
    count = rows(features_of(model, "get_video_features", inputs)) // time
    tokens = [token] * count * time
    if name_of_time(model):
        # A time before each frame, between marks.
        tokens = [part for frame in range(time) for part in (20 + frame, 248, *[token] * count, 249)]
    return Media(inputs, tokens, token)


def name_of_time(model: PreTrainedModel) -> bool:
    """Whether prompts name each frame's time instead of counting it among the positions."""
    return type(model).__name__.startswith(("Qwen3VL", "Qwen3_5"))
