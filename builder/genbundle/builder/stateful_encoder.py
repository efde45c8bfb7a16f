"""The encoder of pictures or sound as the ExecuTorch runtimes call it: positional inputs, one picture at a time.

Two kinds. Pictures of one size, `[pictures, C, H, W]`, and sounds of one length, `[sounds, bins, frames]`: one row per
call. Packed patches, `[patches, ...]` with offsets `cu_seqlens` between frames: the rows of one frame per call, which
attend to one another and to no others.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from genbundle.builder.components import Component
from genbundle.builder.encoders import candidate_features, encoder_component, encoder_inputs, feature_getter
from genbundle.builder.exporting import MODEL_ERRORS
from genbundle.builder.image_text import placeholder_token
from genbundle.builder.packed import steering
from genbundle.builder.plan import Capture
from genbundle.builder.stateful import instead_of
from genbundle.builder.stateful_attention import stateful_attention
from genbundle.bundles import UnsupportedModelError
from genbundle.bundles.manifest import Input, Source

_OFFSETS = "cu_seqlens"
_MOST_BLOCKS = 1024
"""The most features that one frame may give: ExecuTorch reserves memory for that many."""


_FEATURES = ("pooler_output", "deepstack_features")
"""The fields of `get_image_features`' output that models read: the features, and those of deeper levels."""


_METHODS = {"image": "vision_encoder", "audio": "audio_encoder"}
"""modality -> the method's name to ExecuTorch's own runners."""

_RANKS = {"image": 4, "audio": 3}
"""modality -> the axes of an input with a row for each picture or sound."""

_ROWS = {"image": "pictures", "audio": "sounds"}
"""modality -> what the rows are called in the manifest."""


def with_sounds(model: PreTrainedModel, captures: list[Capture]) -> list[Capture]:
    """The captures with the features of their sounds, which upstream doesn't take apart; as they are without any.

    Raises UnsupportedModelError for an encoder that takes sounds of any length: a method here takes one.
    """
    getter = feature_getter(model, "audio")
    if getter is None or any("mm_encoder_outputs" in item.prompt for item in captures):
        return captures
    given = [encoder_inputs(getter, item) for item in captures]
    if not all(given):
        return captures
    try:
        with torch.no_grad():
            outputs = [getter(**inputs, return_dict=True) for inputs in given]
    except MODEL_ERRORS as error:
        raise UnsupportedModelError(f"audio_encoder: get_audio_features fails on generate's inputs: {error}") from error
    for name, tensor in given[0].items():
        for axis in range(1, tensor.dim()):
            try:
                with torch.no_grad():
                    getter(**{**given[0], name: tensor.narrow(axis, 0, tensor.shape[axis] // 2)}, return_dict=True)
            except MODEL_ERRORS:
                continue
            raise UnsupportedModelError(
                f"audio_encoder: its {name} may be of other sizes than {list(tensor.shape[1:])}, and a method that a "
                "decoder with a cache of its own follows takes sounds of one size"
            )
    return [
        replace(item, prompt={**item.prompt, "mm_encoder_outputs": {"audio": output}})
        for item, output in zip(captures, outputs, strict=True)
    ]


def media_component(model: PreTrainedModel, captures: list[Capture]) -> tuple[Component, int]:
    """The encoder of the captured generations' pictures or sounds, and the token in whose places its features go.

    Raises UnsupportedModelError where the encoder can't be cut out, or no one token stands once for each feature.
    """
    modality = "audio" if "audio" in captures[0].prompt["mm_encoder_outputs"] else "image"
    outputs = [item.prompt["mm_encoder_outputs"].get(modality) for item in captures]
    name = f"{modality}_encoder"
    if any(output is None for output in outputs):
        raise UnsupportedModelError(f"{name}: generate gave no {modality} features for one of the inputs")
    features = [item for item in candidate_features(outputs[0], modality) if item.path[0] in _FEATURES]
    if not features or features[0].path != ("pooler_output",):
        raise UnsupportedModelError(f"{name}: get_{modality}_features gave no pooler_output to take features from")
    counts = [math.prod(features[0].read(output).shape[:-1]) for output in outputs]
    placeholder = placeholder_token(model, captures, counts)
    if placeholder is None:
        raise UnsupportedModelError(
            f"merge: no token stands {counts} times in the prompts, once for each {modality} feature"
        )
    return encoder_component(model, modality, captures, features), placeholder


class MediaEncoder(torch.nn.Module):
    """An encoder component for one picture or sound: `(pixel_values [1, C, H, W]) -> features [1, N, D]`.

    For packed patches the inputs are those with a row per patch. Where the model also takes features of deeper levels,
    they are a second output `[levels, N, D]`.
    """

    def __init__(self, component: Component):
        super().__init__()
        self.module, self.component = component.module, component
        self.modality = component.modality or "image"
        self.method = _METHODS[self.modality]
        self.packed = _OFFSETS in component.sample
        self.names = tuple(name for name, tensor in component.sample.items() if self._per_row(tensor))
        self._check()

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The features of one picture."""
        kwargs: dict[str, Any] = dict(zip(self.names, inputs, strict=True))
        if self.packed:
            rows = inputs[0].shape[0]
            # The grid itself steers nothing once what follows from it is given, but the towers ask for it.
            kwargs |= {
                name: self.component.sample[name][:1] for name in self.component.sample if name not in self.names
            }
            kwargs[_OFFSETS] = torch.cat([torch.zeros(1), torch.full((1,), rows)]).to(torch.int32)
            kwargs["max_seqlen"] = rows
        outputs = self.module(**kwargs)
        features, *levels = (output.reshape(-1, output.shape[-1]) for output in outputs.values())
        return (features[None], torch.stack(levels)) if levels else features[None]

    @property
    def needs(self) -> set[str]:
        """The generation inputs that the encoder's inputs come from."""
        sources = self.component.sources.values()
        given = {source.name for source in sources if source.kind == "user" and source.name is not None}
        return given | {name for source in sources for name in source.options.get("inputs", ())}

    def first(self) -> tuple[torch.Tensor, ...]:
        """The first picture or sound of the sample."""
        rows = int(self.component.sample[_OFFSETS][1]) if self.packed else 1
        return tuple(self.component.sample[name][:rows] for name in self.names)

    def dynamic_shapes(self, features: int) -> Any:
        """torch.export's description of the inputs: None for pictures of one size. `features` come from the sample."""
        if not self.packed:
            return None
        unit = int(self.component.sample[_OFFSETS][-1]) // features
        blocks = torch.export.Dim("blocks", min=1, max=_MOST_BLOCKS)
        return (tuple({0: unit * blocks} for _ in self.names),)

    def inputs(self) -> tuple[Input, ...]:
        """The manifest's inputs; the option `pieces` says how the engine divides them between calls."""
        found = []
        for name, tensor in self.component.sample.items():
            if name not in (*self.names, _OFFSETS):
                continue
            pieces = "offsets" if name == _OFFSETS else _OFFSETS if self.packed else "each"
            rows = "offsets" if name == _OFFSETS else "patches" if self.packed else _ROWS[self.modality]
            given = self.component.sources[name]
            source = Source(
                kind=given.kind, name=given.name, rule=given.rule, options={**given.options, "pieces": pieces}
            )
            dtype = str(tensor.dtype).removeprefix("torch.")
            found.append(Input(name=name, dtype=dtype, shape=(rows, *tensor.shape[1:]), source=source))
        return tuple(found)

    @contextmanager
    def exporting(self) -> Iterator[None]:
        """While open, the tower's attention takes all rows of a call as one frame, and its patches go into a matrix."""
        tower = next((part for part in self.module.modules() if isinstance(part, PreTrainedModel)), None)
        with ExitStack() as stack:
            if self.packed and tower is not None:
                stack.enter_context(_one_frame(tower))
            for part in self.module.modules():
                if isinstance(part, torch.nn.Conv3d):
                    stack.enter_context(instead_of(part, partial(_patch_product, part)))
            yield

    def _per_row(self, tensor: torch.Tensor) -> bool:
        rows = (
            int(self.component.sample[_OFFSETS][-1])
            if self.packed
            else next(iter(self.component.sample.values())).shape[0]
        )
        return tensor.shape[0] == rows and (self.packed or tensor.dim() == _RANKS[self.modality])

    def _check(self) -> None:
        rest = [name for name in self.component.sample if name not in (*self.names, _OFFSETS)]
        if self.packed and (steering(self.component) or any(self.component.sources[n].kind != "user" for n in rest)):
            raise UnsupportedModelError(
                f"{self.component.name}: its inputs {', '.join(rest)} steer it beside a frame's patches, which the "
                "xnnpack backend can't pass on: build for another backend, for instance cpu"
            )
        for name, tensor in self.component.sample.items():
            # What the patch grid steers in Python has become the packed inputs.
            if name not in self.names and not self.packed:
                raise UnsupportedModelError(
                    f"{self.component.name}: its input {name!r} of shape {list(tensor.shape)} has no row per picture, "
                    "which the xnnpack backend needs: build for another backend, for instance cpu"
                )


def _patch_product(convolution: torch.nn.Conv3d, patches: torch.Tensor) -> torch.Tensor:
    """A 3-D convolution over inputs of its kernel's size, as the matrix product it is: ExecuTorch has no 3-D one."""
    if tuple(patches.shape[2:]) != convolution.kernel_size or convolution.groups != 1:
        raise UnsupportedModelError(
            f"image_encoder: a 3-D convolution over {list(patches.shape)} with kernel {list(convolution.kernel_size)}, "
            "which ExecuTorch lacks: build for another backend, for instance cpu"
        )
    product = torch.nn.functional.linear(patches.flatten(1), convolution.weight.flatten(1), convolution.bias)
    return product[:, :, None, None, None]


@contextmanager
def _one_frame(tower: PreTrainedModel) -> Iterator[None]:
    """Attention of all rows to all rows; towers hand packed rows to attention undivided where it is a flash one."""

    def attention(
        _module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any,
        scaling: float | None = None, **__: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        query, key, value = (part.transpose(1, 2).contiguous() for part in (query, key, value))
        return torch.ops.llama.custom_sdpa(query, key, value, 0, None, 0.0, False, scaling), None

    with stateful_attention(tower, attention, lambda **_: None, flash=True):
        yield
