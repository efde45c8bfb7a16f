"""What a backend gives the runtime: programs to call, and its tensors as numpy."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

Tensor = Any  # numpy on the way in; on the way out the engine's own handle, which may go in again uncopied


class Program(Protocol):
    """One program, called with its inputs by name; returns its outputs by name, as the engine's own tensors."""

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]: ...


class Backend(Protocol):
    """An engine with a bundle's programs opened on a device."""

    device: str

    def program(self, name: str) -> Program:
        """The program of that name, opened when it is first asked for."""
        ...

    def to_numpy(self, tensor: Tensor) -> np.ndarray:
        """A tensor of this engine (or a numpy array) as a numpy array."""
        ...
