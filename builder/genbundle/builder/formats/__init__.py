"""One module per program format: each takes components and returns what the manifest says of the programs it wrote."""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

from genbundle.builder.branches import taken_branches
from genbundle.builder.components import Component, dtype_of, shape_of
from genbundle.builder.exporting import first_line
from genbundle.builder.guards import HoldsFrom, resized
from genbundle.bundles import GenbundleError, UnsupportedModelError
from genbundle.bundles.manifest import Flow, Input, Program, Runner, State

_SHORT = 7  # tokens of the sample of a program for short prompts: no multiple of anything
_LEAST_WITH_MEDIA = 4  # tokens of a prompt: a placeholder, what stands around it, and a word
Progress = Callable[[str], None]
Lowered = TypeVar("Lowered")


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What a format wrote: programs, the state they carry, how they are called, the weights file, and what to know.

    weight_bytes: of every distinct weight, where a lossy precision makes it other than the model's own. runners: other
    runtimes for such files, so far as the programs say whether they run them.
    """

    programs: tuple[Program, ...]
    state: tuple[State, ...] = ()
    flow: Flow = field(default_factory=lambda: Flow(prompt=(), step=()))
    weights: str | None = None
    weight_bytes: int | None = None
    notes: tuple[str, ...] = ()
    runners: tuple[Runner, ...] = ()


@contextmanager
def naming(component: Component) -> Iterator[None]:
    """Turn whatever an exporter raises into an UnsupportedModelError that names the component and the cause."""
    try:
        yield
    except UnsupportedModelError as error:
        if str(error).startswith(f"{component.name}: "):
            raise
        raise UnsupportedModelError(f"{component.name}: {error}") from error
    except GenbundleError:
        raise
    except Exception as error:  # exporters raise anything
        cause = error.__cause__ or error
        raise UnsupportedModelError(
            f"{component.name}: the exporter can't express it: {type(cause).__name__}: {first_line(cause)}"
        ) from error


def lower_each(
    components: Iterable[Component], lower: Callable[[Component], Lowered], progress: Progress, notes: list[str]
) -> Iterator[tuple[Component, Lowered]]:
    """Every component, or its alternative, with what `lower` makes of it, one by one; an optional one that can't be
    lowered is noted."""
    for component in components:
        progress(f"export {component.name}")
        try:
            if component.obstacle is not None:
                raise UnsupportedModelError(f"{component.name}: {component.obstacle}")
            with naming(component), taken_branches(component.module, component.sample):
                try:
                    lowered = lower(component)
                except HoldsFrom as error:
                    # Shorter prompts can only go without it, but for those that hold no picture and no sound.
                    spare = component.optional and component.alternative is None
                    if error.least > _LEAST_WITH_MEDIA and not spare:
                        raise
                    component = replace(component, least=error.least)
                    lowered = lower(component)
        except UnsupportedModelError as error:
            if component.alternative is not None:
                if component.alternative.name != component.name:
                    notes.append(f"the program {component.alternative.name!r} takes its place: {error}")
                yield from lower_each([component.alternative], lower, progress, notes)
                continue
            if not component.optional:
                raise
            notes.append(f"done without a program of its own: {error}")
        else:
            yield component, lowered
            if component.optional and component.least > 2 and component.alternative is None:
                yield from lower_each([_shorter(component)], lower, progress, notes)


def _shorter(component: Component) -> Component:
    """The same for prompts of fewer tokens than its least, which go another way through the model's code."""
    most = component.least - 1
    sample = resized(component.sample, component.axes, {"sequence": min(_SHORT, most)})
    return replace(component, name=f"short_{component.name}", sample=sample, least=1, longest=most)


def knowing(item: Input, rows: int | None) -> Input:
    """An input of token ids with how many there are, where the program's engine wouldn't see one beyond them."""
    if rows is None:
        return item
    return replace(item, source=replace(item.source, options={**item.source.options, "below": rows}))


def describe_inputs(
    component: Component, read: Collection[str | None], rename: Callable[[str], str]
) -> tuple[Input, ...]:
    """The manifest's inputs of a component, in its sample's order, without those that its program doesn't read."""
    taken = (
        Input(
            name=rename(name),
            dtype=dtype_of(tensor),
            shape=shape_of(tensor, component.axes.get(name, {})),
            source=component.sources[name],
        )
        for name, tensor in component.sample.items()
        if name in read
    )
    return (*taken, *component.guides.values())
