"""Text to token ids and back: the tokenizer, the chat template, decoding as tokens arrive, stop strings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genbundle.bundles import Bundle, BundleError, InputError
from genbundle.bundles.manifest import Text
from genbundle.runtime.templates import compile_template, describe, render

if TYPE_CHECKING:
    from jinja2 import Template

# What a decoder writes for bytes that aren't (yet) a character.
_INCOMPLETE = "\ufffd"
# An unfinished character is at most three tokens of one byte; more tokens than this held back are held for nothing.
_LONGEST_WAIT = 8
# The names that a message's reasoning goes by; templates read the first, a few the second.
_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
_EXAMPLE_MESSAGE = '{"role": "user", "content": "Hello"}'


class TextProcessor:
    """The tokenizer and chat template of a bundle; both are opened when they are first needed."""

    def __init__(self, bundle: Bundle):
        if bundle.manifest.text is None:
            raise InputError(f"{bundle.path} holds no tokenizer: give `input_ids` instead of text")
        self._open(bundle.manifest.text, bundle.path, chat_adds_special_tokens=bundle.manifest.images is not None)

    @classmethod
    def from_files(cls, text: Text, directory: Path, *, chat_adds_special_tokens: bool = False) -> TextProcessor:
        """The processor that `text` describes, with its files below `directory`; `__init__` takes a whole bundle."""
        processor = cls.__new__(cls)
        processor._open(text, directory, chat_adds_special_tokens=chat_adds_special_tokens)
        return processor

    def _open(self, text: Text, directory: Path, *, chat_adds_special_tokens: bool) -> None:
        from tokenizers import Tokenizer

        self.description = text
        self._chat_adds_special_tokens = chat_adds_special_tokens
        path = directory / text.tokenizer
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # nothing more specific, and for a panic in its Rust code no Exception at all
            raise BundleError(f"{path}: can't be read as a tokenizer: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.special_ids = frozenset(
            token_id for token_id, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self._template_path = None if text.chat_template is None else directory / text.chat_template
        self._template: Template | None = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of `text`, with what the model's tokenizer adds of its own (`<s>` ...) if wanted."""
        if not isinstance(text, str):
            raise InputError(f"expected text as a str, got {type(text).__name__}")
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError) as error:
            # A str that tokenizers takes for none can't be written as UTF-8.
            raise InputError("the text holds half of a surrogate pair, which is no character") from error
        except Exception as error:  # tokenizers raises nothing more specific: a word that it has no token for
            raise InputError(f"the model's tokenizer can't encode {text!r:.200}: {error}") from error

    def encode_chat(self, prompt: str) -> list[int]:
        """The token ids of a rendered chat template, with special tokens added exactly where transformers adds them.

        A tokenizer's template writes them all itself; a multimodal processor's text goes through the tokenizer as any
        other, unless the template has written the first one already.
        """
        bos = self.description.special_tokens.get("bos_token")
        written = bos is not None and prompt.startswith(bos)
        return self.encode(prompt, add_special_tokens=self._chat_adds_special_tokens and not written)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token `ids`; an id that the tokenizer lacks has none."""
        try:
            return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens)
        except Exception as error:  # tokenizers raises nothing more specific
            raise InputError(f"the model's tokenizer can't decode the tokens {list(ids)!r:.200}: {error}") from error

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Render `messages` with the model's chat template; `encode_chat` gives the ids of the result.

        Args:
            messages: mappings with `role` and `content` (text, or parts such as `{"type": "image"}`).
            add_generation_prompt: end with the words that begin the model's answer.
            variables: what else the template reads (`tools`, `enable_thinking` ...).

        Raises:
            InputError: the model has no chat template, or the template refuses the messages or fails.
        """
        if self._template_path is None:
            raise InputError("this model has no chat template: give the prompt as text instead of messages")
        if self._template is None:
            try:
                source = self._template_path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise BundleError(f"{self._template_path}: can't be read: {error}") from error
            self._template = compile_template(source)
        variables = {**self.description.special_tokens, **variables, "add_generation_prompt": add_generation_prompt}
        return _render(self._template, messages, variables)


class StreamDecoder:
    """Text as tokens arrive: each push gives the text that is certain by then.

    Decoders aren't local: a character may be spread over several tokens, and the first token of a sequence may lose its
    leading space. So each token is decoded together with the tokens that gave the text before it, and text that ends in
    half a character waits. The window is a few tokens long, whatever the length of the sequence.
    """

    def __init__(self, processor: TextProcessor):
        self._processor = processor
        # The window: tokens whose text is out (kept as context), and tokens whose text isn't.
        self._known: list[int] = []
        self._known_text = ""
        self._waiting: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that `token_id` makes certain, "" while a character is incomplete."""
        if token_id in self._processor.special_ids:
            return ""
        self._waiting.append(int(token_id))
        text = self._processor.decode(self._known + self._waiting)
        if len(self._waiting) > _LONGEST_WAIT:
            # Bytes that never become a character; the last three may still begin one.
            return self._emit(len(self._waiting) - 3)
        if text.endswith(_INCOMPLETE) or len(text) <= len(self._known_text):
            return ""
        return self._emit(len(self._waiting), text)

    def flush(self) -> str:
        """The rest: the text of an incomplete character, if the sequence ended in one."""
        return self._emit(len(self._waiting)) if self._waiting else ""

    def _emit(self, count: int, text: str | None = None) -> str:
        """Give out the text of the first `count` waiting tokens; they are the next token's context."""
        known, self._waiting = self._waiting[:count], self._waiting[count:]
        text = self._processor.decode(self._known + known) if text is None else text
        emitted = text[len(self._known_text) :]
        self._known, self._known_text = known, self._processor.decode(known)
        return emitted


class StopStrings:
    """Watches text for the strings that end a generation, holding back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]):
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise InputError(f"expected stop strings, none of them empty, got {stops!r}")
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """What may be shown after `text` arrived, and whether a stop string is complete (it is cut off then).

        Of several, the one that is complete first counts: the result doesn't depend on how the text was cut up.
        """
        held = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := held.find(stop)) >= 0]
        if found:
            self._held = ""
            return held[: min(found)[1]], True
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def flush(self) -> str:
        """What was held back, once it is certain that no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that a stop string begins with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


def _render(template: Template, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
    if isinstance(messages, Mapping | str) or not all(isinstance(message, Mapping) for message in messages):
        raise InputError(f"expected a list of messages such as {_EXAMPLE_MESSAGE}, got {messages!r:.200}")
    # Absent and None are one to most callers, but templates render the latter as the word "None".
    chat = [{key: item for key, item in message.items() if item is not None} for message in messages]
    if not all(isinstance(message.get("role"), str) for message in chat):
        raise InputError(f"expected messages with a role, such as {_EXAMPLE_MESSAGE}, got {messages!r:.200}")
    chat = [_with_reasoning(_with_image_parts(message)) for message in chat]
    values = {"tools": None, "documents": None, **variables, "messages": chat}
    try:
        return render(template, {name: _plain(value) for name, value in values.items()})
    except Exception as error:  # whatever a template does wrong surfaces as any exception at all
        raise InputError(f"the model's chat template fails on these messages: {describe(error)}") from error


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """A message's reasoning under each name that templates read it by."""
    reasoning = next((message[name] for name in _REASONING_NAMES if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """`value` as plain JSON types; anything else (a picture, an array) as its type's name: no method is reachable."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, np.generic):
        return _plain(value.item())
    for kind in (str, int, float):
        if isinstance(value, kind):  # a subclass may carry methods
            return getattr(kind, f"__{kind.__name__}__")(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return (tuple if isinstance(value, tuple) else list)(_plain(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return f"<{type(value).__name__}>"


def _with_image_parts(message: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's `image_url` parts as the `image` parts that templates look for."""
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return message
    parts = [
        {"type": "image"} if isinstance(part, Mapping) and part.get("type") == "image_url" else part for part in content
    ]
    return {**message, "content": parts}
