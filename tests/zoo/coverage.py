"""Which generative classes of transformers build into bundles that replay exactly, per backend.

    python -m tests.zoo.coverage --backends cpu torch xnnpack [--classes NAMES...] [--report docs/coverage.md]

Each class and backend runs in a child of its own, with limits on time and memory. Results are appended as JSON lines,
so a run that was cut off goes on where it stopped. docs/coverage.jsonl, which the report sorts, belongs to the project.
"""

import argparse
import functools
import json
import re
import subprocess
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import transformers as hf

from genbundle.builder import build_bundle
from genbundle.bundles import BuildError
from genbundle.runtime import load_bundle
from tests.zoo import children, coverage_report, shrink

RESULTS = Path("docs/coverage.jsonl")
_LEAST_LENGTH = 64  # tokens that a bundle holds


def cover(name: str, backend: str) -> dict[str, Any]:
    """Make `name`, build it for `backend` and replay it: the status, its cause, and seconds."""
    start = time.perf_counter()
    try:
        model = shrink.make(name)
        inputs = shrink.variants(name, model)
        expected = [shrink.observed(model, each).sequences.numpy() for each in inputs["check"]]
    except Exception as error:  # whatever a class does, it's that class's result
        return {"status": "not eager", "cause": children.first_line(error), "build_s": None, **_total(start)}
    with tempfile.TemporaryDirectory(prefix="coverage") as folder:
        began = time.perf_counter()
        try:
            path = Path(folder) / "model.bundle"
            build_bundle(model, inputs["build"], backend, output=path, progress=False, max_length=room_for(inputs))
        except Exception as error:
            status = "unsupported" if isinstance(error, BuildError) else "error"
            return {"status": status, "cause": children.first_line(error), "build_s": None, **_total(start)}
        build_s = round(time.perf_counter() - began, 1)
        cause = _difference(path, backend, inputs["check"], expected)
    return {"status": "mismatch" if cause else "ok", "cause": cause, "build_s": build_s, **_total(start)}


def room_for(inputs: dict[str, list[shrink.Inputs]]) -> int:
    """Room for every prompt, and for two of them one after another, which the build tries."""
    longest = max(
        (each["input_ids"].shape[-1] for group in inputs.values() for each in group if "input_ids" in each), default=0
    )
    return max(_LEAST_LENGTH, 2 * longest + 2 * shrink.NEW_TOKENS)


def _total(start: float) -> dict[str, float]:
    return {"total_s": round(time.perf_counter() - start, 1)}


def _difference(path: Path, backend: str, asked: list[shrink.Inputs], expected: list[np.ndarray]) -> str:
    """What the bundle does otherwise than eager; empty where it gives the same sequences for all that is asked."""
    try:
        # ExecuTorch keeps the number of threads that the build's own verification opened it with.
        bundle = load_bundle(path, threads=None if backend == "xnnpack" else 1)
        for number, (inputs, wanted) in enumerate(zip(asked, expected, strict=True), 1):
            arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
            found = bundle.generate(**arrays, max_new_tokens=shrink.NEW_TOKENS, do_sample=False).sequences
            if found.shape != wanted.shape:
                return f"check {number}: sequences of shape {found.shape}, eager gives {wanted.shape}"
            if (found != wanted).any():
                first = int(np.argmax((found != wanted).any(0))) - (wanted.shape[1] - shrink.NEW_TOKENS)
                return f"check {number}: other tokens than eager from new token {first + 1} on"
    except Exception as error:
        return children.first_line(error)
    return ""


def _run(name: str, backend: str, limit_s: float, memory_gb: float) -> dict[str, Any]:
    answer = children.call(cover, name, backend, limit_s=limit_s, memory_gb=memory_gb)
    if "error" in answer:
        status = "timeout" if answer.get("timeout") else "error"
        answer = {"status": status, "cause": answer["error"], "build_s": None, "total_s": None}
    return {"class": name, "kind": shrink.CLASSES[name], "backend": backend, **answer, "commit": _commit()}


@functools.cache
def _commit() -> str:
    """The commit of the code that runs, with "+" where files differ from it; empty outside of a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*", "--abbrev=7", "--dirty=+"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()


def _preload(backends: list[str]) -> None:
    """Import what every child would, once."""
    if {"cpu", "cuda"} & set(backends):
        import onnxruntime
        import onnxscript  # noqa: F401

        onnxruntime.set_default_logger_severity(3)
    if "xnnpack" in backends:
        import genbundle.builder.formats.executorch  # noqa: F401


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["cpu"])
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="names, or regular expressions for whole names")
    parser.add_argument("--kind", nargs="+", choices=sorted(set(shrink.CLASSES.values())))
    parser.add_argument("--limit-s", type=float, default=240)
    parser.add_argument("--memory-gb", type=float, default=10)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", type=Path, help="write the table of all results here")
    parser.add_argument("--again", action="store_true", help="classes that have a result too")
    parser.add_argument("--again-failed", action="store_true", help="classes whose result isn't ok too")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    hf.logging.set_verbosity_error()
    if not options.report_only:
        _run_all(options)
    if options.report:
        results = coverage_report.read(options.results)
        options.results.write_text("".join(json.dumps(each) + "\n" for each in results))
        options.report.write_text(coverage_report.table(results, len(shrink.CLASSES)))


def _run_all(options: argparse.Namespace) -> None:
    known = {(each["class"], each["backend"]): each["status"] for each in coverage_report.read(options.results)}
    names = [
        name
        for name, kind in shrink.CLASSES.items()
        if (not options.classes or any(re.fullmatch(pattern, name) for pattern in options.classes))
        and (not options.kind or kind in options.kind)
    ]
    todo = [
        (name, backend)
        for backend in options.backends
        for name in names
        if options.again or (name, backend) not in known or (options.again_failed and known[name, backend] != "ok")
    ]
    _preload(options.backends)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    for number, (name, backend) in enumerate(todo, 1):
        result = _run(name, backend, options.limit_s, options.memory_gb)
        with options.results.open("a") as file:
            file.write(json.dumps(result) + "\n")
        cause = f": {result['cause'][:150]}" if result["cause"] else ""
        print(f"[{number}/{len(todo)}] {backend} {name} {result['status']} ({result['total_s']} s){cause}", flush=True)
    for backend in options.backends:
        statuses = [each["status"] for each in coverage_report.read(options.results) if each["backend"] == backend]
        eager = [status for status in statuses if status != "not eager"]
        print(f"{backend}: {eager.count('ok')} of {len(eager)} that generate eagerly are covered")


if __name__ == "__main__":
    main()
