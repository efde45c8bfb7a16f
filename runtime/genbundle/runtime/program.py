"""What a backend gives the runtime: programs to call, and its tensors as numpy."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

Tensor = Any  # numpy on the way in; on the way out the engine's own handle, which may go in again uncopied


class Buffers(dict[str, Tensor]):
    """What a program writes in place, by the names of its inputs: numpy at first, then the engine's own tensors.

    The same object from call to call for as long as it holds the same tensors. bound: what the engine made of them for
    its next call, which ends with them.
    """

    bound: Any = None


class Program(Protocol):
    """One program, called with its inputs by name; returns its outputs by name, as the engine's own tensors.

    buffers: its inputs that it writes in place, all of them; None where it has none. Outputs may be left out that are
    the very tensors that went in.
    """

    def __call__(self, inputs: Mapping[str, Tensor], buffers: Buffers | None = None) -> dict[str, Tensor]: ...


class Backend(Protocol):
    """An engine with a bundle's programs opened on a device."""

    device: str

    def program(self, name: str) -> Program:
        """The program of that name, opened when it is first asked for."""
        ...

    def to_numpy(self, tensor: Tensor) -> np.ndarray:
        """A tensor of this engine (or a numpy array) as a numpy array."""
        ...
