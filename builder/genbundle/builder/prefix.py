"""What a transcribing model's own generate puts before the first token: language, task, and if there shall be times.

After `WhisperGenerationMixin._retrieve_init_tokens`; the generation config holds all that it goes by.
"""

from typing import Any

from transformers import PreTrainedModel
from transformers.models.whisper.generation_whisper import WhisperGenerationMixin
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from genbundle.bundles import UnsupportedModelError
from genbundle.bundles.manifest import PrefixToken, Timestamps


def describe_prefix(model: PreTrainedModel) -> tuple[tuple[PrefixToken, ...], Timestamps | None]:
    """The prefix of the model's sequences and the tokens that are times; nothing for models whose generate has none."""
    if not isinstance(model, WhisperGenerationMixin):
        return (), None
    config: Any = model.generation_config
    languages, tasks = (getattr(config, name, None) or {} for name in ("lang_to_id", "task_to_id"))
    without = getattr(config, "no_timestamps_token_id", None)
    times = None
    if without is not None:
        latest = getattr(config, "max_initial_timestamp_index", None)
        times = Timestamps(first=without + 1, without=without, latest=latest)
    forced = _forced_tokens(model)
    if forced and forced[-1] == without:
        forced = forced[:-1]
    if not languages:
        return tuple(PrefixToken(default=token) for token in forced if token is not None), times
    language, task = [*forced, None, None][:2]
    known = language in (None, *languages.values()) and task in (None, *tasks.values())
    if len(forced) > 2 or not known:
        raise UnsupportedModelError(
            f"the generation config's forced_decoder_ids {forced} aren't a language and a task, unexplained"
        )
    choice = getattr(config, "is_multilingual", True)
    prefix = [
        PrefixToken(
            option="language" if choice else None, tokens=_language_names(languages), default=language, detect=True
        )
    ]
    if tasks:
        beside = {"language": tasks["transcribe"]} if "transcribe" in tasks else {}
        prefix.append(PrefixToken(option="task" if choice else None, tokens=dict(tasks), default=task, beside=beside))
    return tuple(prefix), times


def _forced_tokens(model: PreTrainedModel) -> list[int | None]:
    """The tokens that `forced_decoder_ids` puts after the start token."""
    pairs = getattr(model.generation_config, "forced_decoder_ids", None)
    pairs = pairs or getattr(model.config, "forced_decoder_ids", None) or []
    if [place for place, _ in pairs] != list(range(1, len(pairs) + 1)):
        raise UnsupportedModelError(f"the generation config's forced_decoder_ids {pairs} don't follow one another")
    return [token for _, token in pairs]


def _language_names(languages: dict[str, int]) -> dict[str, int]:
    """Every way to say a language that generate accepts: `<|en|>`, `en`, `english`."""
    names = dict(languages)
    for name, code in TO_LANGUAGE_CODE.items():
        if f"<|{code}|>" in languages:
            names |= {name: languages[f"<|{code}|>"], code: languages[f"<|{code}|>"]}
    return names
