"""What runtimes with a generation loop of their own feed a decoder's program with, and what they can't."""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from genbundle.builder.components import Component
from genbundle.bundles import UnsupportedModelError
from genbundle.bundles.manifest import CAPACITY, Flow, Generation

# Options that count only when sampling: without them a runtime draws from another distribution, which is said.
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "seed")
# How many tokens to generate is for the caller to say.
_LENGTHS = ("max_new_tokens", "max_length")
_KEPT = re.compile(r"past_\d+_(key|value)")
_GROWING = ("past", CAPACITY)  # axes of keys and values that may be 0 long


def expect_decoder(label: str, component: Component, flow: Flow, *, entry: str = "input_ids") -> None:
    """UnsupportedModelError unless a loop of the usual kind can run `component` for prompt and step.

    Such a loop has the tokens or their embeddings (`entry`), the padding mask, positions that count unpadded tokens,
    and keys and values that grow from none.
    """
    last = {route.programs[-1] for route in flow.prompt} | {flow.step[-1]}
    if last != {component.name} or any(route.one_by_one for route in flow.prompt):
        raise UnsupportedModelError(
            f"{label} wants one program for prompt and step, and the model's are {', '.join(sorted(last))}"
            + (", token by token" if any(route.one_by_one for route in flow.prompt) else "")
        )
    for name, source in component.sources.items():
        if name == entry or source.kind in ("mask", "state"):
            continue
        if source.kind == "position":
            if source.rule != "cumsum" or source.options:
                raise UnsupportedModelError(
                    f"{label} counts positions over the unpadded tokens from 0, and {component.name} takes them by the "
                    f"rule {source.rule!r} with {dict(source.options)}"
                )
            continue
        raise UnsupportedModelError(f"{label} has nothing to feed the input {name!r} of {component.name} with")
    if component.least > 1:
        raise UnsupportedModelError(f"{label} has no other way for prompts of less than {component.least} tokens")
    for name, source in component.sources.items():
        if source.kind == "state":
            _expect_growing(label, component, name)


def _expect_growing(label: str, component: Component, name: str) -> None:
    """A layer's keys or values, which are `[batch, heads, length, width]`."""
    axes = component.axes.get(name, {})
    growing = axes.get(0) == "batch" and axes.get(2) in _GROWING and len(axes) == 2
    if _KEPT.fullmatch(name) is None or not growing:
        shape = [axes.get(axis, size) for axis, size in enumerate(component.sample[name].shape)]
        raise UnsupportedModelError(
            f"{label} carries each layer's keys and values, which grow, and {component.name} also {name} {shape}"
        )


def special_tokens(generation: Generation) -> dict[str, Any]:
    """The ids of the tokens that begin, end and pad a text, those that are known, in the names of transformers."""
    tokens = {
        "bos_token_id": generation.bos_token_id,
        "eos_token_id": list(generation.eos_token_ids) or None,
        "pad_token_id": generation.pad_token_id,
    }
    return {name: value for name, value in tokens.items() if value is not None}


def expect_options(label: str, options: Mapping[str, Any], known: Collection[str]) -> Iterator[str]:
    """Notes on sampling options of the model that a runtime doesn't know; UnsupportedModelError for other options."""
    for name in options:
        if name in known or name in _LENGTHS:
            continue
        if name not in _SAMPLING:
            raise UnsupportedModelError(
                f"{label} doesn't know {name}, which the model's generation config asks for: "
                f"set model.generation_config.{name} = None to build without it"
            )
        if options.get("do_sample"):
            yield f"{label} samples without the model's {name}={options[name]}, which it doesn't know"
