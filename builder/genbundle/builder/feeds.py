"""Where the tensors that an encoder's modules take come from, found by their values in every capture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from genbundle.bundles import UnsupportedModelError

Tensors = dict[str, torch.Tensor]
PAIRED = "paired_rows"


@dataclass(frozen=True, kw_only=True)
class ModuleCall:
    """One call of a module: its arguments by name, and the tensors of its output by path."""

    module: torch.nn.Module
    arguments: dict[str, Any]
    fields: Tensors


@dataclass(frozen=True, kw_only=True)
class Feed:
    """Where a tensor comes from: an input of the program (stage None), or a field of an earlier module's output.

    shape: what it is reshaped to, with -1 for the axis that varies; None as it is. filled: instead, this number
    throughout, as many rows as the input or field has. made: Python made it of the user's inputs. skip: so much of the
    second axis is left out. rows: the input that says in which order its rows are taken, `last` being one more, so many
    `together` in one.
    """

    stage: int | None
    name: str
    shape: tuple[int, ...] | None = None
    filled: float | None = None
    made: bool = False
    skip: int = 0
    rows: str | None = None
    last: torch.Tensor | None = None
    together: int = 1

    def take(self, inputs: Mapping[str, Any], outputs: Sequence[Mapping[str, torch.Tensor]]) -> Any:
        """The tensor, from the program's inputs and the outputs of the modules so far."""
        value = inputs[self.name] if self.stage is None else outputs[self.stage][self.name]
        if self.skip:
            value = value[:, self.skip :]
        if self.rows is not None:
            value = value.reshape(-1, value.shape[-1])
            table = value if self.last is None else torch.cat([value, self.last[None]])
            return table[inputs[self.rows]].reshape(-1, self.together * value.shape[-1])
        if self.filled is not None:
            assert self.shape is not None
            return torch.full((value.shape[0], *self.shape[1:]), self.filled)
        return value if self.shape is None else value.reshape(self.shape)


def paired_feed(
    values: list[torch.Tensor], calls: list[list[ModuleCall]], before: int
) -> tuple[Feed | None, list[torch.Tensor]]:
    """Rows of the module before, several in one: the field, and their order in each capture."""
    for key, tensor in calls[0][before - 1].fields.items():
        width = tensor.shape[-1] if tensor.dim() else 0
        if not width or any(value.dim() != 2 or value.shape[-1] % width for value in values):
            continue
        parts = [value.reshape(-1, width) for value in values]
        found = _order(torch.nn.Module(), parts, [item[before - 1].fields.get(key) for item in calls])
        if found is not None:
            together = values[0].shape[-1] // width
            return Feed(stage=before - 1, name=key, rows=PAIRED, together=together), found[0]
    return None, []


def given_feed(values: list[torch.Tensor], given: list[Tensors]) -> Feed | None:
    for key in given[0]:
        found = _reshaped(values, [inputs[key] for inputs in given], leading=True)
        if found is not None:
            return Feed(stage=None, name=key, shape=found or None)
    return None


def field_feed(values: list[torch.Tensor], calls: list[list[ModuleCall]], before: int) -> Feed | None:
    """The latest module's field that holds `values` in every capture."""
    for stage in reversed(range(before)):
        for key in calls[0][stage].fields:
            fields = [item[stage].fields.get(key) for item in calls]
            if any(item is None for item in fields):
                continue
            for skip in (0, 1):  # a token for the whole picture stands first
                parts = [item[:, skip:] if item is not None and item.dim() > 2 else item for item in fields]
                found = _reshaped(values, parts, leading=False)
                if found is not None:
                    return Feed(stage=stage, name=key, shape=found or None, skip=skip)
    return None


def filled_feed(values: list[torch.Tensor], calls: list[list[ModuleCall]], before: int) -> Feed | None:
    """One number throughout, in as many rows as a field of a module before has."""
    number = values[0].flatten()[0] if values[0].numel() else None
    alike = number is not None and all(bool((value == number).all()) for value in values)
    if not alike or len({value.shape[1:] for value in values}) != 1:
        return None
    for stage in reversed(range(before)):
        for key, tensor in calls[0][stage].fields.items():
            rows = [item[stage].fields[key].shape[0] for item in calls] if tensor.dim() else []
            if rows == [value.shape[0] for value in values]:
                filled = number.item()  # pyright: ignore[reportOptionalMemberAccess]
                return Feed(stage=stage, name=key, shape=(-1, *values[0].shape[1:]), filled=filled)
    return None


def feature_feed(
    model: torch.nn.Module, name: str, key: str, values: list[torch.Tensor], calls: list[list[ModuleCall]]
) -> tuple[Feed, list[torch.Tensor]]:
    """Where a feature comes from, and the order of the rows in each capture where it isn't the module's own."""
    feed = field_feed(values, calls, len(calls[0]))
    if feed is not None:
        shape = None if feed.shape is None else (-1, *values[0].shape[1:])
        return replace(feed, shape=shape), []
    for stage in reversed(range(len(calls[0]))):
        for path in calls[0][stage].fields:
            found = _order(model, values, [item[stage].fields.get(path) for item in calls])
            if found is not None:
                rows, last = found
                # One order for all levels of features, which are dealt out alike.
                return Feed(stage=stage, name=path, rows="image_rows", last=last), rows
    raise UnsupportedModelError(f"{key} is no output of a module that the {name} calls")


def _order(
    model: torch.nn.Module, values: list[torch.Tensor], fields: list[torch.Tensor | None]
) -> tuple[list[torch.Tensor], torch.Tensor | None] | None:
    """The rows of `fields` that `values` are made of, a parameter of the model being one more; None for others."""
    orders, last = [], None
    for value, rows in zip(values, fields, strict=True):
        if rows is None or value.dim() != 2 or rows.dim() < 2 or rows.shape[-1] != value.shape[-1]:
            return None
        table = rows.reshape(-1, rows.shape[-1])
        places = {row.tobytes(): index for index, row in enumerate(table.detach().numpy())}
        found = [places.get(row.tobytes()) for row in value.detach().numpy()]
        other = {value[index].detach().numpy().tobytes() for index, place in enumerate(found) if place is None}
        if len(other) > 1 or (other and len(found) == found.count(None)):
            return None
        if other:
            width = value.shape[-1]
            given = (item for item in model.parameters() if item.shape == (width,))
            last = next((item for item in given if item.detach().numpy().tobytes() in other), None)
            if last is None:
                return None
        orders.append(torch.tensor([len(table) if place is None else place for place in found]))
    return orders, last


def _reshaped(
    values: list[torch.Tensor], sources: Sequence[torch.Tensor | None], *, leading: bool
) -> tuple[int, ...] | None:
    """The shape that makes the sources the values, () where they are; None where they don't hold them.

    leading: only by one axis of size 1 in front, more or less.
    """
    if any(source is None for source in sources) or len({value.dim() for value in values}) != 1:
        return None
    sizes = zip(*(value.shape for value in values), strict=True)
    shape = [size[0] if len(set(size)) == 1 else -1 for size in sizes]
    same = True
    for value, source in zip(values, sources, strict=True):
        assert source is not None
        if source.dtype != value.dtype or source.numel() != value.numel():
            return None
        same &= value.shape == source.shape
        if leading and value.shape != source.shape and source.shape not in ((1, *value.shape), value.shape[1:]):
            return None
        if not torch.equal(source.reshape(value.shape), value):
            return None
    if same:
        return ()
    if shape.count(-1) > 1:
        return None
    if -1 not in shape:
        shape[0] = -1
    return tuple(shape)
