"""Steps of fixed sizes: keys and values in buffers with room, written in place, so that a GPU can replay its kernels.

A CUDA graph is a recording: addresses and sizes stay as they were. So the step attends to the whole buffer, and the
padding mask, as long as the buffer, hides what no token has written yet. Transformers' StaticCache is the same idea.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from genbundle.builder.components import Component
from genbundle.builder.decoder import Decoder
from genbundle.builder.layers import GROWING
from genbundle.bundles.manifest import CAPACITY, Source

_MORE = 5  # places of the sample's buffers that no token has taken
START = "start"


def with_buffers(components: Sequence[Component]) -> list[Component]:
    """`components` with the step's keys and values in buffers, where its state is nothing else and no other program
    reads it; as it was where the model's code can't be traced so."""
    read = [source.name for item in components for source in item.sources.values() if source.kind == "state"]
    alone = len(read) == len(set(read))
    return [_buffered(item) if alone and _can(item) else item for item in components]


def _can(component: Component) -> bool:
    module = component.module
    if type(module) is not Decoder or module.fused or module.begins or module.window is not None:
        return False
    kept = {kind for layer in module.layers for kind, _ in layer.shapes()}
    mask = component.sources.get("attention_mask")
    masked = mask is not None and mask.kind == "mask"
    return masked and component.axes["attention_mask"].get(1) == "total" and bool(kept) and kept <= set(GROWING)


def _buffered(component: Component) -> Component:
    decoder = component.module
    assert isinstance(decoder, Decoder)
    sample, axes, sources = dict(component.sample), dict(component.axes), dict(component.sources)
    tokens, mask = sample["input_ids"].shape[1], sample["attention_mask"]
    if len({mask.shape[1], *(sample[name].shape[2] + tokens for name in _past(component))}) > 1:
        return component  # a mask that counts something else than past and new tokens
    sample["attention_mask"] = torch.nn.functional.pad(mask, (0, _MORE))
    axes["attention_mask"] = {**axes["attention_mask"], 1: CAPACITY}
    for name in _past(component):
        sample[name] = torch.nn.functional.pad(sample[name], (0, 0, 0, tokens + _MORE))
        for end in (name, name.replace("past_", "present_", 1)):
            axes[end] = {**axes[end], 2: CAPACITY}
    sample[START] = torch.tensor([mask.shape[1] - tokens])
    sources[START] = Source(kind="start")
    module = Decoder(
        decoder.model,
        decoder.layers,
        fused=False,
        in_place=True,
        cache_argument=decoder.cache_argument,
        constants=decoder.constants,
    ).eval()
    return replace(component, module=module, sample=sample, axes=axes, sources=sources, alternative=component)


def _past(component: Component) -> list[str]:
    return [name for name, source in component.sources.items() if source.kind == "state"]
