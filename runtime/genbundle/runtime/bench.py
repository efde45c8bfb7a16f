"""Time a bundle on this machine: loading, a prompt, steps, the loop's share, memory."""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genbundle.bundles import InputError, Manifest
from genbundle.bundles.golden import GOLDEN_NAME, read_golden
from genbundle.runtime.load import load_bundle
from genbundle.runtime.model import Model

_WARM_UP_TOKENS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One run for one sequence; `loop_share` is the part of the generation spent outside the programs."""

    device: str
    threads: int | None
    compiled: bool
    input: str
    load_seconds: float
    prompt_tokens: int
    prompt_seconds: float
    new_tokens: int
    step_milliseconds: float
    tokens_per_second: float
    loop_share: float
    peak_bytes: int | None


def measure(
    path: Path, *, prompt_tokens: int = 128, new_tokens: int = 32, device: str | None = None,
    threads: int | None = None, compiled: bool = False,
) -> Measurement:  # fmt: skip
    """Generate greedily from random tokens (or a recorded input, where a prompt needs more than text) and time it."""
    begun = time.perf_counter()
    model = load_bundle(path, device=device, threads=threads, compiled=compiled)
    for program in model.bundle.manifest.programs:
        model.backend.program(program.name)
    load_seconds = time.perf_counter() - begun
    name, inputs = _inputs(model, prompt_tokens)
    options = {"do_sample": False, "repetition_penalty": 1.0, "eos_token_ids": ()}
    for _ in model.stream(**inputs, **options, max_new_tokens=_WARM_UP_TOKENS):
        pass
    seconds, timings, last = [], None, time.perf_counter()
    for chunk in model.stream(**inputs, **options, max_new_tokens=new_tokens):
        now = time.perf_counter()
        seconds.append(now - last)
        last, timings = now, chunk.timings
    if timings is None or len(seconds) < 2:
        raise InputError(f"the bundle holds too few tokens to time {new_tokens} after a prompt of {prompt_tokens}")
    step = statistics.median(seconds[1:])
    return Measurement(
        device=model.backend.device,
        threads=threads,
        compiled=compiled,
        input=name,
        load_seconds=load_seconds,
        prompt_tokens=timings.prompt_tokens,
        prompt_seconds=timings.prompt,
        new_tokens=len(seconds),
        step_milliseconds=1000 * step,
        tokens_per_second=1 / step,
        loop_share=timings.overhead / (timings.prompt + timings.steps),
        peak_bytes=_peak_bytes(),
    )


def _inputs(model: Model, length: int) -> tuple[str, dict[str, np.ndarray]]:
    manifest = model.bundle.manifest
    if any(not route.needs for route in manifest.flow.prompt):
        return f"{length} random tokens", {"input_ids": _random_ids(manifest, length)}
    cases = read_golden(model.bundle.file(GOLDEN_NAME)) if GOLDEN_NAME in manifest.files else []
    case = next((case for case in cases if len(case.inputs["input_ids"]) == 1), None)
    if case is None:
        raise InputError(f"{model.bundle.path} takes no text alone and holds no recorded input to time")
    return f"the recorded input {case.name!r}", dict(case.inputs)


def _random_ids(manifest: Manifest, length: int) -> np.ndarray:
    """Random token ids `[1, length]`, none of them special as far as the manifest knows."""
    sizes = [output.shape[-1] for program in manifest.programs for output in program.outputs if output.name == "logits"]
    vocabulary = next((size for size in sizes if isinstance(size, int)), None)
    if vocabulary is None:
        raise InputError("the manifest doesn't say how large the vocabulary is")
    generation = manifest.generation
    special = {*generation.eos_token_ids, generation.pad_token_id, generation.bos_token_id}
    special.add(manifest.images.token_id if manifest.images is not None else None)
    allowed = np.array([token for token in range(vocabulary) if token not in special])
    return np.random.default_rng(0).choice(allowed, (1, length))


def _peak_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
