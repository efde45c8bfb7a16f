"""From what the caller gives (a model, a directory, a hub id) to a model ready to export, and its processor."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    PreTrainedModel,
)

from genbundle.builder.exporting import first_line, quiet
from genbundle.bundles import BuildError, UnsupportedModelError

# Of several classes for one config, the one that takes most kinds of input.
_AUTO_CLASSES = (
    AutoModelForMultimodalLM,
    AutoModelForImageTextToText,
    AutoModelForSpeechSeq2Seq,
    AutoModelForSeq2SeqLM,
    AutoModelForCausalLM,
)

_PROCESSOR_FILES = (
    "processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json", "tokenizer.model",
    "spiece.model", "vocab.json", "vocab.txt",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A generative model, its processor or tokenizer where there is one, and a name for the manifest."""

    model: PreTrainedModel
    processor: Any | None
    name: str


def load(model: Any, processor: Any | None) -> Loaded:
    """Load `model` (a PreTrainedModel, a directory or a hub id); BuildError for what can't be loaded or generate."""
    name = type(model).__name__
    if isinstance(model, str | os.PathLike):
        name = Path(model).name if Path(model).exists() else str(model)
        source = str(model)
        model = _from_pretrained(source)
        processor = processor or _load_processor(source, asked=False)
    processor = load_processor(processor)
    if not isinstance(model, PreTrainedModel):
        raise BuildError(
            f"model: expected a transformers PreTrainedModel, a directory or a hub id, got {type(model).__name__}"
        )
    if not model.can_generate():
        raise UnsupportedModelError(
            f"{type(model).__name__} can't generate: give a model with a language-modeling head (...ForCausalLM, "
            "...ForConditionalGeneration)"
        )
    return Loaded(model=model, processor=processor, name=name)


@contextmanager
def borrowed(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """`model` ready to export inside the block: eval mode, no gradients, float32, on the CPU; as it was afterwards.

    In place, since a copy would cost the model's size again; half-precision weights come back with the same bits.
    """
    modes = {module: module.training for module in model.modules()}
    parameters = [(item, item.requires_grad, item.dtype, item.device) for item in model.parameters()]
    buffers = [
        (module._buffers, name, item.dtype, item.device)
        for module in modes
        for name, item in module._buffers.items()
        if item is not None
    ]
    settings = settings_of(model)
    try:
        model.eval().requires_grad_(False)
        if any(item.is_floating_point() and item.dtype != torch.float32 for item in model.parameters()):
            model.float()
        model.cpu()
        yield model
    finally:
        for item, needs_gradient, dtype, device in parameters:
            item.data = item.data.to(device, dtype)
            item.requires_grad_(needs_gradient)
        for owner, name, dtype, device in buffers:
            item = owner[name]
            owner[name] = None if item is None else item.to(device, dtype)
        for module, mode in modes.items():
            module.training = mode
        for module, (parts, values) in settings.items():
            module._modules.update(parts)
            vars(module).update(values)


Settings = dict[torch.nn.Module, tuple[dict[str, torch.nn.Module | None], dict[str, Any]]]


def settings_of(model: PreTrainedModel) -> Settings:
    """What modules are made of and set to: their parts, and their attributes that are words or switches."""
    return {
        module: (
            dict(module._modules),
            {name: value for name, value in vars(module).items() if isinstance(value, str | bool)},
        )
        for module in model.modules()
    }


def expect_unchanged(model: PreTrainedModel, before: Settings) -> None:
    """UnsupportedModelError for a model that its own code has changed for good: what it gives next depends on that."""
    names = {module: name for name, module in model.named_modules()}
    for module, (parts, values) in before.items():
        changed = [name for name, part in parts.items() if module._modules.get(name) is not part]
        changed += [name for name, value in values.items() if name != "training" and vars(module).get(name) != value]
        if changed:
            raise UnsupportedModelError(
                f"{names.get(module) or type(model).__name__}: the model's code changes its {changed[-1]!r} for good "
                "while it generates, by its inputs: set it beforehand if its config can"
            )


def load_processor(processor: Any) -> Any:
    """A tokenizer or processor, loaded where it is given by its directory or hub id."""
    return _load_processor(str(processor), asked=True) if isinstance(processor, str | os.PathLike) else processor


def _from_pretrained(source: str) -> PreTrainedModel:
    if not Path(source).exists() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise BuildError(f"model: no such directory {source!r}")
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise BuildError(f"model: {source!r} holds no config.json: it isn't a saved transformers model")
    try:
        with quiet():
            # Asked nothing, transformers would ask on the terminal whether to run the directory's own code.
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            fitting = (auto for auto in _AUTO_CLASSES if type(config) in auto._model_mapping)  # pyright: ignore
            auto: Any = next(fitting, AutoModelForCausalLM)
            return auto.from_pretrained(source, config=config, dtype=torch.float32, trust_remote_code=False)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise BuildError(f"model: {source!r} can't be loaded: {_reason(error)}") from error


def _load_processor(source: str, *, asked: bool) -> Any | None:
    """The processor or tokenizer at `source`; None where there is none, for a bundle that takes token ids.

    Raises BuildError for one that can't be loaded, and, where it was asked for, for none.
    """
    folder = Path(source)
    if not asked and folder.is_dir() and not any((folder / name).is_file() for name in _PROCESSOR_FILES):
        return None
    try:
        with quiet():
            return AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # whatever a tokenizer's own code and files do
        if not asked and not folder.is_dir() and isinstance(error, OSError):
            return None
        raise BuildError(f"processor: the one of {source!r} can't be loaded: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    if "trust_remote_code" in str(error):
        return "it needs Python code of its own beside its weights, which a build doesn't run: load it yourself"
    return first_line(error)
