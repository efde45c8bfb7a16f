"""A default config made tiny by the names of its fields, and random weights with clear greedy choices."""

import dataclasses
import re
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 256
HIDDEN = 64
HEADS = 4
HEAD = 16
WINDOW = 8
LENGTH = 256
PAD, BOS, EOS = 0, 1, 2
_FIRST_SPECIAL = 224  # placeholders and boundaries; prompts are made of ids below

# The first pattern that matches a field's whole name decides. "=N": N; "<N": N at most.
_RULES: list[tuple[str, str]] = [
    (r"(.*_)?(pos_emb_height|pos_emb_width)", "<8"),
    (r"max_source_positions", "=64"),
    (r"fullatt_block_indexes|deepstack_visual_indexes|global_attn_indexes", "layers 0"),
    (r"window_size", "window"),
    (r"num_position_embeddings|position_embedding_size", "=64"),
    (r".*per_layer_input_vocab.*|vocab_size_per_layer_input", f"={VOCABULARY}"),
    (r"type_vocab_size|vocoder_.*|task_type_vocab_size", "<16"),
    (r"(.*_)?vocab_size(_.*)?|n_vocab|num_embeds|codebook_size", f"={VOCABULARY}"),
    (
        r"(.*_)?(max_position_embeddings|n_positions|n_ctx|max_source_positions|max_target_positions|model_max_length"
        r"|max_seq_len|max_sequence_length|context_length|max_speech_positions|max_text_positions|max_length"
        r"|max_2d_position_embeddings)",
        f"={LENGTH}",
    ),
    (r"original_max_position_embeddings", "=128"),
    (r"(.*_)?(num_key_value_heads|num_kv_heads|kv_n_heads|n_kv_heads)", "kv"),
    (r"index_n_heads", "<16"),  # of a few, often none fires: tokens that score 0 tie
    (r"index_head_dim", "<16"),
    (r"index_topk", "<4"),
    (r"qk_rope_head_dim", "=8"),
    (r"qk_nope_head_dim", "=8"),
    (r"qk_head_dim|v_head_dim", f"={HEAD}"),
    (r"(kv|q|o)_lora_rank", "<16"),
    (r"(.*_)?(head_dim|d_kv|kv_channels|attention_head_size|d_head|dim_head|mamba_headdim|mamba_d_head)", f"={HEAD}"),
    (r"query_pre_attn_scalar", f"={HEAD}"),
    (r"rotary_dim", f"={HEAD // 2}"),
    (r"linear_num_key_heads", "=2"),
    (r"linear_num_value_heads", "=4"),
    (r"mamba_(num|n)_heads|n_mamba_heads", "mamba heads"),
    (r"n_groups|mamba_n_?groups|ngroups", "<2"),
    (r"(.*_)?(num_heads|n_heads?|attention_heads|num_linear_heads)(_per_layer)?", f"={HEADS}"),
    (r"(.*_)?(mamba_d_state|ssm_state_size|state_size|state_dim|mamba_d_ssm)", "<16"),
    (r"(.*_)?(time_step_rank|mamba_dt_rank)", "<8"),
    (r"(.*_)?chunk_size", "<8"),
    (r"num_(local_)?experts|n_routed_experts|moe_num_experts|num_experts_per_layer", "<4"),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k", "<2"),
    (r"n_group|num_expert_group", "<2"),
    (r"topk_group", "<1"),
    (r".*n_shared_experts|moe_num_shared_experts|num_shared_experts", "<1"),
    (r"first_k_dense_replace|num_dense_layers", "<1"),
    (r"num_kv_shared_layers", "<0"),
    (
        r"(.*_)?(sliding_window|window_size|attention_window_size|local_attention|attention_window)(_size)?",
        f"<{WINDOW}",
    ),
    (r"attention_chunk_size", f"<{WINDOW}"),
    (
        r"(num_hidden|num|encoder|decoder|n|.*_num_hidden|.*_encoder|.*_decoder)_layers?|depth|n_layer|num_layers|layers|.*_depth",
        "<2",
    ),
    (
        r"(.*_)?(intermediate_size|ffn_dim|d_ff|ffn_hidden_size|mlp_dim|dff|dim_ff|d_inner|feed_forward_size"
        r"|intermediate_size_mlp|intermediate_dim)",
        "<96",
    ),
    (
        r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|embedding_size|projection_dim|output_dim|word_embed_proj_dim"
        r"|hidden_dim|emb_dim|embedding_dim|lru_width|dim|out_hidden_size|projector_hidden_size|input_dim|encoder_dim"
        r"|decoder_dim|d_kv_model|mm_embed_dim|output_proj_dims|backbone_hidden_size|text_hidden_size)",
        f"<{HIDDEN}",
    ),
    (r"num_mel_bins|n_mel_bins|input_feat_per_channel|input_feat_size|mel_bins", "<16"),
    (r"image_size", "image"),
    (r"patch_size", "<8"),
    (r"crop_size|resolution", "=32"),
]
_COMPILED = [(re.compile(pattern), action) for pattern, action in _RULES]
_TOKEN = re.compile(
    r".*(token_id|token_index|token_ids|_token)|(boi|eoi|boa|eoa|im_start|im_end|im_newline|codec_.*|tts_.*)_id"
)
_CROSS = re.compile(r"encoder_attn|cross_attn|EncDecAttention|crossattention|encoder_decoder_attention")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "num_decoder_layers")
_SKIPPED = {"id2label", "label2id", "transformers_version", "architectures", "dtype", "per_layer_config"}


class TokenIds:
    """Hands out ids inside the vocabulary: the same for a name wherever it is in a config tree."""

    def __init__(self) -> None:
        self._given: dict[str, int] = {}

    def place(self, name: str, value: Any, config: PreTrainedConfig) -> Any:
        """The id for field `name` whose default is `value`."""
        if isinstance(value, list | tuple):
            return (
                [EOS] if name == "eos_token_id" else [self.place(f"{name}.{i}", v, config) for i, v in enumerate(value)]
            )
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            return value
        for other, token in (("pad_token_id", PAD), ("bos_token_id", BOS), ("eos_token_id", EOS)):
            if name == other:
                return token
        if "start_token_id" in name or name == "sep_token_id":
            for other, token in (("pad_token_id", PAD), ("bos_token_id", BOS), ("eos_token_id", EOS)):
                if getattr(config, other, None) == value:
                    return token
        key = name.replace("token_index", "token_id")
        return self._given.setdefault(key, _FIRST_SPECIAL + len(self._given))


def shrink(config: PreTrainedConfig, special: dict[str, dict[str, Any]], tokens: TokenIds) -> PreTrainedConfig:
    """A tiny config of the same type; `special` has per model type what the names of fields can't tell."""
    own = special.get(config.model_type, {})
    fields = _fields(config)
    layers = _kept_layers(config, fields)
    result: dict[str, Any] = {}
    for name, value in fields.items():
        if name == "vision_config" and value is None:
            value = type(config).sub_configs_defaults[name].default_config
        if isinstance(value, PreTrainedConfig):
            result[name] = shrink(value, special, tokens)
        elif name in own:
            result[name] = own[name]
        elif _TOKEN.fullmatch(name):
            result[name] = tokens.place(name, value, config)
        elif layers and name in _LAYER_COUNTS and value == layers[0]:
            result[name] = len(layers[1])
        elif layers and isinstance(value, list | tuple) and len(value) == layers[0]:
            result[name] = [value[index] for index in layers[1]]
        elif name in ("rope_parameters", "rope_scaling"):
            result[name] = value
        else:
            result[name] = _shrunk_value(config, name, value)
    result.update({name: value for name, value in own.items() if name not in result})
    if isinstance(result.get("rope_parameters"), dict) and "rope_parameters" not in own:
        result["rope_parameters"] = _shrunk_rope(result["rope_parameters"], result.get("head_dim") or HEAD)
    return type(config)(**result)


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The values of a config's own fields, by the names that its constructor takes."""
    found = {}
    for name in (field.name for field in dataclasses.fields(config)):
        if name in _SKIPPED or name.startswith("_"):
            continue
        # Some read through other names; one that is different in each layer can't be read by getattr.
        if name in vars(config):
            found[name] = vars(config)[name]
        elif hasattr(config, name):
            found[name] = getattr(config, name)
    return found


def _kept_layers(config: PreTrainedConfig, fields: dict[str, Any]) -> tuple[int, list[int]] | None:
    """The default's number of layers, and a choice of them that has every kind the default has."""
    count = next((fields[name] for name in _LAYER_COUNTS if isinstance(fields.get(name), int)), None)
    if count is None:
        return None
    lists = [
        value for value in fields.values() if isinstance(value, list | tuple) and len(value) == count and count > 1
    ]
    lists = [value for value in lists if len({str(item) for item in value}) <= 4]
    if not lists:
        return None
    kept: list[int] = []
    seen: set[tuple[int, str]] = set()
    for index in range(count):
        new = {(number, str(value[index])) for number, value in enumerate(lists)} - seen
        if new:
            kept.append(index)
            seen |= new
    if len(kept) < 2:
        kept.append(next(index for index in range(count) if index not in kept))
    return count, sorted(kept)


def _shrunk_value(config: PreTrainedConfig, name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | list | tuple):
        return value
    for pattern, action in _COMPILED:
        if pattern.fullmatch(name):
            if action == "layers 0":
                return [0]
            if isinstance(value, list | tuple):
                return type(value)(_acted(config, action, item) if isinstance(item, int) else item for item in value)
            return _acted(config, action, value)
    return value


def _acted(config: PreTrainedConfig, action: str, value: int) -> int:
    if action == "kv":
        fields = _fields(config)
        heads = fields.get("num_attention_heads") or fields.get("num_heads") or fields.get("n_heads")
        return 1 if value == 1 else HEADS if value == heads else HEADS // 2
    if action == "mamba heads":
        expand = next((getattr(config, name) for name in ("mamba_expand", "expand") if hasattr(config, name)), 2)
        return int(HIDDEN * expand) // HEAD
    if action == "window":  # pixels in a vision tower with patches, else tokens
        return (
            32
            if value > 64 and "patch_size" in _fields(config)
            else min(value, 4 if "patch_size" in _fields(config) else WINDOW)
        )
    if action == "image":
        return 32
    if action.startswith("<"):
        return min(value, int(action[1:]))
    return int(action[1:])


def _shrunk_rope(rope: dict[str, Any], head: int) -> dict[str, Any]:
    """Rotary parameters for heads of `head` dimensions; per kind of layer where the default is."""
    if any(isinstance(value, dict) for value in rope.values()):
        return {name: _shrunk_rope(value, head) if isinstance(value, dict) else value for name, value in rope.items()}
    result = dict(rope)
    if result.get("original_max_position_embeddings"):
        result["original_max_position_embeddings"] = 128
    partial = result.get("partial_rotary_factor")
    if partial is not None and partial < 0.5:
        result["partial_rotary_factor"] = partial = 0.5
    half = int(head * (partial or 1.0)) // 2
    for name in ("long_factor", "short_factor"):
        if isinstance(result.get(name), list):
            result[name] = result[name][:half]
    sections = result.get("mrope_section")
    if sections:
        small = [max(1, size * half // sum(sections)) for size in sections]
        small[0] += half - sum(small)
        result["mrope_section"] = small
    return result


def token_ids(config: PreTrainedConfig) -> set[int]:
    """Every id that a field of the config tree names."""
    found: set[int] = set()
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            found |= token_ids(value)
        elif _TOKEN.fullmatch(name):
            found |= {
                item for item in (value if isinstance(value, list) else [value]) if type(item) is int and item >= 0
            }
    return found


def output_head(model: Any) -> torch.nn.Module | None:
    """The module that gives logits, None for a model (or None) that names none."""
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def spread_weights(model: PreTrainedModel, seed: int) -> None:
    """Scale the random weights so that activations keep their size and logits spread over several units."""
    generator = torch.Generator().manual_seed(seed + 1)
    convolutions = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d)
    }
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    head = output_head(model)
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all() or (parameter.abs() > 1e4).any():
            parameter.normal_(0, 0.1, generator=generator)  # left uninitialised by the class
        if parameter.dim() < 2:
            # A gate that starts closed would hide the pictures behind it.
            if parameter.numel() and re.search(r"gate|alpha|layer_scale", name) and (parameter == 0).all():
                parameter.fill_(0.5)
            continue
        spread, mean = float(parameter.std()) if parameter.numel() > 1 else 0.0, float(parameter.mean().abs())
        if spread == 0 and mean == 0:
            parameter.normal_(0, 0.1, generator=generator)
            continue
        if spread == 0 or mean > spread:
            continue  # decay rates and the like have values of their own
        if id(parameter) in embeddings:
            # Some multiply embeddings by their width's root; tied to the head, those would repeat the last token.
            scaled = getattr(model.config, "scale_embedding", False) or model.config.is_encoder_decoder
            wanted = 0.1 if scaled else 0.3
        elif head is not None and parameter is getattr(head, "weight", None):
            wanted = 0.4
        else:
            fan = parameter[0].numel() if id(parameter) in convolutions else parameter.shape[-1]
            wanted = 1.2 / fan**0.5
        if _CROSS.search(name):
            wanted *= 3  # what the decoder says shall depend on the encoder
        parameter.mul_(wanted / spread)


def rescale(model: PreTrainedModel, *, embeddings: float, layers: float) -> None:
    """Multiply token embeddings that the head shares, and every linear layer but the head."""
    shared = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    head = getattr(output_head(model), "weight", None)
    if head is not None and id(head) in shared:
        head.mul_(embeddings)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.weight is not head:
            module.weight.mul_(layers)
