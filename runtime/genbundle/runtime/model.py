"""A loaded bundle: text, messages, pictures or arrays in, a `Generation` or a stream of `Chunk`s out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from genbundle.bundles import Bundle, InputError
from genbundle.runtime.generate import Clock, Generation, Step, Stop, Timings, collect, steps
from genbundle.runtime.images import expand_placeholders, pictures_of, preprocess
from genbundle.runtime.inputs import TEXT_INPUTS, token_ids, token_mask
from genbundle.runtime.prefix import generation_inputs, generation_options, split_options
from genbundle.runtime.program import Backend
from genbundle.runtime.sampling import GenerationOptions
from genbundle.runtime.text import StopStrings, StreamDecoder, TextProcessor
from genbundle.runtime.wiring import Wiring


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One token of a stream: its id, the text that became certain with it, and on the last why the stream ended."""

    text: str
    token_id: int
    finish_reason: str | None = None
    timings: Timings | None = None


class Model:
    """A bundle opened on an engine. Each call stands for itself: nothing is kept from one to the next."""

    def __init__(self, bundle: Bundle, backend: Backend):
        self.bundle, self.backend = bundle, backend
        self.wiring = Wiring(bundle.manifest, backend)

    @cached_property
    def text(self) -> TextProcessor:
        """The tokenizer and chat template; InputError for a bundle without."""
        return TextProcessor(self.bundle)

    def generate(
        self,
        prompt: str | Sequence[Mapping[str, Any]] | Sequence[str] | None = None,
        *,
        images: Any = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Generation:
        """Generate from text, from chat messages, or from arrays (`input_ids=` and the model's other inputs).

        Args:
            prompt: text, a list of texts (a batch), or chat messages (`[{"role": "user", "content": ...}]`).
            images: pictures for the prompt's placeholders, in order: a path, bytes, a PIL image, a uint8 array
                `[height, width, 3]`, or a list of them. Messages may carry theirs: `{"type": "image", "image": ...}`
                takes the same, paths included; `{"type": "image_url", "image_url": {"url": ...}}` only `data:` URLs, so
                that messages of strangers in OpenAI's form can't name files here.
            chat_template_kwargs: what the model's chat template reads besides messages (`tools`, `enable_thinking`
                ...).
            **kwargs: the model's inputs as arrays, and the options in `genbundle.runtime.sampling.GenerationOptions`
                (`max_new_tokens`, `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`, `seed`,
                `stop` ...); what isn't given comes from the model's generation config.

        Returns:
            `sequences` equals what `PreTrainedModel.generate` returns for the same inputs and options.

        Raises:
            InputError: inputs or options that this bundle can't take; says what was given and what is accepted.
        """
        inputs, options = self._prepare(prompt, images, chat_template_kwargs, kwargs)
        watcher = self._stop_watcher(options, len(token_ids(inputs)))
        clock = Clock()
        taken, new = collect(self.wiring, inputs, options, watcher, clock)
        sequences = np.concatenate([token_ids(inputs), new], axis=1)
        return Generation(
            sequences=sequences,
            texts=self._texts(taken, new, options),
            finish_reasons=tuple(reason or "length" for reason in taken[-1].finish_reasons),
            timings=clock.timings(int(token_mask(inputs).sum(axis=1).max())),
        )

    def stream(
        self,
        prompt: str | Sequence[Mapping[str, Any]] | None = None,
        *,
        images: Any = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Iterator[Chunk]:
        """Generate one sequence and yield each token as it comes; arguments as for `generate`.

        The chunks' texts together are `generate(...).text`. Raises InputError before the first chunk.
        """
        inputs, options = self._prepare(prompt, images, chat_template_kwargs, kwargs)
        if len(token_ids(inputs)) != 1:
            raise InputError(f"a stream is one sequence, got a batch of {len(token_ids(inputs))}: use generate")
        return self._chunks(inputs, options)

    def _chunks(self, inputs: dict[str, np.ndarray], options: GenerationOptions) -> Iterator[Chunk]:
        decoder = StreamDecoder(self.text) if self.bundle.manifest.text is not None else None
        stops, clock = StopStrings(options.stop), Clock()
        stopped, shown = False, ""

        def stop(_row: int, token: int) -> bool:
            nonlocal stopped, shown
            shown, stopped = stops.feed(decoder.push(token) if decoder else "")
            return stopped

        prompt_tokens = int(token_mask(inputs).sum())
        for step in steps(self.wiring, inputs, options, stop=stop, clock=clock):
            token, reason = int(step.tokens[0]), step.finish_reasons[0]
            if reason == "eos":
                shown = ""
            if reason in ("eos", "length") and not stopped:
                rest, stopped = stops.feed(decoder.flush() if decoder else "")
                shown += rest + ("" if stopped else stops.flush())
            timings = clock.timings(prompt_tokens) if reason else None
            yield Chunk(text=shown, token_id=token, finish_reason=reason, timings=timings)

    def _prepare(
        self, prompt: Any, images: Any, variables: Mapping[str, Any] | None, kwargs: Mapping[str, Any]
    ) -> tuple[dict[str, np.ndarray], GenerationOptions]:
        """Inputs as arrays, and the options; a name that is neither is refused as an unknown option."""
        names = {*TEXT_INPUTS, *self.wiring.routes.user_inputs}
        arrays = {name: value for name, value in kwargs.items() if name in names}
        given = {name: value for name, value in kwargs.items() if name not in names}
        prefix, given = split_options(self.bundle.manifest.generation, given)
        options = generation_options(self.bundle.manifest.generation, given)
        if options.stop:
            self.text  # noqa: B018  stop strings need a tokenizer: say so now
        if prompt is not None:
            if "input_ids" in arrays:
                raise InputError("give a prompt or input_ids, not both")
            arrays |= self._encode(prompt, images, variables)
        elif images is not None:
            raise InputError("images belong to a prompt; with input_ids give the model's own inputs (pixel_values ...)")
        return generation_inputs(arrays, prefix, options, self.wiring), options

    def _encode(self, prompt: Any, images: Any, variables: Mapping[str, Any] | None) -> dict[str, np.ndarray]:
        """Token ids, mask and pixels for text, a list of texts or chat messages."""
        pictures = [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
        chat = (
            isinstance(prompt, Sequence)
            and not isinstance(prompt, str)
            and isinstance(next(iter(prompt), None), Mapping)
        )
        if chat:
            pictures = [*pictures_of(prompt), *pictures]
            prompt = self.text.apply_chat_template(prompt, **_variables(variables))
        elif variables:
            raise InputError("chat_template_kwargs belong to chat messages, and the prompt is text")
        texts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
            raise InputError(f"expected a text, a list of texts or chat messages, got {type(prompt).__name__}")
        inputs: dict[str, np.ndarray] = {}
        description = self.bundle.manifest.images
        if pictures and description is None:
            raise InputError(f"{self.bundle.path} takes no pictures")
        if description is not None and description.placeholder is not None:
            texts = _expand(texts, len(pictures), description)
        if pictures and description is not None:
            inputs[description.input] = preprocess(pictures, description)
        rows = [self.text.encode_chat(text) if chat else self.text.encode(text) for text in texts]
        if not all(rows):
            raise InputError("the prompt has no tokens: give some text")
        return {**inputs, **self._padded(rows)}

    def _padded(self, rows: list[list[int]]) -> dict[str, np.ndarray]:
        text, generation = self.bundle.manifest.text, self.bundle.manifest.generation
        candidates = (text.padding_token_id if text else None, generation.pad_token_id, *generation.eos_token_ids, 0)
        pad = next(candidate for candidate in candidates if candidate is not None)
        longest = max(map(len, rows))
        ids = [[pad] * (longest - len(row)) + row for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        return {"input_ids": np.array(ids, np.int64), "attention_mask": np.array(mask, np.int64)}

    def _stop_watcher(self, options: GenerationOptions, batch: int) -> Stop | None:
        if not options.stop:
            return None
        rows = [(StreamDecoder(self.text), StopStrings(options.stop)) for _ in range(batch)]

        def stop(row: int, token: int) -> bool:
            decoder, stops = rows[row]
            return stops.feed(decoder.push(token))[1]

        return stop

    def _texts(self, taken: list[Step], new: np.ndarray, options: GenerationOptions) -> tuple[str, ...]:
        if self.bundle.manifest.text is None:
            return ()
        texts = []
        for row, reason in enumerate(taken[-1].finish_reasons):
            ended = next((index for index, step in enumerate(taken) if step.finish_reasons[row]), len(taken) - 1)
            text = self.text.decode(new[row, : ended + (reason != "eos")].tolist())
            if reason == "stop":
                shown, stopped = StopStrings(options.stop).feed(text)
                text = shown if stopped else text
            texts.append(text)
        return tuple(texts)


def _variables(given: Any) -> dict[str, Any]:
    """What the caller gives the chat template; InputError for what can't be that."""
    mapping = given is None or (isinstance(given, Mapping) and all(isinstance(name, str) for name in given))
    if not mapping or "messages" in (given or ()):
        raise InputError(f"chat_template_kwargs: expected names with values, without 'messages', got {given!r:.80}")
    return dict(given or {})


def _expand(texts: Sequence[str], pictures: int, description: Any) -> list[str]:
    """The texts with their picture placeholders expanded; all of them together stand for all of the pictures."""
    counts = [text.count(description.placeholder) for text in texts]
    if sum(counts) != pictures:
        raise InputError(
            f"the prompt has {sum(counts)} picture placeholders ({description.placeholder}), {pictures} pictures were "
            "given"
        )
    return [expand_placeholders(text, count, description) for text, count in zip(texts, counts, strict=True)]
