"""The manifest: everything a runtime must know about a bundle, as frozen dataclasses. The only validation of it.

The normative text is docs/format.md; docs/manifest.schema.json is generated from these classes.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

from genbundle.bundles.codec import decode, encode
from genbundle.bundles.dtypes import DTYPE_NAMES
from genbundle.bundles.errors import BundleError, BundleVersionError
from genbundle.bundles.report import Verification

FORMAT = "genbundle"
_MOST_ELEMENTS = 2**31
_FROM_1 = {"minimum": 1}
FORMAT_VERSION = 1
CAPACITY = "capacity"
MANIFEST_NAME = "manifest.json"

Backend = Literal["cpu", "cuda", "xnnpack", "torch"]
BACKENDS: tuple[str, ...] = ("cpu", "cuda", "xnnpack", "torch")
Role = Literal["encoder", "projector", "merge", "language_model", "lm_head", "decode"]
SourceKind = Literal["user", "tokens", "mask", "position", "start", "state", "output", "prepared", "constant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the runtime takes one program input from.

    kind: `user` (a generation input of that `name`), `tokens` (the new token ids), `mask` (the padding mask up to and
    including the new tokens), `position` (computed by `rule`), `start` (the number of tokens already in the state),
    `state` (the state entry of that `name`), `output` (an earlier program's output of that `name`), `prepared` (output
    `name` of the preparer `rule`), `constant` (`value`).
    """

    kind: SourceKind
    name: str | None = None
    rule: str | None = None
    value: float | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One program input: a tensor, or a scalar-shaped one; symbolic axes are named by strings."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One program output; `state` names the state entry that it replaces."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    state: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One exported program; `roles` lists what was fused into it, in the order of the computation.

    placeholder_id: the token that stands in a prompt once for each row of the program's first output beside logits and
    state, its features; `images.token_id` for an encoder of pictures that says nothing. least: the fewest tokens,
    padding counted, that it may be called with. largest: the most that symbolic sizes of its inputs may be.
    """

    name: str
    file: str
    roles: tuple[Role, ...]
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    modality: str | None = None
    placeholder_id: int | None = None
    least: int = field(default=1, metadata=_FROM_1)
    largest: dict[str, int] = field(default_factory=dict)
    method: str | None = None
    precision: str = "fp32"


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """One piece of generation state that the runtime carries from call to call; `axis` grows with the tokens.

    Where that axis is named CAPACITY, programs write the new tokens' part in place: they take a tensor with room for
    them, of any size from there on, as input and as output.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    axis: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The programs that take a prompt when the user inputs `needs` (besides text) are given.

    Of several, the one that needs most is taken. one_by_one: `programs` take a prompt's first token and the step's each
    further one, without padding, so that a prompt goes through them token by token, row by row; of several programs,
    only the last goes by token. padded: padding goes through like any other token, since the model itself takes it so.
    """

    programs: tuple[str, ...]
    needs: tuple[str, ...] = ()
    one_by_one: bool = False
    padded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """How the programs make a generation: one of the `prompt` routes, then `step` for every further token.

    batch: the most sequences that one call of the programs takes; None for any number. alone: more than `batch` are
    refused, since the original model answers a sequence otherwise in a batch than alone. continues: the step's programs
    take several new tokens after a past, so that a prompt may be continued. capacity: the most tokens (prompt and
    generated) that the state holds; None when only the model's own limit stands. restart: a sequence of so many tokens
    is run again as a whole, from an empty state, with the next token; None for models that don't need it. chunk: a
    longer prompt of one sequence goes through the step's programs in pieces of so many tokens, so that what a call
    needs beside the state doesn't grow with the prompt; None for prompts that go through as a whole.
    """

    prompt: tuple[Route, ...]
    step: tuple[str, ...]
    batch: int | None = field(default=None, metadata=_FROM_1)
    alone: bool = False
    continues: bool = False
    capacity: int | None = field(default=None, metadata=_FROM_1)
    restart: int | None = field(default=None, metadata=_FROM_1)
    chunk: int | None = field(default=None, metadata=_FROM_1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixToken:
    """A token after the start token of an encoder-decoder's sequences, which an option of `generate` chooses.

    option: the option's name, None where there is no choice. tokens: its values in lower case, and the token of each.
    default: the token where no option of the prefix is given; beside: where that other option is given and this one
    isn't; None and absent leave the token out, unless `detect`: then it is the most probable of `tokens`.
    """

    option: str | None = None
    tokens: dict[str, int] = field(default_factory=dict)
    default: int | None = None
    beside: dict[str, int] = field(default_factory=dict)
    detect: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Timestamps:
    """Tokens that are times, in pairs around text: `first` and all above it, in order.

    without: the token that ends the prefix of a generation without times. latest: how many times after `first` the
    first one of a sequence may be.
    """

    first: int
    without: int
    latest: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptEdit:
    """What the model's own generate makes of a prompt's tokens before it goes on from them: without the last `dropped`,
    and with `first` in the place of each row's first, unless that is None. The sequences begin with what it made.
    """

    first: int | None = None
    dropped: int = field(default=0, metadata={"minimum": 0})


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What the model's own generation config asks for; a caller's options win over `options`.

    decoder_start_token_id: the token that an encoder-decoder's sequences begin with. The tokens are then those of the
    decoder (the input `decoder_input_ids`), and `input_ids`, if there are any, belong to the encoder. prefix: what
    comes after it, where the caller gives no tokens.
    """

    eos_token_ids: tuple[int, ...] = ()
    decoder_start_token_id: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    prefix: tuple[PrefixToken, ...] = ()
    timestamps: Timestamps | None = None
    prompt_edit: PromptEdit | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """How text becomes token ids: files of the bundle, and what the tokenizer adds on its own."""

    tokenizer: str
    chat_template: str | None = None
    special_tokens: dict[str, str] = field(default_factory=dict)
    padding_token_id: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """How pictures become `pixel_values`: the steps of the model's processor as data, done by Pillow and numpy.

    input: the generation input that the pixels go to. placeholder: the text that stands for one picture in a prompt;
    it is replaced by `expansion`. steps: the processor's operations in order, each `{"op": name, ...options}`. When the
    processor's work isn't described, `steps` is empty and `reason` says why: such a model takes ready arrays.
    """

    input: str
    token_id: int | None = None
    placeholder: str | None = None
    expansion: str | None = None
    tokens_per_image: int | None = None
    per_prompt: int | None = None
    steps: tuple[dict[str, Any], ...] = ()
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Runner:
    """A runtime other than genbundle's own, made for files like the bundle's: whether it runs them as they are.

    obstacle: why it can't; None where it can. prefix: what a prompt has to begin with there, the special tokens
    that the bundle's tokenizer adds by itself. differs: what it does otherwise than the bundle says, in sentences.
    """

    name: str
    obstacle: str | None = None
    prefix: str = ""
    differs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """Size in bytes and sha256 of one file of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What the bundle was built from; `weight_bytes` counts every distinct weight once, at the bundle's precision."""

    architecture: str
    name: str
    parameters: int
    weight_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything a runtime must know about a bundle."""

    format: str
    version: int
    backend: Backend
    model: Model
    flow: Flow
    programs: tuple[Program, ...]
    state: tuple[State, ...]
    generation: Generation
    files: dict[str, File]
    precision: str = "fp32"
    weights: str | None = None
    text: Text | None = None
    images: Images | None = None
    runners: tuple[Runner, ...] = ()
    verification: Verification | None = None
    notes: tuple[str, ...] = ()
    packages: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def program(self, name: str) -> Program:
        """The program of that name; KeyError without one."""
        for program in self.programs:
            if program.name == name:
                return program
        raise KeyError(name)

    def to_json(self) -> str:
        """The manifest as it stands in the bundle, ending in a newline."""
        return json.dumps(encode(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
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
        manifest = decode(cls, value)
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
    for index, item in enumerate(program.inputs):
        if item.source.kind in ("user", "state", "output", "prepared") and item.source.name is None:
            raise BundleError(f"Missing field `name` - at `{path}.inputs[{index}].source`")
        read = item.source.options.get("inputs", [])
        if not isinstance(read, list) or not all(isinstance(name, str) for name in read):
            raise BundleError(f"Expected names of inputs, got {read!r} - at `{path}.inputs[{index}].source.options`")
        if item.source.kind == "constant" and item.source.value is None:
            raise BundleError(f"Missing field `value` - at `{path}.inputs[{index}].source`")
        names = {other.name for other in program.inputs}
        kinds = {"each", "offsets", "sizes", "grid", "mask"}
        for option, others in (("pieces", kinds), ("sizes", set()), ("grid", set()), ("mask", set())):
            by = item.source.options.get(option)
            if by is not None and by not in names | others:
                raise BundleError(
                    f"Expected an input's name, got {by!r} - at `{path}.inputs[{index}].source.options.{option}`"
                )
        entry = states.get(item.source.name or "") if item.source.kind == "state" else None
        if item.source.kind == "state" and entry is None:
            raise BundleError(f"Expected a state entry, got {item.source.name!r} - at `{path}.inputs[{index}].source`")
        if CAPACITY in item.shape:
            axis = None if entry is None else entry.axis
            written = any(output.state == item.source.name for output in program.outputs)
            if axis is None or axis != item.shape.index(CAPACITY) or not written:
                raise BundleError(
                    f"Expected a state that grows along that axis and an output for it - at `{path}.inputs[{index}]`"
                )
    for index, item in enumerate(program.outputs):
        if item.state is not None and item.state not in states:
            raise BundleError(f"Expected a state entry, got {item.state!r} - at `{path}.outputs[{index}].state`")
