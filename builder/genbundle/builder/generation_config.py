"""What a model's generation config asks for, in the runtime's terms; what the runtime can't replay is an error."""

import copy
from typing import Any

from genbundle.builder.prefix import describe_prefix
from genbundle.bundles import UnsupportedModelError
from genbundle.bundles.manifest import Generation

# Options of a generation config that the runtime replays, by their name there.
_REPLAYED = {
    "max_new_tokens": "max_new_tokens",
    "max_length": "max_length",
    "min_new_tokens": "min_new_tokens",
    "min_length": "min_length",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size": "encoder_no_repeat_ngram_size",
    "bad_words_ids": "bad_words_ids",
    "forced_bos_token_id": "forced_bos_token_id",
    "forced_eos_token_id": "forced_eos_token_ids",
    "suppress_tokens": "suppress_tokens",
    "begin_suppress_tokens": "begin_suppress_tokens",
    "do_sample": "do_sample",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "stop_strings": "stop",
    "return_timestamps": "return_timestamps",
}
# Options that change which tokens are generated and that the runtime doesn't know, with the values that mean "off".
_NOT_REPLAYED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "constraints": (),
    "force_words_ids": (),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "guidance_scale": (1.0,),
    "sequence_bias": (),
    "encoder_repetition_penalty": (1.0,),
    "exponential_decay_length_penalty": (),
    "token_healing": (False,),
    "num_return_sequences": (1,),
    "max_time": (),
    "watermarking_config": (),
    "top_h": (),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0, 1.0),
    "eta_cutoff": (0.0, 1.0),
}


def greedy_config(model: Any, **settings: Any) -> Any:
    """A copy of the model's generation config that takes the most probable token each time, with `settings`."""
    config = copy.deepcopy(model.generation_config)
    config.update(do_sample=False, temperature=None, top_k=None, top_p=None, min_p=None, num_beams=1, **settings)
    return config


def _decoder_start(model: Any) -> int | None:
    """The token that an encoder-decoder's own sequences begin with, as generate chooses it; None for other models."""
    if not model.config.is_encoder_decoder:
        return None
    config = model.generation_config
    start = config.decoder_start_token_id if config.decoder_start_token_id is not None else config.bos_token_id
    if not isinstance(start, int):
        raise UnsupportedModelError(f"decoder_start_token_id is {start!r}: one token for all sequences is needed")
    return start


def describe_generation(model: Any) -> Generation:
    """What the model's generation config asks for, in the runtime's terms.

    Raises:
        UnsupportedModelError: it asks for something that changes the tokens and that the runtime doesn't replay.
    """
    config = model.generation_config
    values = {name: value for name, value in config.to_dict().items() if value is not None}
    for name, off in _NOT_REPLAYED.items():
        if name in values and values[name] not in off:
            raise UnsupportedModelError(
                f"the model's generation config asks for {name}={values[name]!r}, which the runtime doesn't replay: "
                f"set model.generation_config.{name} = None to build without it"
            )
    defaults = config._get_default_generation_params()
    options = {
        ours: [value] if name == "stop_strings" and isinstance(value, str) else value
        for name, ours in _REPLAYED.items()
        if (value := values.get(name)) is not None and value != defaults.get(name)
    }
    prefix, timestamps = describe_prefix(model)
    chosen = {item.option: values[item.option] for item in prefix if item.option and item.option in values}
    eos = config.eos_token_id
    eos = [] if eos is None else [eos] if isinstance(eos, int) else eos
    return Generation(
        eos_token_ids=tuple(int(token) for token in eos),
        # Without one, generate and the runtime fall back to the end token that holds in that call.
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        decoder_start_token_id=_decoder_start(model),
        options={**options, **chosen},
        prefix=prefix,
        timestamps=timestamps,
    )
