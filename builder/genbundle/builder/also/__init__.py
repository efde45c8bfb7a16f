"""Other runtimes that can open a bundle's directory: what each needs, checked before the export, and its files."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from genbundle.builder.also import ort_genai, transformers_js
from genbundle.builder.also.feeding import expect_options
from genbundle.builder.components import Component
from genbundle.builder.limits import Limits
from genbundle.builder.passes.last_tokens import take_last_tokens
from genbundle.builder.stock_runners import text_processor
from genbundle.bundles import BuildError, UnsupportedModelError
from genbundle.bundles.manifest import Flow, Generation, Manifest, Runner
from genbundle.runtime.questions import added_prefix
from genbundle.runtime.text import TextProcessor

EMBEDDED = "transformers.js"
"""The runtime that wants models of pictures with a decoder which takes embeddings."""
BACKEND = "cpu"
"""The one whose bundles were run there: neither runtime has been given a program for CUDA."""
_EXPECT: dict[str, Callable[[Iterable[Component], Flow], None]] = {
    "ort-genai": ort_genai.expect,
    "transformers.js": transformers_js.expect,
}
_LABELS = {"ort-genai": ort_genai.LABEL, "transformers.js": transformers_js.LABEL}
_OPTIONS = {"ort-genai": ort_genai.OPTIONS, "transformers.js": transformers_js.OPTIONS}
ALSO: tuple[str, ...] = tuple(_EXPECT)
"""The names that `build_bundle(also=...)` takes."""


def check_also(also: Sequence[str] | str, backend: str) -> tuple[str, ...]:
    """The runtimes asked for, each once; BuildError for an unknown one, or one that opens no bundles for `backend`."""
    names = tuple(dict.fromkeys([also] if isinstance(also, str) else also))
    for name in names:
        if name not in ALSO:
            raise BuildError(f"also: unknown runtime {name!r}: choose among {', '.join(ALSO)}")
        if backend != BACKEND:
            raise BuildError(
                f"also: {_LABELS[name]} opens bundles for the backend {BACKEND!r} only, not those for {backend!r}"
            )
    return names


def expect_generation(also: Collection[str], generation: Generation, limits: Limits) -> tuple[Runner, ...]:
    """The runtimes with what they do otherwise than the bundle says: when sampling, or in a batch.

    Raises UnsupportedModelError for what would change the most probable tokens: what the model's generation config
    asks for, or a length from which on its loop begins again.
    """
    runners = []
    for name in also:
        if limits.restart is not None:
            raise UnsupportedModelError(
                f"{_LABELS[name]} doesn't run the sequence again at {limits.restart} tokens, from which on the model "
                f"computes positions otherwise: build with a max_length of at most {limits.restart}"
            )
        differs = [*expect_options(_LABELS[name], generation.options, _OPTIONS[name])]
        if name == "ort-genai" and limits.window is not None:
            differs.append(ort_genai.window_note(limits.window))
        runners.append(Runner(name=_LABELS[name], differs=tuple(differs)))
    return tuple(runners)


def expect_fed(also: Collection[str], components: Iterable[Component], flow: Flow) -> None:
    """UnsupportedModelError for components that one of the runtimes can't feed, naming it and the cause."""
    components = list(components)
    for name in also:
        _EXPECT[name](components, flow)


def complete(
    also: Collection[str], manifest: Manifest, runners: Iterable[Runner], folder: Path, config: Any
) -> Manifest:
    """Write what the runtimes need beside the exported bundle in `folder`; the manifest with files moved for them.

    runners: as `expect_generation` gives them. config: the model's, in transformers.
    """
    differs: dict[str, list[str]] = {runner.name: list(runner.differs) for runner in runners}
    if manifest.flow.alone:
        for name, said in differs.items():
            said.append(f"{name} may be given several sequences, and this model's code takes one")
    if "ort-genai" in also:
        ort_genai.change_graphs(manifest, folder, take_last_tokens)
    if "transformers.js" in also:
        manifest, said = transformers_js.complete(manifest, folder, config)
        differs[transformers_js.LABEL] += said
    if "ort-genai" in also:
        ort_genai.complete(manifest, folder)
    runs = [Runner(name=name, differs=tuple(said)) for name, said in differs.items()]
    if manifest.text is not None:
        runs = [_with_prefix(runner, text_processor(manifest, folder)) for runner in runs]
    return replace(manifest, runners=(*manifest.runners, *runs))


def _with_prefix(runner: Runner, processor: TextProcessor) -> Runner:
    """GenAI's tokenizer adds no special tokens by itself, and knows those that a text holds."""
    if runner.name != ort_genai.LABEL:
        return runner
    prefix = added_prefix(processor)
    if prefix is not None:
        return replace(runner, prefix=prefix)
    behind = f"{runner.name} adds no special tokens to a text, and the bundle's tokenizer adds some behind it"
    return replace(runner, differs=(*runner.differs, behind))
