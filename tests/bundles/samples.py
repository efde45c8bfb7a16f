"""A manifest and files to write, without a model."""

from pathlib import Path
from typing import Any

from genbundle.bundles.manifest import (
    FORMAT,
    FORMAT_VERSION,
    Flow,
    Generation,
    Images,
    Input,
    Manifest,
    Model,
    Output,
    Program,
    Route,
    Source,
    State,
    Text,
)

CONTENT = {"decode.onnx": b"program", "weights.safetensors": b"weights", "tokenizer.json": b"{}"}


def program(name: str = "decode", **changes: Any) -> Program:
    """A decoder with one state tensor."""
    facts: dict[str, Any] = {
        "name": name,
        "file": "decode.onnx",
        "roles": ("merge", "language_model", "lm_head", "decode"),
        "inputs": (
            Input(name="input_ids", dtype="int64", shape=("batch", "sequence"), source=Source(kind="tokens")),
            Input(
                name="position_ids",
                dtype="int64",
                shape=("batch", "sequence"),
                source=Source(kind="position", rule="cumsum", options={"start": 2}),
            ),
            Input(
                name="past", dtype="float32", shape=("batch", 2, "past", 8), source=Source(kind="state", name="0.key")
            ),
        ),
        "outputs": (
            Output(name="logits", dtype="float32", shape=("batch", 1, 50)),
            Output(name="present", dtype="float32", shape=("batch", 2, "total", 8), state="0.key"),
        ),
    }
    return Program(**{**facts, **changes})


def manifest(**changes: Any) -> Manifest:
    """A whole manifest; `files` is empty, as a writer gets it."""
    facts: dict[str, Any] = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "backend": "cpu",
        "model": Model(architecture="SomeForCausalLM", name="some", parameters=7, weight_bytes=28),
        "flow": Flow(prompt=(Route(programs=("decode",)),), step=("decode",), continues=True, capacity=64),
        "programs": (program(),),
        "state": (State(name="0.key", dtype="float32", shape=("batch", 2, "past", 8), axis=2),),
        "generation": Generation(eos_token_ids=(2,), pad_token_id=0, options={"temperature": 0.5}),
        "files": {},
        "weights": "weights.safetensors",
        "text": Text(tokenizer="tokenizer.json"),
        "images": Images(input="pixel_values", reason="not described"),
        "notes": ("Grüße & 東京",),
    }
    return Manifest(**{**facts, **changes})


def fill(folder: Path) -> None:
    """Write the files that the manifest names."""
    for name, content in CONTENT.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
