"""Reads a manifest: JSON, the types of its fields, and the rules that types don't say."""

import json
import math
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from genbundle.bundles.codec import decode
from genbundle.bundles.dtypes import DTYPE_NAMES
from genbundle.bundles.errors import BundleError, BundleVersionError
from genbundle.bundles.manifest import CAPACITY, FORMAT, FORMAT_VERSION, MANIFEST_NAME, Input, Manifest, Program, State

_MOST_ELEMENTS = 2**31


def parse_manifest(text: str) -> Manifest:
    """Parse and check a manifest; BundleError (BundleVersionError for a newer format) names what is wrong where."""
    try:
        value = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
        raise BundleError(f"{MANIFEST_NAME} is not JSON: {error}") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise BundleError(f"{MANIFEST_NAME} is not a genbundle manifest: Expected {FORMAT!r} - at `$.format`")
    version = value.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BundleError(f"Expected a format version, got {version!r} - at `$.version`")
    if version > FORMAT_VERSION:
        raise BundleVersionError(
            f"this bundle is of format version {version}, newer than the {FORMAT_VERSION} that is read here: "
            "upgrade genbundle, or build the bundle again with this version"
        )
    manifest = decode(Manifest, value)
    _check(manifest)
    return manifest


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BundleError(f"{MANIFEST_NAME} holds the key {twice!r} twice in one object")
    return dict(pairs)


def check_path(name: str, path: str) -> None:
    """BundleError unless `name` is a plain relative path that stays inside the bundle."""
    parts = PurePosixPath(name).parts
    plain = name and "\\" not in name and ":" not in name and "\0" not in name and str(PurePosixPath(name)) == name
    if not plain or name.startswith("/") or ".." in parts or name == MANIFEST_NAME:
        raise BundleError(f"Expected a file path inside the bundle, got {name!r} - at `{path}`")


def _check(manifest: Manifest) -> None:
    """The rules that types don't say: names that must resolve, files that must be listed."""
    for name, file in manifest.files.items():
        check_path(name, "$.files")
        if file.size < 0 or len(file.sha256) != 64:
            raise BundleError(f"Expected a size and a sha256 - at `$.files.{name}`")
    named = {"$.weights": manifest.weights}
    if manifest.text is not None:
        named |= {"$.text.tokenizer": manifest.text.tokenizer, "$.text.chat_template": manifest.text.chat_template}
    named |= {f"$.programs[{index}].file": program.file for index, program in enumerate(manifest.programs)}
    for path, name in named.items():
        if name is not None and name not in manifest.files:
            raise BundleError(f"Expected a file listed in `$.files`, got {name!r} - at `{path}`")
    names = [program.name for program in manifest.programs]
    if len(set(names)) != len(names):
        raise BundleError("Expected distinct program names - at `$.programs`")
    states = {state.name: state for state in manifest.state}
    for index, program in enumerate(manifest.programs):
        _check_program(program, states, f"$.programs[{index}]")
    for index, state in enumerate(manifest.state):
        _check_shape(state.shape, f"$.state[{index}].shape")
        if state.dtype not in DTYPE_NAMES:
            raise BundleError(f"Expected a dtype name, got {state.dtype!r} - at `$.state[{index}].dtype`")
        if state.axis is not None and not 0 <= state.axis < len(state.shape):
            raise BundleError(f"Expected one of the shape's axes, got {state.axis} - at `$.state[{index}].axis`")
    if manifest.flow.chunk is not None and not manifest.flow.continues:
        raise BundleError("Expected null, since the step's programs don't continue a prompt - at `$.flow.chunk`")
    if manifest.images is not None and manifest.images.placeholder == "":
        raise BundleError("Expected a text that isn't empty - at `$.images.placeholder`")
    routes = [(f"$.flow.prompt[{i}].programs", route.programs) for i, route in enumerate(manifest.flow.prompt)]
    for path, used in [*routes, ("$.flow.step", manifest.flow.step)]:
        if not used:
            raise BundleError(f"Expected at least one program - at `{path}`")
        for name in used:
            if name not in names:
                raise BundleError(f"Expected the name of a program, got {name!r} - at `{path}`")
    if not routes:
        raise BundleError("Expected at least one route - at `$.flow.prompt`")


def _check_shape(shape: tuple[int | str, ...], path: str) -> None:
    """The fixed sizes of a tensor that a runtime may have to make must not ask for terabytes."""
    fixed = [size for size in shape if isinstance(size, int)]
    if any(size < 0 for size in fixed) or math.prod(fixed) > _MOST_ELEMENTS:
        raise BundleError(f"Expected sizes of at least 0 and at most {_MOST_ELEMENTS} elements - at `{path}`")


def _check_program(program: Program, states: Mapping[str, State], path: str) -> None:
    for part, values in (("inputs", program.inputs), ("outputs", program.outputs)):
        for index, value in enumerate(values):
            if value.dtype not in DTYPE_NAMES:
                raise BundleError(f"Expected a dtype name, got {value.dtype!r} - at `{path}.{part}[{index}].dtype`")
            _check_shape(value.shape, f"{path}.{part}[{index}].shape")
        if len({value.name for value in values}) != len(values):
            raise BundleError(f"Expected distinct names - at `{path}.{part}`")
    replaced = [output.state for output in program.outputs if output.state is not None]
    written = [item.source.name for item in program.buffers]
    for part, entries in (("outputs", replaced), ("inputs", written)):
        if len(set(entries)) != len(entries):
            raise BundleError(f"Expected each state once - at `{path}.{part}`")
    if program.buffers and any(item.source.options.get("pieces") for item in program.inputs):
        raise BundleError(f"Expected no `pieces` where state is written in place - at `{path}.inputs`")
    for index, item in enumerate(program.inputs):
        if item.source.kind in ("user", "state", "output", "prepared") and item.source.name is None:
            raise BundleError(f"Missing field `name` - at `{path}.inputs[{index}].source`")
        read = item.source.options.get("inputs", [])
        if not isinstance(read, list) or not all(isinstance(name, str) for name in read):
            raise BundleError(f"Expected names of inputs, got {read!r} - at `{path}.inputs[{index}].source.options`")
        below = item.source.options.get("below")
        if below is not None and type(below) is not int:
            raise BundleError(f"Expected a number, got {below!r} - at `{path}.inputs[{index}].source.options.below`")
        if item.source.kind == "constant" and item.source.value is None:
            raise BundleError(f"Missing field `value` - at `{path}.inputs[{index}].source`")
        names = {other.name for other in program.inputs}
        kinds = {"each", "offsets", "sizes", "grid", "mask"}
        for option, others in (("pieces", kinds), ("sizes", set()), ("grid", set()), ("mask", set())):
            by = item.source.options.get(option)
            if by is not None and not (isinstance(by, str) and by in names | others):
                raise BundleError(
                    f"Expected an input's name, got {by!r} - at `{path}.inputs[{index}].source.options.{option}`"
                )
        entry = states.get(item.source.name or "") if item.source.kind == "state" else None
        if item.source.kind == "state" and entry is None:
            raise BundleError(f"Expected a state entry, got {item.source.name!r} - at `{path}.inputs[{index}].source`")
        if CAPACITY in item.shape and not _hides_room(item, program):
            axis = None if entry is None else entry.axis
            written = any(output.state == item.source.name for output in program.outputs)
            alike = entry is not None and entry.shape == item.shape
            if axis is None or axis != item.shape.index(CAPACITY) or not (written and alike):
                raise BundleError(
                    f"Expected a state that grows along that axis and an output for it - at `{path}.inputs[{index}]`"
                )
    for index, item in enumerate(program.outputs):
        if item.state is not None and item.state not in states:
            raise BundleError(f"Expected a state entry, got {item.state!r} - at `{path}.outputs[{index}].state`")


def _hides_room(item: Input, program: Program) -> bool:
    """Whether it is the mask of a program whose state has that room."""
    return item.source.kind == "mask" and item.shape[1:] == (CAPACITY,) and bool(program.buffers)
