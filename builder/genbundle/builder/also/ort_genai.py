"""ONNX Runtime GenAI: `genai_config.json`, with which it opens the bundle's directory as a text decoder.

Fields: https://github.com/microsoft/onnxruntime-genai/blob/main/src/config.h. It refuses those that it doesn't know.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import onnx_ir as ir

from genbundle.builder.also.feeding import expect_decoder, special_tokens
from genbundle.builder.components import Component
from genbundle.bundles import UnsupportedModelError
from genbundle.bundles.manifest import Flow, Manifest, Program

LABEL = "ONNX Runtime GenAI"
OPTIONS = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size", "min_length")
"""The options of a generation that its `search` has too, by the same names."""
CONFIG_NAME = "genai_config.json"
_MOST_TOKENS = 32768  # of a sequence where nothing limits it; memory is taken for what the caller asks for


def expect(components: Iterable[Component], flow: Flow) -> None:
    """UnsupportedModelError for what it can't run or feed."""
    components = list(components)
    others = [item.name for item in components if "encoder" in item.roles]
    if any(item.modality or "encoder" in item.roles or item.name == "merge" for item in components):
        raise UnsupportedModelError(
            f"{LABEL} has no generic type for models with encoders ({', '.join(others)}): each of its types for "
            "pictures and sound brings one family's own processor and positions"
        )
    decoder = next(item for item in components if item.name == flow.step[-1])
    expect_decoder(LABEL, decoder, flow)
    if not any(source.kind == "mask" for source in decoder.sources.values()):
        raise UnsupportedModelError(
            f"{LABEL} pads batches on the right, and {decoder.name} takes no mask that tells padding from tokens"
        )
    for name in (name for name, source in decoder.sources.items() if source.kind == "state"):
        keys, values = decoder.sample[name], decoder.sample[name.replace("_key", "_value")]
        if keys.shape != values.shape:
            raise UnsupportedModelError(
                f"{LABEL} takes keys and values of one size, and {name} has heads of {keys.shape[-1]}, its values of "
                f"{values.shape[-1]}"
            )


def window_note(window: int) -> str:
    """What to know of a model whose layers look back on so many tokens."""
    return (
        f"{LABEL} puts a batch's padding between prompt and answer: a shorter sequence of a batch looks back on fewer "
        f"tokens through the window of {window} there than alone"
    )


def change_graphs(manifest: Manifest, folder: Path, change: Callable[[ir.Model], bool]) -> None:
    """Apply a pass to the decoder's graph; UnsupportedModelError where it finds nothing to change."""
    file = folder / _decoder(manifest).file
    model = ir.load(file)
    if not change(model):
        raise UnsupportedModelError(
            f"{LABEL} pads batches on the right, and {_decoder(manifest).name} doesn't compute its logits from one "
            "choice of the last position, which would have to take each sequence's own"
        )
    ir.save(model, file)


def complete(manifest: Manifest, folder: Path) -> None:
    """Write genai_config.json."""
    text = json.dumps(describe(manifest), indent=2) + "\n"
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8", newline="\n")


def describe(manifest: Manifest) -> dict:
    """What genai_config.json says of a bundle."""
    decoder, generation = _decoder(manifest), manifest.generation
    logits = next(output for output in decoder.outputs if output.name == "logits")
    by_kind = {item.source.kind: item.name for item in decoder.inputs}
    keys = [item for item in decoder.inputs if item.name.endswith(".key")]
    capacity = manifest.flow.capacity or _MOST_TOKENS
    inputs = {"input_ids": by_kind["tokens"], "attention_mask": by_kind["mask"]}
    if "position" in by_kind:
        inputs["position_ids"] = by_kind["position"]
    return {
        "model": {
            "type": "decoder",
            "context_length": capacity,
            "vocab_size": logits.shape[-1],
            **special_tokens(generation),
            "decoder": {
                "filename": decoder.file,
                "session_options": {"provider_options": []},
                "num_hidden_layers": len(keys),
                "num_key_value_heads": keys[0].shape[1],
                "head_size": keys[0].shape[3],
                "inputs": {
                    **inputs,
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": logits.name,
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "max_length": capacity,
            "do_sample": False,
            "past_present_share_buffer": False,
            **{name: value for name, value in generation.options.items() if name in OPTIONS},
        },
    }


def _decoder(manifest: Manifest) -> Program:
    return manifest.program(manifest.flow.step[-1])
