"""torch.export programs compiled by AOTInductor for the device they run on, and the cache of what was compiled."""

import hashlib
import json
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genbundle.bundles import EngineError
from genbundle.runtime.backends.torch_packages import BOUNDS, load_package, one_line, package_folder, store_package
from genbundle.runtime.backends.torch_trust import broken_bound, expect_harmless, expect_open_sizes, upper_bounds

# Part of the key: packages that another version of this module made aren't found.
_VERSION = 2
_OPTIONS = {
    "aot_inductor.package": True,
    # There are none: weights are inputs, like all others (`_lifted`).
    "aot_inductor.package_constants_in_so": False,
    # Sizes begin at 0, whatever was traced; this check, run where AOTI_RUNTIME_CHECK_INPUTS is set, would refuse 1.
    "aot_inductor.check_lowerbound": False,
}


def compiled_module(torch: Any, exported: Any, *, archive: bytes, device: str, program: str) -> "CompiledModule":
    """The program as AOTInductor compiles it for `device`, taken from the user's cache if it was compiled before.

    A package is machine code, so none is ever taken from a bundle: only from a folder that this user alone writes to.

    Args:
        torch: the module.
        exported: the ExportedProgram, on `device`, with its weights.
        archive: the bytes of its file, which say all that is compiled: the weights are inputs.
        device: "cpu", "cuda" or "cuda:1".
        program: its name, and its bundle's, for errors.

    Raises:
        EngineError: it can't be compiled or loaded, or the cache can't be used; names the program and the cause.
    """
    expect_harmless(exported, program)
    inputs, weights = _lifted(exported, program)
    package = package_folder() / f"{_key(torch, archive, device)}.pt2"
    loaded = load_package(torch, package, device, program)
    if loaded is None:  # not there yet, or damaged
        _compile(exported, package, program)
        loaded = load_package(torch, package, device, program)
    if loaded is None:
        raise EngineError(f"{program}: what AOTInductor compiled can't be loaded: {package}")
    loader, bounds = loaded
    outputs = list(exported.call_spec.out_spec.context)
    return CompiledModule(loader, inputs, weights, outputs, bounds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """What a program was compiled to take; a size is a number, a symbol or an expression of symbols.

    rows: those of the table in which its numbers are looked up.
    """

    name: str
    dtype: Any
    device: str
    shape: tuple[Any, ...]
    rows: int | None

    def expect(self, tensor: Any, sizes: dict[Any, int]) -> None:
        """ValueError for a tensor that the machine code would read past the end of, or misread.

        sizes: what the symbols stand for in this call, completed here.
        """
        fits = tensor.dtype == self.dtype and tensor.device.type == self.device and tensor.dim() == len(self.shape)
        if not fits or any(
            size != _number(expected, size, sizes) for size, expected in zip(tensor.shape, self.shape, strict=True)
        ):
            raise ValueError(
                f"the input {self.name!r} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, compiled for "
                f"{self.dtype} {list(self.shape)} on {self.device}, where {sizes}"
            )
        # The code checks it too, but on a CPU inside of OpenMP's threads, where an exception ends the process. On a
        # GPU, looking would mean to wait for it in each step.
        if self.rows is not None and self.device == "cpu" and tensor.numel():
            least, most = tensor.min().item(), tensor.max().item()
            if least < 0 or most >= self.rows:
                raise ValueError(f"the input {self.name!r} holds {least} to {most}, its table has {self.rows} rows")


def _number(expected: Any, found: int, sizes: dict[Any, int]) -> Any:
    """What a size has to be; the first size found for a symbol is what the symbol stands for."""
    if isinstance(expected, int):
        return expected
    return sizes.setdefault(expected, found) if expected.is_symbol else expected.xreplace(sizes)


class CompiledModule:
    """One compiled program, called with its inputs by name; the weights go in with every call, shared and uncopied."""

    def __init__(
        self,
        loader: Any,
        inputs: Sequence[Input],
        weights: Sequence[Any],
        outputs: Sequence[str],
        bounds: Sequence[Any],
    ):
        self._loader, self._inputs, self._weights, self._outputs = loader, inputs, weights, outputs
        self._bounds = bounds

    def __call__(self, **given: Any) -> dict[str, Any]:
        """Run it; ValueError for inputs that it wasn't compiled for, RuntimeError where it fails."""
        sizes: dict[Any, int] = {}
        feeds = list(self._weights)
        for item in self._inputs:
            item.expect(given[item.name], sizes)
            feeds.append(given[item.name].contiguous())
        broken = broken_bound(self._bounds, sizes)
        if broken is not None:
            raise ValueError(f"the inputs are larger than what it was compiled for: {broken}, where {sizes}")
        return dict(zip(self._outputs, self._loader.boxed_run(feeds), strict=True))


def _lifted(exported: Any, program: str) -> tuple[list[Input], list[Any]]:
    """The user's inputs, and the tensors that the graph takes before them: weights, buffers, constants.

    They stay inputs. AOTInductor's constants are copied into the package or, handed over as the caller's own
    (`load_constants(..., user_managed=True)`), never freed again by torch 2.13; and what is small or uniform among
    them would be written into the code, which then holds for one set of weights only.
    """
    from torch.export.graph_signature import InputKind, OutputKind

    signature = exported.graph_signature
    lifted = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    kinds = [spec.kind for spec in signature.input_specs]
    first = len(kinds) - kinds.count(InputKind.USER_INPUT)
    positional, named = exported.call_spec.in_spec.children()
    if (
        not all(kind in lifted for kind in kinds[:first])
        or any(spec.kind != OutputKind.USER_OUTPUT for spec in signature.output_specs)
        or positional.num_children
        or exported.call_spec.out_spec.type is not dict
    ):
        raise EngineError(f"{program}: writes into its buffers or has unnamed inputs, and can't be compiled")
    weights = [
        (exported.constants if spec.target in exported.constants else exported.state_dict)[spec.target]
        for spec in signature.input_specs[:first]
    ]
    nodes, rows = list(exported.graph.find_nodes(op="placeholder")), _table_rows(exported.graph)
    for weight, node in zip(weights, nodes[:first], strict=True):
        value = node.meta["val"]
        if weight.dtype != value.dtype or list(weight.shape) != list(map(_size, value.shape)):
            raise EngineError(f"{program}: its code would read {node.name!r} with another shape or dtype than it has")
    inputs = [
        Input(
            name=name,
            dtype=node.meta["val"].dtype,
            device=node.meta["val"].device.type,
            shape=tuple(map(_size, node.meta["val"].shape)),
            rows=rows.get(node),
        )
        for name, node in zip(named.context, nodes[first:], strict=True)
    ]
    return inputs, [weight.detach().contiguous() for weight in weights]


def _table_rows(graph: Any) -> dict[Any, int]:
    """For each node whose numbers are looked up in a table, as they are or in another shape, the table's rows."""
    import torch

    aten = torch.ops.aten
    same = (aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.clone.default)
    found: dict[Any, int] = {}
    for node in graph.find_nodes(op="call_function", target=aten.embedding.default):
        table, index = node.args[:2]
        while index.op == "call_function" and index.target in same:
            index = index.args[0]
        found[index] = min(table.meta["val"].shape[0], found.get(index, table.meta["val"].shape[0]))
    return found


def _size(size: Any) -> Any:
    return size if isinstance(size, int) else size.node.expr


def _key(torch: Any, archive: bytes, device: str) -> str:
    """What a package depends on: the program, who compiles it with which settings, and the processors it is for."""
    from torch._inductor import config

    settings = config.save_config_portable()
    del settings["aot_inductor.metadata"]  # written by the last compilation
    gpu = [torch.cuda.get_device_name(device), *torch.cuda.get_device_capability(device)] if device != "cpu" else []
    facts = {
        "version": _VERSION,
        "options": _OPTIONS,
        "program": hashlib.sha256(archive).hexdigest(),
        "torch": torch.__version__,
        "settings": {name: repr(value) for name, value in settings.items()},
        "device": [device, *gpu],
        # Compiled with -march=native, and for a number of threads.
        "cpu": dict(torch.cpu.get_capabilities()),
        "threads": torch.get_num_threads(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _compile(exported: Any, package: Path, program: str) -> None:
    """Compile the program into the file `package`, which appears there whole or not at all."""
    from torch._inductor import aot_compile
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.utils import fresh_cache
    from torch.export.pt2_archive._package import package_pt2

    # Inputs of other strides are copied before a call.
    examples = tuple(node.meta["val"].contiguous() for node in exported.graph.find_nodes(op="placeholder"))
    failure = None
    # Inductor's own folder is one below /tmp that anybody may have made, and keeps all that was ever compiled.
    with tempfile.TemporaryDirectory() as work, fresh_cache(dir=work, delete=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = Path(work, "made.pt2")
        try:
            get_cpp_compiler()  # raises where there is none, before the minutes that come first otherwise
            files: Any = aot_compile(exported.graph_module, examples, options=dict(_OPTIONS))
            expect_open_sizes(examples)
            bounds = json.dumps(upper_bounds(exported, examples))
            package_pt2(str(made), aoti_files=files, extra_files={BOUNDS: bounds})
        except Exception as error:  # from the C++ compiler's to assertions: torch has no common base
            failure = error
        else:
            store_package(made, package)
    if failure is not None:
        raise EngineError(f"{program}: AOTInductor can't compile it here: {one_line(failure)}") from failure
