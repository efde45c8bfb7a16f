"""The encoder of a modality: from the user's pixels to the features that the model's merge takes in.

Three seams. Where the features come from pixels alone, the program is the model's own `get_<modality>_features`, cut
after its last module where it goes on to deal the features out. Where its inputs steer Python (patch grids, padded
pictures), the program is the chain of modules that it calls (towers.py), and what the model computes before the first
is a preparer's work. Each must give the features of every capture, else the build stops.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from genbundle.builder.components import Component, name_axes, same_tensors
from genbundle.builder.cut import output_inside, output_tensors
from genbundle.builder.feeds import ModuleCall
from genbundle.builder.plan import Capture
from genbundle.builder.towers import chain_component, watch_modules
from genbundle.builder.unpadded import unpadded_component
from genbundle.bundles import UnsupportedModelError
from genbundle.bundles.manifest import Source


@dataclass(frozen=True, kw_only=True)
class Features:
    """One feature field of an encoder's output object that the merge reads.

    path: the field, and the index inside it where the model keeps a list of levels. pieces: the model keeps one tensor
    per picture, which the program returns joined along the first axis.
    """

    path: tuple[str | int, ...]
    pieces: bool
    modality: str

    @property
    def name(self) -> str:
        """The program output's name."""
        return "_".join((self.modality, *map(str, self.path)))

    def read(self, output: Any) -> torch.Tensor:
        """The features in an encoder's output object."""
        value = output
        for part in self.path:
            value = value[part]
        return torch.cat(list(value)) if self.pieces else value

    def write(self, output: dict[str, Any], features: torch.Tensor) -> None:
        """Put features into the fields of an output object to be."""
        value = (features,) if self.pieces else features
        if len(self.path) == 1:
            output[str(self.path[0])] = value
        else:
            levels = output.setdefault(str(self.path[0]), [])
            levels.append(value)


def candidate_features(output: Any, modality: str) -> list[Features]:
    """Every feature field of an encoder's output object, in order."""
    found: list[Features] = []
    for field, value in output.items():
        if isinstance(value, torch.Tensor):
            found.append(Features(path=(field,), pieces=False, modality=modality))
        elif isinstance(value, tuple | list) and value and all(isinstance(item, torch.Tensor) for item in value):
            found.append(Features(path=(field,), pieces=True, modality=modality))
        elif isinstance(value, tuple | list) and value and all(isinstance(item, tuple | list) for item in value):
            found.extend(Features(path=(field, level), pieces=True, modality=modality) for level in range(len(value)))
    return found


class FeatureGetter(torch.nn.Module):
    """`get_<modality>_features` with flat outputs."""

    def __init__(self, model: PreTrainedModel, getter: Callable[..., Any], features: list[Features]):
        super().__init__()
        self.model, self._getter, self.features = model, getter, features
        self.config = model.config

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The features by name."""
        output = self._getter(**inputs, return_dict=True)
        return {item.name: item.read(output).contiguous() for item in self.features}


class CutGetter(torch.nn.Module):
    """`get_<modality>_features` as far as its last module, before it deals the features out picture by picture.

    The dealing out is a Python loop, which would bake the number of pictures into the program.
    """

    def __init__(
        self, model: PreTrainedModel, getter: Callable[..., Any], last: torch.nn.Module, outputs: dict[str, tuple]
    ):
        super().__init__()
        self.model, self._getter, self._last, self._outputs = model, getter, (last,), outputs
        self.config = model.config

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The features by name."""
        found = output_tensors(output_inside(self._last[0], lambda: self._getter(**inputs, return_dict=True)))
        return {name: found[field].reshape(-1, *shape) for name, (field, shape) in self._outputs.items()}


def encoder_component(
    model: PreTrainedModel, modality: str, captures: list[Capture], features: list[Features]
) -> Component:
    """The encoder program of `modality`, giving `features`; UnsupportedModelError where neither seam gives them."""
    name = f"{modality}_encoder"
    getter = feature_getter(model, modality)
    if getter is None:
        raise UnsupportedModelError(f"{type(model).__name__}: no get_{modality}_features to make the {name} of")
    given = [encoder_inputs(getter, capture) for capture in captures]
    wanted = []
    for inputs, capture in zip(given, captures, strict=True):
        # Modules are told by exactly what they give, and a capture may come from another way to compute experts.
        with torch.no_grad():
            output = _run(getter, inputs)
        wanted.append({item.name: item.read(output) for item in features})
        captured = capture.prompt["mm_encoder_outputs"][modality]
        _expect_equal(name, wanted[-1], {item.name: item.read(captured) for item in features})
    steering = [key for key, value in given[0].items() if not value.is_floating_point() or value.dim() > 4]
    if steering:
        try:
            return chain_component(model, modality, partial(_run, getter), given, wanted)
        except UnsupportedModelError as error:
            return unpadded_component(model, modality, FeatureGetter(model, getter, features), given, wanted, error)
    calls = watch_modules(lambda: _run(getter, given[0]))
    module = _getter_module(model, getter, features, calls, wanted[0]).eval()
    with torch.no_grad():
        for inputs, expected in zip(given, wanted, strict=True):
            _expect_equal(name, module(**inputs), expected)
    return Component(
        name=name,
        roles=("encoder", "projector") if len(calls) > 1 else ("encoder",),
        modality=modality,
        module=module,
        sample=given[0],
        axes={**name_axes(given), **name_axes(wanted)},
        sources={key: Source(kind="user", name=key) for key in given[0]},
    )


def feature_getter(model: PreTrainedModel, modality: str) -> Callable[..., Any] | None:
    """The model's own `get_<modality>_features`; None without one."""
    name = f"get_{modality}_features"
    return getattr(model.base_model, name, None) or getattr(model, name, None)


def _run(getter: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> Any:
    return getter(**inputs, return_dict=True)


def _getter_module(
    model: PreTrainedModel, getter: Callable, features: list[Features], calls: list[ModuleCall], wanted: dict
) -> torch.nn.Module:
    """The whole getter or, where it ends in a loop over pictures, the getter cut after its last module."""
    if not any(item.pieces for item in features):
        return FeatureGetter(model, getter, features)
    for call in reversed(calls):
        found = {name: _field_of(value, call.fields) for name, value in wanted.items()}
        outputs = {name: (field, wanted[name].shape[1:]) for name, field in found.items() if field is not None}
        if outputs.keys() == wanted.keys() and sum(other.module is call.module for other in calls) == 1:
            return CutGetter(model, getter, call.module, outputs)
    return FeatureGetter(model, getter, features)


def encoder_inputs(getter: Callable[..., Any], capture: Capture) -> dict[str, torch.Tensor]:
    """The generation inputs that the getter takes."""
    return {key: capture.inputs[key] for key in inspect.signature(getter).parameters if key in capture.inputs}


def _field_of(value: torch.Tensor, fields: dict[str, torch.Tensor]) -> str | None:
    """The field whose tensor holds `value`, whatever its leading axes."""
    for field, tensor in fields.items():
        fits = tensor.numel() == value.numel() and tensor.shape[-1] == value.shape[-1]
        if fits and torch.equal(tensor.reshape(value.shape), value):
            return field
    return None


def _expect_equal(name: str, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    if not same_tensors(found, expected):
        raise UnsupportedModelError(
            f"the {name} cut out of the model doesn't give the features that the model computes"
        )
