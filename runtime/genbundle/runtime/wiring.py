"""Feeds every program from generation inputs, earlier programs, position rules and state, as the manifest says."""

import json
import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from genbundle.bundles import BundleError, EngineError, InputError, Manifest
from genbundle.bundles.dtypes import numpy_dtype
from genbundle.bundles.manifest import CAPACITY, Input, Route, Source
from genbundle.bundles.manifest import Program as ProgramEntry
from genbundle.runtime import pieces
from genbundle.runtime.inputs import token_ids, token_mask
from genbundle.runtime.positions import POSITION_INPUTS, POSITION_RULES, position_ids
from genbundle.runtime.preparers import PREPARERS
from genbundle.runtime.program import Backend, Buffers, Tensor
from genbundle.runtime.routes import Routes
from genbundle.runtime.state import State


@dataclass
class Sequences:
    """Several sequences on their way: state, padding mask `[batch, length]`, the last position ids per rule, and the
    generation inputs that the steps read."""

    state: State
    mask: np.ndarray
    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    positions: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wires:
    """A program's entry, sorted once by what a call asks of it: a step has two inputs and outputs for each layer.

    buffers: its inputs that it writes in place, with the state entry's name; others: the rest of them. written,
    replaced: its outputs that are state, in place or not, with the entry's name. keys: what rules' values are kept
    under, by input. to_room: whether its mask is as long as its buffers.
    """

    entry: ProgramEntry
    call: pieces.Caller
    buffers: Mapping[str, str]
    others: tuple[Input, ...]
    replaced: Mapping[str, str]
    written: Mapping[str, str]
    keys: Mapping[str, str]
    to_room: bool

    @classmethod
    def of(cls, entry: ProgramEntry) -> "Wires":
        """Those of a program."""
        buffers = {item.name: item.source.name or "" for item in entry.buffers}
        states = {item.name: item.state for item in entry.outputs if item.state is not None}
        in_place = entry.in_place
        return cls(
            entry=entry,
            call=pieces.Caller(entry),
            buffers=buffers,
            others=tuple(item for item in entry.inputs if item.name not in buffers),
            replaced={name: state for name, state in states.items() if name not in in_place},
            written={name: state for name, state in states.items() if name in in_place},
            keys={item.name: _key(item.source) for item in entry.inputs if item.source.rule is not None},
            to_room=entry.attends_to_room,
        )


class Wiring:
    """Calls a bundle's programs in the manifest's order."""

    def __init__(self, manifest: Manifest, backend: Backend):
        self.manifest, self.backend = manifest, backend
        self._wires = {program.name: Wires.of(program) for program in manifest.programs}
        self.routes = Routes(manifest)
        # Programs that keep their state inside hold one generation's: the last that began.
        kinds = [{item.source.kind for item in program.inputs} for program in manifest.programs]
        self._stateful = any("start" in each and "state" not in each for each in kinds)
        self._running: Sequences | None = None
        # Between looking whose state it is and running the programs on it, no other thread may begin.
        self._one_at_a_time = threading.Lock() if self._stateful else nullcontext()
        steps = (item.source for name in manifest.flow.step for item in self._wires[name].entry.inputs)
        self._step_inputs = {source.name for source in steps if source.kind == "user"}
        self._check()

    def open(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Open the programs that these inputs and the steps need, so that no measured call has to."""
        for name in (*self.routes.choose(inputs).programs, *self.manifest.flow.step):
            self.backend.program(name)

    def prompt(self, inputs: dict[str, np.ndarray], most: int | None = None) -> tuple[np.ndarray, Sequences]:
        """Run the prompt's programs: logits `[batch, vocabulary]` of the last position, and the sequences to go on.

        inputs: `input_ids` and `attention_mask` `[batch, length]`, and the model's own inputs. most: the most tokens
        that the sequences will get, the prompt's among them, if that is known. Raises InputError for inputs that no
        route takes, of another shape than the programs', or whose placeholders don't match.
        """
        route, ids = self.routes.choose(inputs), token_ids(inputs)
        size = self.routes.at_once(inputs, route)
        if size >= ids.shape[1]:
            return self._begin(inputs, route, most)
        names = ("decoder_input_ids",) if "decoder_input_ids" in inputs else ("input_ids", "attention_mask")
        first = {name: inputs[name][:, :size] for name in names}
        logits, sequences = self._begin({**inputs, **first}, route, most, least=ids.shape[1])
        for place in range(size, ids.shape[1], size):
            logits = self.step(ids[:, place : place + size].astype(np.int64), sequences)
        return logits, sequences

    def _begin(
        self, inputs: dict[str, np.ndarray], route: Route, most: int | None, least: int = 0
    ) -> tuple[np.ndarray, Sequences]:
        ids = token_ids(inputs)
        state = State(self.manifest.state, len(ids), most, self.manifest.flow.capacity, least=least)
        kept = {name: array for name, array in inputs.items() if name in self._step_inputs}
        sequences = Sequences(state=state, mask=token_mask(inputs).astype(np.int64), inputs=kept)
        call = _Call(self, inputs, sequences, ids.astype(np.int64), first=True)
        with self._one_at_a_time:
            if self._stateful:  # others' tensors would be kept for no use
                self._running = sequences
            return call.run(route.programs, by_token=route.one_by_one and len(route.programs) > 1), sequences

    def step(self, tokens: np.ndarray, sequences: Sequences) -> np.ndarray:
        """Append `tokens` `[batch, new]` to the sequences; logits `[batch, vocabulary]` of the last one."""
        before, (batch, new) = sequences.mask, tokens.shape
        length = before.shape[1]
        with self._one_at_a_time:
            if self._stateful and self._running is not sequences:
                raise EngineError(
                    "another generation began on this model meanwhile, and its programs keep the state of one: finish "
                    "each before the next, or load the bundle once more for the other"
                )
            sequences.mask = np.empty((batch, length + new), before.dtype)
            sequences.mask[:, :length], sequences.mask[:, length:] = before, 1
            try:
                return _Call(self, sequences.inputs, sequences, tokens, first=False).run(self.manifest.flow.step)
            except BaseException:
                # Else the mask would count tokens that the state doesn't hold, if the caller goes on.
                sequences.mask = before
                raise

    def wires(self, name: str) -> Wires:
        """What goes into a program and comes out of it."""
        return self._wires[name]

    def _check(self) -> None:
        """BundleError for a manifest whose programs can't feed one another, or that names a rule not known here."""
        for program in self.manifest.programs:
            for item in program.inputs:
                known = {"position": POSITION_RULES, "prepared": PREPARERS}.get(item.source.kind)
                if known is not None and item.source.rule not in known:
                    raise BundleError(
                        f"{program.name!r}'s input {item.name!r} needs the {item.source.kind} rule "
                        f"{item.source.rule!r}, known here are {', '.join(known)}: upgrade genbundle"
                    )
        steps = self._rules(self.manifest.flow.step)
        for route in self.manifest.flow.prompt:
            if steps - self._rules(route.programs):
                raise BundleError(
                    f"the steps go on with {sorted(steps)}, which the prompt {route.programs} never begins"
                )
        routes = (route for route in self.manifest.flow.prompt if route.one_by_one and len(route.programs) > 1)
        for name in (route.programs[-1] for route in routes):
            if self._wires[name].to_room:
                raise BundleError(f"{name!r} takes prompts token by token, and its mask hides none of them")
        for names in (*(route.programs for route in self.manifest.flow.prompt), self.manifest.flow.step):
            given: set[str] = set()
            for name in names:
                for item in self._wires[name].entry.inputs:
                    if item.source.kind == "output" and item.source.name not in given:
                        raise BundleError(
                            f"{name!r} needs the output {item.source.name!r}, which no program before it gives"
                        )
                # What is written in place is only given where it's another tensor than before.
                given |= {output.name for output in self._wires[name].entry.outputs} - self._wires[name].written.keys()
            if "logits" not in given:
                raise BundleError(f"the programs {list(names)} give no logits")

    def _rules(self, names: Iterable[str]) -> set[str]:
        """The position rules that programs read; a step goes on from the prompt's last positions."""
        inputs = (item for name in names for item in self._wires[name].entry.inputs)
        return {_key(item.source) for item in inputs if item.source.kind == "position"}


def _known_tokens(tokens: np.ndarray, source: Source) -> np.ndarray:
    """Token ids; InputError for one that the program has no row for, where its engine wouldn't see that."""
    below = source.options.get("below")
    if below is None:
        return tokens
    largest = tokens.item() if tokens.size == 1 else tokens.max(initial=0)
    if largest >= below:
        raise InputError(f"token ids up to {largest}, this bundle knows those below {below}")
    return tokens


def _key(source: Source) -> str:
    """What a rule's values are kept under: the rule and all that it goes by."""
    return f"{source.rule} {json.dumps(source.options, sort_keys=True)}"


def _check_grids(inputs: Mapping[str, np.ndarray], names: Iterable[str]) -> None:
    """InputError for patch grids [n, 3] of more patches than any input has numbers, before a rule makes tables of
    them."""
    for name in names:
        grids = inputs.get(name)
        if grids is None or grids.ndim != 2 or grids.shape[1] != 3 or grids.dtype.kind not in "iu":
            continue
        # A side of none has patches along none, but the others still say how large the tables get.
        patches = sum(math.prod(max(1, abs(side)) for side in grid) for grid in grids.tolist())
        largest = max(array.size for array in inputs.values())
        if patches > largest:
            raise InputError(f"{name}: grids of {patches} patches, and the largest input has {largest} numbers")


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """InputError for arrays that a numpy rule can't work with: of another rank or size, or grids that don't add up."""
    try:
        yield
    except (LookupError, ValueError, TypeError, ArithmeticError, StopIteration, RuntimeError, MemoryError) as error:
        raise InputError(f"{what} can't be computed from these inputs: {error!r}") from error


class _Call:
    """One pass through the programs of a prompt or a step."""

    def __init__(
        self, wiring: Wiring, inputs: dict[str, np.ndarray], sequences: Sequences, tokens: np.ndarray, *, first: bool
    ):
        self.wiring, self.inputs, self.sequences, self.tokens, self.first = wiring, inputs, sequences, tokens, first
        self.place: int | None = None  # of the one token that goes through the programs now; None for all of them
        self.values: dict[str, Tensor] = {}
        self.wholes: dict[str, np.ndarray] = {}  # what a program for one token takes its places from, by input
        self.positions: dict[str, np.ndarray] = {}
        self.prepared: dict[str, dict[str, np.ndarray]] = {}

    def run(self, names: Sequence[str], *, by_token: bool = False) -> np.ndarray:
        """Run the programs, the last one for each token if `by_token`; the last position's logits
        `[batch, vocabulary]`."""
        *before, last = names
        for name in before:
            self._run(name)
        if by_token:
            for place in range(self.tokens.shape[1]):
                self.place = place
                self._run(last)
        else:
            self._run(last)
        self.sequences.state.length += self.tokens.shape[1]
        self.sequences.positions.update({rule: ids[..., -1:] for rule, ids in self.positions.items()})
        logits = self.wiring.backend.to_numpy(self.values["logits"])
        return logits[:, -1] if logits.ndim == 3 else logits

    def _run(self, name: str) -> None:
        backend, wires = self.wiring.backend, self.wiring.wires(name)
        buffers = self._buffers(wires) if wires.buffers else None
        feeds = {item.name: self._part(item, wires) for item in wires.others if self._wanted(item)}
        outputs = wires.call(backend.program(name), feeds, backend.to_numpy, buffers)
        self.values.update(outputs)
        if "encoder" in wires.entry.roles:
            self._check_placeholders(wires.entry, outputs)
        self.sequences.state.update(outputs, wires.replaced, wires.written)

    def _part(self, item: Input, wires: Wires) -> Tensor:
        """The value of one program input; where one token goes through the program, what belongs to it.

        That is its place along axes of one that are as long as the prompt, and all until there along those that grow.
        """
        if self.place is None or item.source.kind == "state":
            return self.value(item, wires)
        if item.name not in self.wholes:
            self.wholes[item.name] = self.wiring.backend.to_numpy(self.value(item, wires))
        array = self.wholes[item.name]
        if array.ndim < len(item.shape):
            raise BundleError(
                f"{wires.entry.name!r}'s input {item.name!r} has {len(item.shape)} axes in the manifest, what feeds it "
                f"has {array.ndim}"
            )
        for axis, size in enumerate(item.shape):
            if array.shape[axis] == self.tokens.shape[1] and size in (1, "total"):
                places = slice(self.place if size == 1 else 0, self.place + 1)
                array = array[(slice(None),) * axis + (places,)]
        return np.ascontiguousarray(array)

    def value(self, item: Input, wires: Wires) -> Tensor:
        """The value of one program input."""
        source = item.source
        if source.kind == "state":
            return self.sequences.state.exact(source.name or "", self.wiring.backend.to_numpy)
        if source.kind == "tokens":
            return _known_tokens(self.tokens, source)
        if source.kind == "mask":
            return self._mask(item, wires)
        if source.kind == "position":
            return self._positions(source, wires.keys[item.name]).astype(numpy_dtype(item.dtype), copy=False)
        if source.kind == "start":
            return np.array([self.sequences.state.length], np.int64)
        if source.kind == "output":
            return self.values[source.name or ""]
        if source.kind == "prepared":
            return self._prepare(source, wires.keys[item.name])[source.name or ""].astype(numpy_dtype(item.dtype))
        if source.kind == "constant":
            sizes = [size for size in item.shape if isinstance(size, int)]
            return np.full(sizes, source.value, numpy_dtype(item.dtype))
        return self._user(item, wires)

    def _mask(self, item: Input, wires: Wires) -> np.ndarray:
        mask = self.sequences.mask
        if CAPACITY not in item.shape:
            return mask
        room = self.sequences.state.room(next(iter(wires.buffers.values())))
        return np.pad(mask, ((0, 0), (0, room - mask.shape[1])))

    def _buffers(self, wires: Wires) -> Buffers:
        """What a program writes in place."""
        name, new, to_numpy = wires.entry.name, self.tokens.shape[1], self.wiring.backend.to_numpy
        return self.sequences.state.buffers(name, wires.buffers, new, to_numpy, few_sizes=wires.to_room)

    def _wanted(self, item: Input) -> bool:
        options = item.source.options
        return not options.get("unread") and (not options.get("optional") or item.source.name in self.inputs)

    def _user(self, item: Input, wires: Wires) -> np.ndarray:
        array = self.inputs.get(item.source.name or "")
        if array is None:
            raise InputError(
                f"the prompt's {wires.entry.name!r} needs the input {item.source.name!r}, which was not given"
            )
        dtype, shape = numpy_dtype(item.dtype), pieces.whole_shape(item)
        fits = array.ndim == len(shape) and all(
            isinstance(size, str) or size == got for size, got in zip(shape, array.shape, strict=True)
        )
        if not fits:
            raise InputError(f"{item.source.name}: expected shape {list(shape)}, got {list(array.shape)}")
        return _known_tokens(np.asarray(array, dtype, order="C"), item.source)

    def _positions(self, source: Source, key: str) -> np.ndarray:
        rule = source.rule or ""
        if key not in self.positions:
            if self.first:
                _check_grids(self.inputs, POSITION_INPUTS.get(rule, ()))
                with _refusing(f"position ids ({rule})"):
                    self.positions[key] = np.ascontiguousarray(position_ids(rule, self.inputs, source.options))
            else:
                last, new = self.sequences.positions[key], self.tokens.shape[1]
                self.positions[key] = last + (1 if new == 1 else np.arange(1, new + 1, dtype=np.int64))
        return self.positions[key]

    def _prepare(self, source: Source, key: str) -> dict[str, np.ndarray]:
        rule = source.rule or ""
        if key not in self.prepared:
            missing = [name for name in source.options.get("inputs", ()) if name not in self.inputs]
            if missing:
                raise InputError(f"the prompt needs the input {missing[0]!r}, which was not given")
            _check_grids(self.inputs, source.options.get("inputs", ()))
            with _refusing(f"the program's inputs ({rule})"):
                self.prepared[key] = PREPARERS[rule](self.inputs, source.options)
        return self.prepared[key]

    def _check_placeholders(self, entry: ProgramEntry, outputs: Mapping[str, Any]) -> None:
        """Refuse a prompt whose placeholder tokens aren't as many as the features that take their place."""
        images, kind = self.wiring.manifest.images, entry.modality or "media"
        token = self.wiring.manifest.placeholder_of(entry)
        name = next((item.name for item in entry.outputs if item.state is None and item.name != "logits"), None)
        if token is None or name is None:
            return
        features = self.wiring.backend.to_numpy(outputs[name])
        found, placeholders = features.size // features.shape[-1], int((self.inputs["input_ids"] == token).sum())
        if found != placeholders:
            each = images.tokens_per_image if images is not None and kind == "image" else None
            detail = f" ({placeholders / each:g} pictures' worth, {found / each:g} given)" if each else ""
            raise InputError(
                f"the prompt holds {placeholders} {kind} tokens, the {'pictures' if kind == 'image' else kind} "
                f"{'give' if kind == 'image' else 'gives'} {found} features{detail}: "
                f"one placeholder is needed for each {'picture' if kind == 'image' else 'feature'}"
            )
