"""pack_bundle: what transformers exported becomes a bundle, without exporting it again."""

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from transformers import PreTrainedModel

from genbundle.builder.attempts import package_versions
from genbundle.builder.build import writing
from genbundle.builder.formats.onnx import forget_shapes, write_models
from genbundle.builder.limits import Limits, limits_of
from genbundle.builder.loading import Loaded, borrowed, load, load_processor
from genbundle.builder.passes.tied_weights import share_transposed_weights
from genbundle.builder.processing import describe_generation, describe_text
from genbundle.builder.progress import show_progress
from genbundle.builder.samples import make_samples
from genbundle.builder.upstream import UpstreamExport, read_export
from genbundle.builder.verify import new_tokens, record, verify_staged
from genbundle.builder.weights import WEIGHTS_NAME
from genbundle.bundles import BuildError, Bundle, UnsupportedModelError, VerificationError
from genbundle.bundles.manifest import (
    FORMAT,
    FORMAT_VERSION,
    Flow,
    Input,
    Manifest,
    Output,
    Program,
    Role,
    Route,
    Source,
    State,
)
from genbundle.bundles.manifest import Model as ModelFacts
from genbundle.bundles.writer import BundleWriter, check_target, new_bundle
from genbundle.runtime import Model, load_bundle
from genbundle.runtime.verify import LOGIT_TOLERANCE

_SOURCES = {
    "input_ids": Source(kind="tokens"),
    "attention_mask": Source(kind="mask"),
    # What generate gives every decoder that it doesn't know better.
    "position_ids": Source(kind="position", rule="cumsum"),
}
_KINDS = {"keys": "key", "values": "value"}
_STEPS = 6


def pack_bundle(
    directory: str | Path,
    *,
    model: PreTrainedModel | str | Path | None = None,
    processor: Any = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: bool | Callable[[str], None] = True,
) -> Bundle:
    """Make a bundle for the backend "cpu" of a directory that transformers' `ExportedModel.save_pretrained` wrote.

    Its graphs are taken as they are, each weight once. That needs the components of a text decoder, `prefill` and
    `decode`, or a `decode` of several tokens, in ONNX, exported with `dynamic=True`.

    Args:
        directory: what `OnnxExporter().export_for_generation(...).save_pretrained(directory)` wrote.
        model: the model that was exported, or its directory or hub id: the bundle is then replayed on held-out inputs
            and compared with it, as a build's is. Without it, prompt and step programs are compared with each other,
            and the manifest says that nothing was compared with the model.
        processor: its tokenizer, or where to load that from; False for a bundle that takes token ids. By default the
            one in `directory`, or else the model's.
        output: the bundle's directory; `NAME-cpu.bundle` here by default.
        overwrite: replace a bundle that is at `output`.
        progress: True for a progress bar, False for silence, or a callable that gets each stage's name.

    Raises:
        BuildError: what isn't such a directory, or is damaged, or has no tokenizer.
        UnsupportedModelError: names the missing component, or the input that nothing explains.
        VerificationError: the programs gave other tokens than the model, or than one another.
    """
    folder = Path(directory)
    target = Path(output) if output is not None else Path(f"{folder.absolute().name}-cpu.bundle")
    check_target(target.absolute(), overwrite=overwrite)
    with show_progress(progress, stages=4) as announce:
        announce("read the export")
        export = read_export(folder)
        loaded = load(model, processor or None) if model is not None else None
        processor = _processor(folder, processor, loaded)
        limits = limits_of(export.model, "cpu", None)
        with writing(target), new_bundle(target, overwrite=overwrite) as writer:
            announce("write the programs")
            manifest = _manifest(export, processor, limits, writer.path)
            announce("verify")
            if loaded is not None:
                manifest = _verified(export, loaded, limits, manifest, writer)
            else:
                manifest = _compared(manifest, writer)
            announce("publish")
            return writer.commit(manifest)


def _processor(folder: Path, given: Any, loaded: Loaded | None) -> Any:
    if given is False:
        return None
    if given is not None:
        return loaded.processor if loaded is not None else load_processor(given)
    found = load_processor(folder) if (folder / "tokenizer_config.json").is_file() else None
    found = found or (loaded.processor if loaded is not None else None)
    if found is None:
        raise BuildError(
            f"pack: {str(folder)!r} holds no tokenizer: save it there (tokenizer.save_pretrained), name where it is "
            "(processor=, --tokenizer), or ask for a bundle that takes token ids (processor=False, --no-tokenizer)"
        )
    return found


def _manifest(export: UpstreamExport, processor: Any, limits: Limits, folder: Path) -> Manifest:
    """Write the programs; everything of the manifest but what is verified."""
    programs = tuple(_program(name, model) for name, model in export.graphs.items())
    for model in export.graphs.values():
        share_transposed_weights(model)
        forget_shapes(model)
    size = write_models(export.graphs, folder)
    decode = programs[-1]
    tokens = next(item for item in decode.inputs if item.source.kind == "tokens")
    continues = tokens.shape[1] == "sequence"
    if len(programs) == 1 and not continues:
        raise UnsupportedModelError(
            "the component 'prefill' is missing, and 'decode' takes one token: export with multi_token_decode=True"
        )
    fixed = {item.shape[0] for program in programs for item in program.inputs} - {"batch"}
    model = export.model
    text = describe_text(processor, folder) if processor is not None else None
    model.config.to_json_file(folder / "config.json", use_diff=False)
    return Manifest(
        format=FORMAT,
        version=FORMAT_VERSION,
        backend="cpu",
        model=ModelFacts(
            architecture=type(model).__name__,
            name=export.folder.absolute().name,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            weight_bytes=size,
        ),
        flow=Flow(
            prompt=(Route(programs=(programs[0].name,)),),
            step=(decode.name,),
            batch=1 if fixed else None,
            continues=continues,
            capacity=limits.capacity,
            restart=limits.restart,
        ),
        programs=programs,
        state=tuple(_states(decode)),
        weights=WEIGHTS_NAME,
        generation=describe_generation(model),
        text=text,
        files={},
        notes=(
            "packed from graphs that transformers exported, which compute logits for every token of a prompt",
            *export.notes,
        ),
        packages={**package_versions(), **export.packages},
        settings={"packed": True},
    )


def _program(name: str, model: ir.Model) -> Program:
    """The manifest's entry of a graph, whose inputs and outputs get our names."""
    decoding = name == "decode"
    inputs = [_input(value, name) for value in model.graph.inputs]
    outputs = [_output(value, name) for value in model.graph.outputs]
    for value, entry in zip([*model.graph.inputs, *model.graph.outputs], [*inputs, *outputs], strict=True):
        value.name, value.shape = entry.name, ir.Shape(entry.shape)
    roles: tuple[Role, ...] = ("merge", "language_model", "lm_head")
    roles = (*roles, "decode") if decoding else roles
    return Program(name=name, file=f"{name}.onnx", roles=roles, inputs=tuple(inputs), outputs=tuple(outputs))


def _input(value: ir.Value, program: str) -> Input:
    # Upstream tells inputs and outputs of one name apart so.
    name = (value.name or "").removeprefix("input.")
    state = _state_name(name, program)
    if state is not None:
        shape = _shape(value, program, ("batch", None, "past", None))
        source = Source(kind="state", name=state)
        return Input(name=f"past_key_values.{state}", dtype=_dtype(value), shape=shape, source=source)
    if name not in _SOURCES:
        raise UnsupportedModelError(f"{program}: its input {name!r} has no explanation without the model")
    decoding = program == "decode"
    length = "total" if decoding and name == "attention_mask" else "sequence"
    # A step may take one token and no more.
    single = decoding and length == "sequence"
    return Input(
        name=name,
        dtype=_dtype(value),
        shape=_shape(value, program, ("batch", length), ones=("batch", "sequence") if single else ("batch",)),
        source=_SOURCES[name],
    )


def _output(value: ir.Value, program: str) -> Output:
    name = (value.name or "").removeprefix("output.")
    state = _state_name(name, program)
    if state is not None:
        shape = _shape(value, program, ("batch", None, "total" if program == "decode" else "sequence", None))
        return Output(name=f"present.{state}", dtype=_dtype(value), shape=shape, state=state)
    shape = tuple(f"{name}_{axis}" if size is None else size for axis, size in enumerate(_sizes(value)))
    return Output(name=name, dtype=_dtype(value), shape=shape)


def _state_name(name: str, program: str) -> str | None:
    """`past_key_values.layers.0.keys` as `0.key`; None for what isn't state."""
    head, _, rest = name.partition(".layers.")
    index, _, kind = rest.partition(".")
    if head != "past_key_values":
        return None
    if not index.isdigit() or kind not in _KINDS:
        raise UnsupportedModelError(f"{program}: its state {name!r} isn't a layer's keys or values, all that is packed")
    return f"{index}.{_KINDS[kind]}"


def _shape(
    value: ir.Value, program: str, symbols: tuple[str | None, ...], ones: Collection[str] = ("batch",)
) -> tuple[int | str, ...]:
    """The sizes that are fixed, and the names of the free axes; UnsupportedModelError where one has to be free and
    isn't, nor 1 for a name among `ones`."""
    sizes = _sizes(value)
    fitting = len(sizes) == len(symbols) and all(
        size is not None if symbol is None else size is None or (size == 1 and symbol in ones)
        for size, symbol in zip(sizes, symbols, strict=True)
    )
    if not fitting:
        shown = ", ".join("free" if size is None else str(size) for size in sizes)
        raise UnsupportedModelError(
            f"{program}: {value.name} has the sizes [{shown}], and lengths have to be free: export with "
            "OnnxConfig(dynamic=True)"
        )
    return tuple(symbol or 0 if size is None else size for size, symbol in zip(sizes, symbols, strict=True))


def _sizes(value: ir.Value) -> list[int | None]:
    """The fixed sizes of a value, which upstream's graphs hold as words, None for the free ones."""
    return [int(str(size)) if str(size).isdigit() else None for size in value.shape or ()]


def _dtype(value: ir.Value) -> str:
    return "bfloat16" if value.dtype == ir.DataType.BFLOAT16 else value.dtype.numpy().name  # pyright: ignore


def _states(decode: Program) -> list[State]:
    entries = (item for item in decode.inputs if item.source.kind == "state")
    return [State(name=item.source.name or "", dtype=item.dtype, shape=item.shape, axis=2) for item in entries]


def _verified(
    export: UpstreamExport, loaded: Loaded, limits: Limits, manifest: Manifest, writer: BundleWriter
) -> Manifest:
    """As a build is: replayed on inputs that the model generates from, and compared."""
    if type(loaded.model).__name__ != manifest.model.architecture:
        raise BuildError(
            f"pack: a {manifest.model.architecture} was exported, and the model to compare with is a "
            f"{type(loaded.model).__name__}"
        )
    padded = _takes_padding(manifest)
    with borrowed(loaded.model) as eager:
        cases = [
            record(eager, name, inputs, new_tokens(inputs, limits, lossy=False))
            for name, inputs in make_samples(eager, [], limits).held_out.items()
            if padded or bool(inputs["attention_mask"].all())
        ]
    return verify_staged(cases, limits, manifest, writer, None)


def _takes_padding(manifest: Manifest) -> bool:
    return all(any(item.source.kind == "mask" for item in program.inputs) for program in manifest.programs)


def _compared(manifest: Manifest, writer: BundleWriter) -> Manifest:
    """Prompts of every length against steps, and a padded batch against its rows: what shows without the model."""
    runtime = load_bundle(writer.stage(manifest))
    vocabulary = next(o.shape[-1] for o in manifest.programs[-1].outputs if o.name == "logits")
    generator = np.random.default_rng(0)
    most = vocabulary if isinstance(vocabulary, int) else 2
    rows = [generator.integers(0, most, (1, length)) for length in (7, 3)]
    told = [_compare_steps(runtime, row) for row in rows]
    checked = f"prompts of {rows[1].shape[1]} to {rows[0].shape[1] + _STEPS} tokens give what steps give"
    if _takes_padding(manifest) and manifest.flow.batch is None:
        _compare_batch(runtime, rows, told)
        checked += ", a padded batch what its sequences give alone"
    note = (
        f"not compared with the model that was exported, which wasn't given, only with itself: {checked}; positions "
        "are taken to count the unpadded tokens"
    )
    return replace(manifest, notes=(*manifest.notes, note))


def _inputs(tokens: np.ndarray, mask: np.ndarray | None = None) -> dict[str, np.ndarray]:
    return {"input_ids": tokens, "attention_mask": np.ones_like(tokens) if mask is None else mask}


def _compare_steps(runtime: Model, row: np.ndarray) -> np.ndarray:
    """Generate greedily; the tokens. VerificationError where a step's logits aren't those of the longer prompt."""
    logits, sequences = runtime.wiring.prompt(_inputs(row))
    for step in range(_STEPS):
        row = np.concatenate([row, logits.argmax(-1)[:, None]], 1)
        logits = runtime.wiring.step(row[:, -1:], sequences)
        expected, _ = runtime.wiring.prompt(_inputs(row))
        _expect_close(logits, expected, f"step {step} of a prompt of {row.shape[1] - step - 1} tokens")
    return row


def _compare_batch(runtime: Model, rows: list[np.ndarray], told: list[np.ndarray]) -> None:
    longest = max(row.shape[1] for row in rows)
    tokens, mask = (np.zeros((len(rows), longest), np.int64) for _ in range(2))
    for index, row in enumerate(rows):
        tokens[index, longest - row.shape[1] :], mask[index, longest - row.shape[1] :] = row[0], 1
    logits, sequences = runtime.wiring.prompt(_inputs(tokens, mask))
    for step in range(_STEPS):
        given = [whole[:, : row.shape[1] + step] for whole, row in zip(told, rows, strict=True)]
        expected = np.concatenate([runtime.wiring.prompt(_inputs(one))[0] for one in given])
        _expect_close(logits, expected, f"step {step} of a padded batch")
        new = [whole[:, row.shape[1] + step] for whole, row in zip(told, rows, strict=True)]
        logits = runtime.wiring.step(np.stack(new), sequences)


def _expect_close(found: np.ndarray, expected: np.ndarray, where: str) -> None:
    difference = float(np.abs(found - expected).max())
    if not difference <= LOGIT_TOLERANCE * float(np.abs(expected).max()):
        raise VerificationError(
            f"the exported programs don't agree: {where} gives logits that differ by {difference:.3g} from the prompt's"
        )
