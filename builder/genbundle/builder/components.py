"""What the builder exports: named modules with flat tensor inputs and outputs, and where each input comes from."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from genbundle.builder.exporting import MODEL_ERRORS
from genbundle.bundles import UnsupportedModelError
from genbundle.bundles.manifest import CAPACITY, Input, Role, Source, State


@dataclass(frozen=True, kw_only=True)
class Component:
    """One program to be.

    module: `forward(**inputs) -> dict[str, Tensor]`. sample: one set of inputs that it runs on. axes: the dynamic
    axes of inputs and outputs, name -> axis -> symbolic name. sources: where the runtime takes each input from.
    states: output name -> the state entry that it replaces. fusions: whether the engine's attention operators may stand
    in, which only look back. optional: whether the flow does without it where it can't be exported. obstacle: why it is
    known beforehand that an optional one can't. longest: the most tokens it is called for; None for any number. least:
    the fewest. guides: inputs in the manifest that steer the runtime's calls and aren't the program's. placeholder_id:
    the token that stands in a prompt for each of the features among the outputs. alternative: what to export instead
    where this can't be.
    """

    name: str
    roles: tuple[Role, ...]
    module: torch.nn.Module
    sample: dict[str, torch.Tensor]
    axes: Mapping[str, Mapping[int, str]]
    sources: Mapping[str, Source]
    states: Mapping[str, str] = field(default_factory=dict)
    modality: str | None = None
    fusions: bool = True
    optional: bool = False
    obstacle: str | None = None
    longest: int | None = None
    least: int = 1
    guides: Mapping[str, Input] = field(default_factory=dict)
    placeholder_id: int | None = None
    alternative: "Component | None" = None


def shape_of(tensor: torch.Tensor, axes: Mapping[int, str]) -> tuple[int | str, ...]:
    """The tensor's shape with its dynamic axes by name."""
    return tuple(axes.get(axis, size) for axis, size in enumerate(tensor.shape))


def dtype_of(tensor: torch.Tensor) -> str:
    """The manifest's name of the tensor's dtype."""
    return str(tensor.dtype).removeprefix("torch.")


def as_state(name: str, tensor: torch.Tensor, axes: Mapping[int, str]) -> State:
    """A state entry shaped like `tensor`; it grows along the axis of the past or of a buffer, if there is one."""
    axis = next((axis for axis, symbol in axes.items() if symbol in ("past", CAPACITY)), None)
    return State(name=name, dtype=dtype_of(tensor), shape=shape_of(tensor, axes), axis=axis)


def name_axes(
    samples: Sequence[Mapping[str, torch.Tensor]], known: Mapping[tuple[int, ...], str] | None = None
) -> dict[str, dict[int, str]]:
    """The axes whose sizes differ between samples; `known` names an axis by its sizes over the samples."""
    axes: dict[str, dict[int, str]] = {}
    for key in samples[0]:
        shapes = [tuple(sample[key].shape) for sample in samples]
        if len({len(shape) for shape in shapes}) != 1:
            raise UnsupportedModelError(f"the input {key!r} has another number of axes from run to run")
        for axis, sizes in enumerate(zip(*shapes, strict=True)):
            if len(set(sizes)) > 1:
                axes.setdefault(key, {})[axis] = (known or {}).get(sizes, f"{key}_{axis}")
    return axes


def needed_inputs(
    module: torch.nn.Module, inputs: Mapping[str, torch.Tensor], *, optional: Iterable[str] | None = None
) -> dict[str, torch.Tensor]:
    """`inputs` without those (of the `optional` ones) that the module does as well without, tried one after another."""
    kept = dict(inputs)
    with torch.no_grad():
        expected = module(**kept)
        for key in inputs if optional is None else optional:
            without = {name: value for name, value in kept.items() if name != key}
            try:
                found = module(**without)
            except MODEL_ERRORS:
                continue
            if same_tensors(found, expected):
                kept = without
    return kept


def one_sequence(component: Component) -> Component:
    """`component` for one sequence: its batch axes are 1, and what its sample has one of is fixed."""

    def row(name: str, tensor: torch.Tensor) -> torch.Tensor:
        for axis, symbol in component.axes.get(name, {}).items():
            if symbol == "batch":
                tensor = tensor.narrow(axis, 0, 1)
        return tensor.contiguous()

    sample = {name: row(name, tensor) for name, tensor in component.sample.items()}
    single = {
        symbol
        for name, each in component.axes.items()
        for axis, symbol in each.items()
        if name in sample and sample[name].shape[axis] == 1
    }
    axes = {
        name: {axis: symbol for axis, symbol in each.items() if symbol not in {"batch", *single}}
        for name, each in component.axes.items()
    }
    return replace(component, sample=sample, axes=axes)


def runs(component: Component) -> bool:
    """Whether the model's code takes the component's sample at all."""
    try:
        with torch.no_grad():
            component.module(**component.sample)
    except MODEL_ERRORS:
        return False
    return True


def same_tensors(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    """Whether both hold the same names with values equal to float rounding."""
    return found.keys() == expected.keys() and all(
        found[key].shape == value.shape and torch.allclose(found[key], value, rtol=1e-4, atol=1e-5)
        for key, value in expected.items()
    )
