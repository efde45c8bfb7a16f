"""The manifest: everything a runtime must know about a bundle, as frozen dataclasses.

The normative text is docs/format.md; docs/manifest.schema.json is generated from these classes.
"""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from genbundle.bundles.codec import encode
from genbundle.bundles.report import Verification

FORMAT = "genbundle"
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
    padding counted, that it may be called with. largest: the most that symbolic sizes of its inputs may be. memory: the
    bytes that its engine reserves for it beside the weights; programs that share a method share them. optimized:
    whether its engine's own optimizations are done already, so that opening it needn't look for any.
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
    memory: int | None = field(default=None, metadata=_FROM_1)
    optimized: bool = False

    @property
    def buffers(self) -> tuple[Input, ...]:
        """The inputs of state that it writes in place, tensors with room."""
        return tuple(item for item in self.inputs if item.source.kind == "state" and CAPACITY in item.shape)

    @property
    def in_place(self) -> dict[str, str]:
        """The outputs that are written into the tensor of an input: output -> input."""
        buffers = {item.source.name: item.name for item in self.buffers}
        return {output.name: buffers[output.state] for output in self.outputs if output.state in buffers}

    @property
    def attends_to_room(self) -> bool:
        """Whether it attends to its buffers from end to end, so that its mask is as long as they are."""
        return any(item.source.kind == "mask" and CAPACITY in item.shape for item in self.inputs)


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
    longer prompt of one sequence goes through the step's programs in pieces of at most so many tokens, so that what a
    call needs beside the state doesn't grow with the prompt; None for prompts that go through as a whole.
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

    def placeholder_of(self, program: Program) -> int | None:
        """The token that stands in a prompt once for each feature that an encoder gives; None where none is known."""
        if program.placeholder_id is None and program.modality == "image" and self.images is not None:
            return self.images.token_id
        return program.placeholder_id

    def to_json(self) -> str:
        """The manifest as it stands in the bundle, ending in a newline."""
        return json.dumps(encode(self), indent=1, ensure_ascii=False) + "\n"
