"""Whether a prompt's code repeats itself with the prompt's length, so that no program can have a free length."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from genbundle.builder.exporting import MODEL_ERRORS

# A scan through chunks may take another branch for one of them than for several, which adds operations once; a loop
# goes on adding. The second pair is for models that take no longer prompts.
_LENGTHS = ((300, 600), (9, 300))


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
    for shorter, longer in _LENGTHS:
        try:
            short, long, other = (_operations(module, sample(length)) for length in (shorter, longer, longer))
        except MODEL_ERRORS:  # a prompt longer than the model takes
            continue
        if long == other > short:
            return f"its code loops over the prompt's length ({long} operations, {short})"
        return None
    return None


def _operations(module: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    with torch.no_grad(), _Operations() as operations:
        module(**inputs)
    return operations.count
