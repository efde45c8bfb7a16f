"""Record what eager gives for held-out inputs, and replay the finished bundle on them through the runtime."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from genbundle.builder.exporting import MODEL_ERRORS, first_line, quiet
from genbundle.builder.generation_config import greedy_config
from genbundle.builder.limits import Limits
from genbundle.builder.trial import expect_survival
from genbundle.builder.twins import runnable
from genbundle.bundles import Bundle, EngineError, InputError, UnsupportedModelError, VerificationError
from genbundle.bundles.golden import GOLDEN_NAME, GoldenCase, write_golden
from genbundle.bundles.manifest import Manifest
from genbundle.bundles.report import Check, QualityFloor, Verification
from genbundle.bundles.writer import BundleWriter
from genbundle.runtime import Model, load_bundle
from genbundle.runtime.quality import expect_quality
from genbundle.runtime.verify import check_cases, locate

NEW_TOKENS = 12
_QUALITY_TOKENS = 32  # a mean over few tokens says little
GOLDEN_LOGITS = 16


def new_tokens(inputs: Mapping[str, torch.Tensor], limits: Limits, *, lossy: bool) -> int:
    """How many tokens to generate from held-out inputs; more where their likeness is measured, if there is room."""
    ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    room = _QUALITY_TOKENS if limits.capacity is None or ids is None else limits.capacity - ids.shape[1]
    return max(NEW_TOKENS, min(_QUALITY_TOKENS, room)) if lossy else NEW_TOKENS


def record(
    model: PreTrainedModel, name: str, inputs: Mapping[str, torch.Tensor], new_tokens: int = NEW_TOKENS
) -> GoldenCase:
    """Eager's greedy generation for `inputs` with every logit; UnsupportedModelError when generate refuses them."""
    config = greedy_config(
        model, max_new_tokens=new_tokens, max_length=None, return_dict_in_generate=True, output_logits=True
    )
    config.force_unique_generate_call = True  # of a model that goes on with the next window of sound by itself
    try:
        with quiet(), torch.no_grad():
            generate: Any = model.generate
            output = generate(**{key: value.clone() for key, value in inputs.items()}, generation_config=config)
    except MODEL_ERRORS as error:
        raise UnsupportedModelError(
            f"{type(model).__name__}.generate refuses the inputs {sorted(inputs)}: {first_line(error)}"
        ) from error
    logits = torch.stack(output.logits, 1).float().numpy()
    return GoldenCase(
        name=name,
        inputs={key: value.numpy() for key, value in inputs.items()},
        sequences=output.sequences.numpy(),
        top_ids=np.broadcast_to(np.arange(logits.shape[-1]), logits.shape),
        top_logits=logits,
        options={"max_new_tokens": new_tokens, "do_sample": False},
    )


def taken_by(manifest: Manifest, inputs: Mapping[str, torch.Tensor]) -> bool:
    """Whether a prompt's route takes such inputs; the runtime refuses others."""
    return any(set(route.needs) <= inputs.keys() for route in manifest.flow.prompt)


Measure = Callable[[list[GoldenCase]], list[GoldenCase]]


def verify_staged(
    cases: list[GoldenCase], limits: Limits, manifest: Manifest, writer: BundleWriter, floor: QualityFloor | None,
    measure: Measure | None = None,
) -> Manifest:  # fmt: skip
    """Replay the staged bundle on what eager gave; the manifest with the report, the golden records written.

    floor: what a lossy precision has to reach; None where tokens must be equal. measure: adds to the cases how much the
    model magnifies rounding, which is asked for where logits differ.
    """
    with ExitStack() as stack:
        try:
            with quiet():  # an engine logs what it fails at
                staged = writer.stage(manifest)
                if manifest.backend == "xnnpack" and manifest.state:  # what ExecuTorch's own runners never run
                    expect_survival(staged.path, cases)
                runtime = _opened(staged, stack)
                checks, cases = _measured(runtime, cases, floor, measure)
        except (VerificationError, EngineError) as error:
            # A tracer may fix a loop's length without a word: prompts then go through the step's program.
            note = f"prompts go through the step's program token by token, since their own failed its check: {error}"
            simpler = without_optional_programs(manifest, writer, first_line(RuntimeError(note)))
            if simpler is None:
                raise
            manifest = simpler
            runtime = _opened(writer.stage(manifest), stack)
            checks, cases = _measured(runtime, cases, floor, measure)
        checks += _in_pieces(runtime, cases, floor)
    # Where batches run row after row, single sequences say as much, and pictures in batches fill small bundles.
    single = [case for case in cases if len(case.sequences) == 1] if manifest.flow.batch == 1 else cases
    write_golden(writer.path / GOLDEN_NAME, [case.truncated(GOLDEN_LOGITS) for case in single or cases])
    pending = None
    if manifest.backend == "cuda":
        pending = "not run on the CUDA provider yet: `genbundle verify` on a machine with a GPU completes it"
    notes = manifest.notes
    rounding = max((float(case.rounding.max()) for case in cases if case.rounding is not None), default=0.0)
    if rounding:
        notes += (f"rounding alone moves this model's logits by up to {rounding:.1g} of the largest one's size",)
    longest = max(check.prompt_length + check.new_tokens for check in checks)
    missed = list(limits.not_reached(longest))
    missed += [
        f"prompts of {p.least} tokens" for p in manifest.programs if p.least > max(c.prompt_length for c in checks)
    ]
    if missed:
        notes += (f"verified on up to {longest} tokens; not reached: {', '.join(missed)}",)
    report = Verification(
        provider=runtime.backend.device,
        checks=checks,
        pending=pending,
        quality=expect_quality(checks, floor) if floor is not None else None,
        floor=floor,
    )
    return replace(manifest, verification=report, notes=notes)


def _opened(staged: Bundle, stack: ExitStack) -> Model:
    """The staged bundle, on this machine's CPU; what it needs for that goes with `stack`."""
    device = "cpu" if staged.manifest.backend == "cuda" else None
    return load_bundle(stack.enter_context(runnable(staged)), device=device)


def _measured(
    runtime: Model, cases: list[GoldenCase], floor: QualityFloor | None, measure: Measure | None
) -> tuple[tuple[Check, ...], list[GoldenCase]]:
    try:
        return _checked(runtime, cases, floor), cases
    except VerificationError:
        measured = cases if floor is not None or measure is None else measure(cases)
        if all(case.rounding is None for case in measured):
            raise
        return _checked(runtime, measured, floor), measured


def _in_pieces(runtime: Model, cases: list[GoldenCase], floor: QualityFloor | None) -> tuple[Check, ...]:
    """The longest recorded prompt that would go in pieces if it were longer, in shorter pieces than the bundle's.

    No recorded prompt may be as long as theirs.
    """
    bundle = runtime.bundle
    chunk = bundle.manifest.flow.chunk
    whole = [case for case in cases if set(case.inputs) <= {"input_ids", "attention_mask"} and len(case.sequences) == 1]
    lengths = {case.name: case.inputs["input_ids"].shape[1] for case in whole}
    longest = max(whole, key=lambda case: lengths[case.name], default=None)
    if chunk is None or longest is None or not 2 < lengths[longest.name] <= chunk:
        return ()
    size = max(1, lengths[longest.name] // 3)
    manifest = replace(bundle.manifest, flow=replace(bundle.manifest.flow, chunk=size))
    pieces = Model(replace(bundle, manifest=manifest), runtime.backend)
    return _checked(pieces, [replace(longest, name=f"{longest.name}, in pieces of at most {size}")], floor)


def _checked(runtime: Model, cases: list[GoldenCase], floor: QualityFloor | None) -> tuple[Check, ...]:
    """`check_cases`; UnsupportedModelError for a case that the runtime refuses, though eager took it.

    VerificationError names the programs that can be at fault.
    """
    try:
        return check_cases(runtime, cases, floor)
    except VerificationError as error:
        locate(runtime, cases, error)
        raise
    except InputError as error:
        # What the given samples have alike looked constant: as many patches in two pictures, for instance.
        raise UnsupportedModelError(
            f"the bundle would refuse what eager takes ({error}): give inputs that differ in what shall be dynamic"
        ) from error


def unsupported(error: VerificationError | EngineError, folder: Path) -> UnsupportedModelError:
    """What a float32 bundle's failed replay says of the model, with the programs at fault.

    folder: where the bundle was, which isn't anybody's any more.
    """
    why = str(error).replace(f"{folder}: ", "")
    if isinstance(error, EngineError):
        return UnsupportedModelError(f"the engine can't run what the model became: {why}")
    if not error.programs:
        return UnsupportedModelError(why)
    *others, last = error.programs
    names = f"{', '.join(others)} or {last}" if others else last
    kind = "a step after the prompt" if error.step else "the prompt"
    held = f"; {', '.join(error.held)} held without it" if error.held else ""
    return UnsupportedModelError(f"{names}: {kind} gives something else than the model does ({why}{held})")


def without_optional_programs(manifest: Manifest, writer: BundleWriter, note: str) -> Manifest | None:
    """The manifest without the prompt programs that another route can do without, their files gone, and with a note;
    None where none can."""
    flow = manifest.flow
    spare = {route.needs for route in flow.prompt if route.one_by_one}
    routes = tuple(route for route in flow.prompt if route.one_by_one or route.needs not in spare)
    if routes == flow.prompt:
        return None
    used = {*flow.step, *(name for route in routes for name in route.programs)}
    programs = tuple(program for program in manifest.programs if program.name in used)
    for file in {program.file for program in manifest.programs} - {program.file for program in programs}:
        (writer.path / file).unlink()
        (writer.path / file).with_suffix(".weights.json").unlink(missing_ok=True)
    return replace(manifest, flow=replace(flow, prompt=routes), programs=programs, notes=(*manifest.notes, note))
