"""The encoder of a modality: from the user's pixels to the features that the model's merge takes in.

Three seams. Where the features come from pixels alone, the program is the model's own `get_<modality>_features`, cut
after its last module where it goes on to deal the features out. Where its inputs steer Python (patch grids, padded
pictures), the program is the tower with its projector, and what the model computes before the tower is a preparer's
work. Each must give the features of every capture, else the build stops.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from genbundle.builder.components import Component, name_axes, needed_inputs, same_tensors
from genbundle.builder.cut import leaves, output_inside
from genbundle.builder.exporting import prepare_inputs
from genbundle.builder.plan import Capture
from genbundle.builder.preparing import explain_prepared
from genbundle.bundles import UnsupportedModelError
from genbundle.bundles.manifest import Input, Role, Source

_PROJECTORS = ("multi_modal_projector", "connector", "embed_vision", "embed_audio", "aligner")


@dataclass(frozen=True, kw_only=True)
class Features:
    """One feature field of an encoder's output object that the merge reads.

    path: the field, and the index inside it where the model keeps a list of levels. pieces: the model keeps one tensor
    per picture, which the program returns joined along the first axis.
    """

    path: tuple[str | int, ...]
    pieces: bool

    @property
    def name(self) -> str:
        """The program output's name."""
        return "_".join(("image", *map(str, self.path)))

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


def candidate_features(output: Any) -> list[Features]:
    """Every feature field of an encoder's output object, in order."""
    found: list[Features] = []
    for field, value in output.items():
        if isinstance(value, torch.Tensor):
            found.append(Features(path=(field,), pieces=False))
        elif isinstance(value, tuple | list) and value and all(isinstance(item, torch.Tensor) for item in value):
            found.append(Features(path=(field,), pieces=True))
        elif isinstance(value, tuple | list) and value and all(isinstance(item, tuple | list) for item in value):
            found.extend(Features(path=(field, level), pieces=True) for level in range(len(value)))
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


class Tower(torch.nn.Module):
    """The vision tower, then the projector on what the model feeds it, with flat outputs.

    outputs: per feature, the stage ("tower" or "projector"), the field of that stage's output, and the feature's shape
    behind its first axis. arguments: the tower's argument of an input that goes by another name.
    """

    def __init__(
        self,
        tower: torch.nn.Module,
        projector: torch.nn.Module | None,
        feed: Any,
        outputs: dict[str, tuple],
        arguments: dict[str, str],
    ):
        super().__init__()
        self.tower, self.projector, self._feed, self._outputs = tower, projector, feed, outputs
        self._arguments = arguments
        self.config = getattr(tower, "config", None)

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The features by name."""
        inputs = {self._arguments.get(name, name): value for name, value in inputs.items()}
        stages = {"tower": self.tower(**inputs, return_dict=True)}
        if self.projector is not None:
            stages["projector"] = self.projector(leaves(stages["tower"])[self._feed])
        return {
            name: leaves(stages[stage])[field].reshape(-1, *shape)
            for name, (stage, field, shape) in self._outputs.items()
        }


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
        found = leaves(output_inside(self._last[0], lambda: self._getter(**inputs, return_dict=True)))
        return {name: found[field].reshape(-1, *shape) for name, (field, shape) in self._outputs.items()}


def encoder_component(
    model: PreTrainedModel, modality: str, captures: list[Capture], features: list[Features]
) -> Component:
    """The encoder program of `modality`, giving `features`; UnsupportedModelError where neither seam gives them."""
    name = f"{modality}_encoder"
    getter = getattr(model.base_model, f"get_{modality}_features", None) or getattr(
        model, f"get_{modality}_features", None
    )
    if getter is None:
        raise UnsupportedModelError(f"{type(model).__name__}: no get_{modality}_features to make the {name} of")
    wanted = [
        {item.name: item.read(capture.prompt["mm_encoder_outputs"][modality]) for item in features}
        for capture in captures
    ]
    given = [_encoder_inputs(getter, capture) for capture in captures]
    steering = [key for key, value in given[0].items() if not value.is_floating_point() or value.dim() > 4]
    if steering:
        return _tower(model, modality, getter, given, wanted)
    module = _getter_module(model, modality, getter, features, given[0], wanted[0]).eval()
    with torch.no_grad():
        for inputs, expected in zip(given, wanted, strict=True):
            _expect_equal(name, module(**inputs), expected)
    roles: tuple[Role, ...] = ("encoder", "projector") if _projector(model) is not None else ("encoder",)
    return Component(
        name=name,
        roles=roles,
        modality=modality,
        module=module,
        sample=given[0],
        axes={**name_axes(given), **name_axes(wanted)},
        sources={key: Source(kind="user", name=key) for key in given[0]},
    )


def _getter_module(
    model: PreTrainedModel, modality: str, getter: Callable, features: list[Features], inputs: dict, wanted: dict
) -> torch.nn.Module:
    """The whole getter or, where it ends in a loop over pictures, the getter cut after its last module."""
    if not any(item.pieces for item in features):
        return FeatureGetter(model, getter, features)
    tower, projector = model.get_encoder(modality=modality), _projector(model)
    call = _watch(tower, projector, getter, inputs)
    for stage, last in (("projector", projector), ("tower", tower)):
        found = {name: _field_of(value, {stage: call.get(stage, {})}) for name, value in wanted.items()}
        if last is not None and all(found.values()):
            outputs = {name: (field[1], wanted[name].shape[1:]) for name, field in found.items() if field}
            return CutGetter(model, getter, last, outputs)
    return FeatureGetter(model, getter, features)


def _encoder_inputs(getter: Callable[..., Any], capture: Capture) -> dict[str, torch.Tensor]:
    import inspect

    return {key: capture.inputs[key] for key in inspect.signature(getter).parameters if key in capture.inputs}


def _projector(model: PreTrainedModel) -> torch.nn.Module | None:
    owners = (model, model.base_model)
    found = (getattr(owner, name, None) for owner in owners for name in _PROJECTORS)
    return next((module for module in found if module is not None), None)


def _tower(model: PreTrainedModel, modality: str, getter: Callable, given: list, wanted: list) -> Component:
    """The tower seam: watch the getter call tower and projector, and find every feature among their outputs."""
    name = f"{modality}_encoder"
    tower, projector = model.get_encoder(modality=modality), _projector(model)
    if tower is model or not isinstance(tower, torch.nn.Module):
        raise UnsupportedModelError(f"{type(model).__name__}: no {modality} tower to make the {name} of")
    calls = [_watch(tower, projector, getter, inputs) for inputs in given]
    feed = _field_of(calls[0]["projector_input"], {"tower": calls[0]["tower"]}) if projector is not None else None
    if projector is not None and feed is None:
        raise UnsupportedModelError(
            f"{type(model).__name__}: the {name}'s projector isn't fed by its tower, unexplained"
        )
    outputs: dict[str, tuple] = {}
    for feature, value in wanted[0].items():
        found = _field_of(value, {stage: calls[0][stage] for stage in ("projector", "tower") if calls[0].get(stage)})
        if found is None:
            raise UnsupportedModelError(
                f"{type(model).__name__}: {feature} is no output of the {name}'s tower or projector"
            )
        outputs[feature] = (*found, value.shape[1:])
    # Upstream prepares what it finds under a marker's name, so a steering input goes by the user's name for it.
    aliases = {key: _user_name(value, given[0]) or key for key, value in calls[0]["kwargs"].items()}
    module = Tower(tower, projector, feed and feed[1], outputs, {alias: key for key, alias in aliases.items()}).eval()
    prepared = [prepare_inputs(tower, call["kwargs"]) for call in calls]
    tensors = [
        {aliases.get(key, key): value for key, value in item.items() if isinstance(value, torch.Tensor)}
        for item in prepared
    ]
    own = [{key: item[key] for key in aliases.values()} for item in tensors]
    kept = {key for item in own for key in needed_inputs(module, item)}
    samples = [{key: value for key, value in item.items() if key in kept or key not in own[0]} for item in tensors]
    with torch.no_grad():
        for sample, expected in zip(samples, wanted, strict=True):
            _expect_equal(name, module(**sample), expected)
    return Component(
        name=name,
        roles=("encoder", "projector") if projector is not None else ("encoder",),
        modality=modality,
        module=module,
        sample=samples[0],
        axes={**name_axes(samples), **name_axes(wanted)},
        sources=explain_prepared(name, tower, given, samples),
    )


def _watch(tower: torch.nn.Module, projector: torch.nn.Module | None, getter: Callable, inputs: dict) -> dict[str, Any]:
    """What the getter called the tower with, and what tower and projector took and gave."""
    seen: dict[str, Any] = {}

    def watch_tower(module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        import inspect

        names = list(inspect.signature(module.forward).parameters)
        bound = {**dict(zip(names, args, strict=False)), **kwargs}
        seen["kwargs"] = {key: value for key, value in bound.items() if isinstance(value, torch.Tensor)}
        # Models write into their tower's output object.
        seen["tower"] = {key: value.clone() for key, value in leaves(output).items()}

    def watch_projector(_module: torch.nn.Module, args: tuple, output: Any) -> None:
        seen["projector_input"], seen["projector"] = args[0].clone(), leaves(output)

    hooks = [tower.register_forward_hook(watch_tower, with_kwargs=True)]
    if projector is not None:
        hooks.append(projector.register_forward_hook(watch_projector))
    try:
        with torch.no_grad():
            getter(**inputs, return_dict=True)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _user_name(value: torch.Tensor, given: dict[str, torch.Tensor]) -> str | None:
    """The user's name of a steering input that reaches the tower as it is."""
    return next(
        (name for name, item in given.items() if not item.is_floating_point() and torch.equal(item, value)), None
    )  # fmt: skip


def _field_of(value: torch.Tensor, stages: dict[str, dict[str, torch.Tensor]]) -> tuple[str, str] | None:
    """The stage and field whose tensor holds `value`, whatever its leading axes."""
    for stage, fields in stages.items():
        for field, tensor in fields.items():
            fits = tensor.numel() == value.numel() and tensor.shape[-1] == value.shape[-1]
            if fits and torch.equal(tensor.reshape(value.shape), value):
                return stage, field
    return None


def _expect_equal(name: str, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    if not same_tensors(found, expected):
        raise UnsupportedModelError(
            f"the {name} cut out of the model doesn't give the features that the model computes"
        )


OFFSETS = "cu_seqlens"


class OneFrame(torch.nn.Module):
    """A packed tower for the patches of one frame: what says where frames end becomes a constant of the call."""

    def __init__(self, component: Component):
        super().__init__()
        self.module, self.config = component.module, getattr(component.module, "config", None)
        # The grid steers nothing once what follows from it is given, but towers ask for it.
        self._rest = {
            name: value[:1]
            for name, value in component.sample.items()
            if name != OFFSETS and component.sources[name].kind == "user" and not value.is_floating_point()
        }

    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The features of one frame."""
        rows = next(iter(inputs.values())).shape[0]
        offsets = torch.cat([torch.zeros(1), torch.full((1,), rows)]).to(torch.int32)
        return self.module(**inputs, **self._rest, **{OFFSETS: offsets})


def frame_by_frame(component: Component) -> Component:
    """A packed encoder as a program for one frame, which the runtime calls for each; any other one as it is.

    Upstream traces packed attention for frames of one size (`_reshaped_vision_attention_forward`): frames of several
    sizes in one call would get wrong features.
    """
    if OFFSETS not in component.sample:
        return component
    module = OneFrame(component).eval()
    rows = int(component.sample[OFFSETS][1])
    total = int(component.sample[OFFSETS][-1])
    sample = {
        name: value[:rows]
        for name, value in component.sample.items()
        if name != OFFSETS and name not in module._rest and value.shape[0] == total
    }
    left = component.sample.keys() - sample.keys() - module._rest.keys() - {OFFSETS}
    if left:
        raise UnsupportedModelError(f"{component.name}: its input {min(left)!r} has no row per patch")
    sources = {
        name: replace(component.sources[name], options={**component.sources[name].options, "pieces": OFFSETS})
        for name in sample
    }
    offsets = replace(component.sources[OFFSETS], options={**component.sources[OFFSETS].options, "pieces": "offsets"})
    with torch.no_grad():
        whole, first = component.module(**component.sample), module(**sample)
    _expect_equal(component.name, first, {name: value[: len(first[name])] for name, value in whole.items()})
    return replace(
        component,
        module=module,
        sample=sample,
        axes={**{name: {0: f"{name}_0"} for name in sample}, **{name: {0: f"{name}_0"} for name in first}},
        sources=sources,
        guides={OFFSETS: Input(name=OFFSETS, dtype="int64", shape=("offsets",), source=offsets)},
    )
