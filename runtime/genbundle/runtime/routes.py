"""Which of a bundle's ways a prompt goes through its programs, and how much of it at once."""

import math
from collections.abc import Iterable, Mapping

import numpy as np

from genbundle.bundles import InputError, Manifest
from genbundle.bundles.manifest import Program, Route
from genbundle.runtime.inputs import TEXT_INPUTS, token_ids, token_mask
from genbundle.runtime.positions import POSITION_INPUTS


class Routes:
    """The manifest's routes. `user_inputs`: the inputs that programs take from the caller, besides text."""

    def __init__(self, manifest: Manifest):
        self.manifest = manifest
        self._entries = {program.name: program for program in manifest.programs}
        self.user_inputs = _inputs_of(manifest.programs)

    def choose(self, inputs: Mapping[str, np.ndarray]) -> Route:
        """The route for these inputs; InputError for inputs that none takes, or that a route would ignore."""
        given = {name for name in inputs if name not in TEXT_INPUTS}
        unknown = given - self.user_inputs.keys()
        if unknown:
            accepted = ", ".join([*TEXT_INPUTS, *self.user_inputs])
            raise InputError(f"this bundle takes no input {sorted(unknown)[0]!r}; it takes {accepted}")
        routes = [route for route in self.manifest.flow.prompt if given.issuperset(route.needs)]
        if not routes:
            needs = " or ".join(str(list(route.needs)) for route in self.manifest.flow.prompt)
            raise InputError(f"this bundle's prompt needs the inputs {needs}, got {sorted(given) or 'text alone'}")
        best = self._long_enough(routes, token_ids(inputs).shape[1])
        # Pictures without what belongs to them would be ignored without a word by a route for text alone.
        needed = {name for route in self.manifest.flow.prompt for name in route.needs}
        left = sorted((given & needed) - self._read_by(best))
        if left:
            other = next(route for route in self.manifest.flow.prompt if left[0] in route.needs)
            missing = sorted(set(other.needs) - given)
            raise InputError(f"the input {left[0]!r} needs {', '.join(missing)} beside it, which was not given")
        return best

    def _long_enough(self, routes: list[Route], length: int) -> Route:
        """Of the routes that need most, the first whose programs take so few tokens."""
        most = max(len(route.needs) for route in routes)
        least = [
            (max(self._entries[name].least for name in route.programs), route)
            for route in routes
            if len(route.needs) == most
        ]
        best = next((route for fewest, route in least if fewest <= length), None)
        if best is None:
            fewest = min(fewest for fewest, _ in least)
            raise InputError(f"the prompt has {length} tokens, this bundle takes such prompts of {fewest} and more")
        return best

    def _read_by(self, route: Route) -> set[str]:
        return set(_inputs_of(self._entries[name] for name in route.programs))

    def at_once(self, inputs: Mapping[str, np.ndarray], route: Route) -> int:
        """How many of a prompt's tokens go through the programs at once."""
        length = token_ids(inputs).shape[1]
        if route.one_by_one:
            return 1 if len(route.programs) == 1 else length
        chunk, restart = self.manifest.flow.chunk, self.manifest.flow.restart
        if restart is not None and length > restart:
            return length  # each token's position counts by how many there are
        plain = (
            route.programs == self.manifest.flow.step
            and inputs.keys() <= set(TEXT_INPUTS)
            and len(token_ids(inputs)) == 1
        )
        if chunk is None or length <= chunk or not plain or not token_mask(inputs).all():
            return length
        # Of about the same length, where there are few: a last one of few tokens would read every weight for these.
        return math.ceil(length / math.ceil(length / chunk))

    def together(self, inputs: dict[str, np.ndarray]) -> bool:
        """Whether the programs take these sequences in one call; else each needs calls of its own, without padding."""
        most = self.manifest.flow.batch
        if most is not None and len(token_ids(inputs)) > most:
            return False
        route = self.choose(inputs)
        return not route.one_by_one or route.padded or bool(token_mask(inputs).all())

    def takes_padding(self, inputs: dict[str, np.ndarray]) -> bool:
        """Whether the programs take sequences with padding: what eager gives may depend on it."""
        route = self.choose(inputs)
        if route.one_by_one or route.padded:
            return route.padded
        return any(item.source.kind == "mask" for name in route.programs for item in self._entries[name].inputs)


def _inputs_of(programs: Iterable[Program]) -> dict[str, None]:
    """What programs take from the caller besides text, themselves or through a rule."""
    names: dict[str, None] = {}
    for program in programs:
        for item in program.inputs:
            if item.source.kind == "user" and item.source.name not in TEXT_INPUTS:
                names[item.source.name or ""] = None
            names.update(dict.fromkeys(POSITION_INPUTS.get(item.source.rule or "", ())))
            if item.source.kind == "prepared":
                names.update(dict.fromkeys(item.source.options.get("inputs", ())))
    return names
