"""Whether a prompt's code repeats itself with the prompt's length, so that no program can have a free length."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_SHORT, _LONG = 9, 300  # longer than the chunks that scans work through


class _Operations(TorchDispatchMode):
    """Counts the operations of a run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def loop_over_length(module: torch.nn.Module, sample: Callable[[int], dict[str, torch.Tensor]]) -> str | None:
    """What stands against a program of `module` for prompts of any length: more operations the longer they are.

    A tracer would unroll the loop of the prompt that it is shown, at length and for that length alone. Code whose
    operations differ for prompts of one length too (by the experts they choose) is left to the tracer.
    """
    try:
        short, long, other = (_operations(module, sample(length)) for length in (_SHORT, _LONG, _LONG))
    except (RuntimeError, ValueError, TypeError, IndexError):  # a prompt longer than the model takes
        return None
    return f"its code loops over the prompt's length ({long} operations, {short})" if long == other > short else None


def _operations(module: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    with torch.no_grad(), _Operations() as operations:
        module(**inputs)
    return operations.count
