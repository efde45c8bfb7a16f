"""Measure the budgets side by side in one run: python -m tests.benchmarks.budgets [--size full|small] [--backends ...]

What is timed (memory bandwidth, eager, each bundle) runs in a process of its own, and they take turns, a few steps
each: a machine whose speed changes from minute to minute changes it for all of them. Figures are medians over the
turns, and what counts is the ratio. The shape is Qwen2-0.5B's with random weights (2.0 GB in float32), as the peers are
timed on; speed doesn't depend on the weights.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CONTEXTS = (128, 900)
TURNS, STEPS = 30, 4  # with a context of 900 as many as the bundles' 1,024 tokens allow
THREADS = 2
# Threads of the one whose turn ended wait for more work in a loop for a while; its successor's first step, which wakes
# its own, isn't counted either.
PAUSE = 0.2
LOOPS = ("cpu", "xnnpack")  # the backends whose loop is timed beside the step's program alone, at int4 too
SHAPES = {
    "full": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936},
    "small": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 8000},
}  # fmt: skip


def make_model(folder: str, size: str, positions: str = "4096") -> None:
    """Save the reference model."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = Qwen2Config(**SHAPES[size], max_position_embeddings=int(positions), tie_word_embeddings=True, **tokens)
    Qwen2ForCausalLM(config).save_pretrained(folder)


def build(folder: str, backend: str, bundle: str, precision: str = "fp32", max_length: str = "1024") -> dict:
    """Build a bundle; peak memory of this process over the model's size in memory, and bytes over bytes."""
    import resource

    from genbundle.builder import build_bundle

    started = time.perf_counter()
    built = build_bundle(
        folder,
        None,
        backend,
        output=bundle,
        max_length=int(max_length),
        precision=precision,
        quality_floor=None if precision == "fp32" else 0.0,
        progress=False,
    )
    facts = built.manifest.model
    programs = {program.file for program in built.manifest.programs} | {built.manifest.weights}
    stored = sum(file.size for name, file in built.manifest.files.items() if name in programs)
    return {
        "seconds": time.perf_counter() - started,
        "peak over model": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / facts.weight_bytes,
        "bytes over weights": stored / facts.weight_bytes,
    }


Turn = Generator[float, int, None]  # what a worker is: sent a context, it begins there; then gives seconds per step


def bandwidth(_: str) -> Turn:
    """Seconds to read 1 GiB from memory with THREADS threads: a step, which reads every weight once, is bound by it."""
    import torch

    torch.set_num_threads(THREADS)
    data = torch.ones(1 << 28)
    while True:
        started = time.perf_counter()
        data.sum()
        yield time.perf_counter() - started


def eager(folder: str) -> Turn:
    """transformers' eager model."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    token, past, seconds = torch.tensor([[7]]), None, 0.0
    while True:
        context = yield seconds
        started = time.perf_counter()
        with torch.no_grad():
            ids = torch.randint(5, 1900, (1, context)) if context else token
            output = model(ids, past_key_values=None if context else past, use_cache=True, logits_to_keep=1)
        past, seconds = output.past_key_values, time.perf_counter() - started


ALONE = -1
"""What the runtime's worker is sent for a step of the program alone."""


def runtime(bundle: str) -> Turn:
    """The runtime's loop over a bundle's programs; for ALONE the last step's program once more, nothing around it. Both
    in one process and on the same tensors: those that lie elsewhere are read faster or slower for that, by a tenth."""
    import numpy as np

    from genbundle.runtime import load_bundle

    started = time.perf_counter()
    model = load_bundle(bundle, threads=THREADS)
    for entry in model.bundle.manifest.programs:
        model.backend.program(entry.name)  # opened at its first call otherwise
    seconds, stream, rng = time.perf_counter() - started, iter(()), np.random.default_rng(0)
    run, last = _watched(model.backend.program(model.bundle.manifest.flow.step[-1]))
    while True:
        context = yield seconds
        if context > 0:
            count = 2 + TURNS * STEPS
            ids = rng.integers(5, 1900, (1, context))
            stream = model.stream(input_ids=ids, max_new_tokens=count, eos_token_id=())
            last.clear()  # it holds the last sequence's state
        started = time.perf_counter()
        run(*last) if context == ALONE else next(stream)
        seconds = time.perf_counter() - started


def _watched(program: Any) -> tuple[Callable[..., Any], list[Any]]:
    """What runs a program inside its engine, and what it was last given, from now on."""
    last: list[Any] = []

    def watched(run: Callable[..., Any]) -> Callable[..., Any]:
        def running(*given: Any) -> Any:
            last[:] = given
            return run(*given)

        return running

    if hasattr(program, "session"):
        run = program.session.run_with_iobinding
        program.session.run_with_iobinding = watched(run)
    elif hasattr(program, "_method"):
        run = program._method.execute
        program._method = SimpleNamespace(execute=watched(run))
    else:
        run = program  # nobody asks for it alone
    return run, last


def work(function: str, argument: str) -> None:
    """Be a worker: a context or 0 (one step further) on each line of stdin, seconds on each line of stdout."""
    turns = globals()[function](argument)
    print(next(turns), flush=True)
    for line in sys.stdin:
        print(turns.send(int(line)), flush=True)


class Worker:
    """A process that takes turns with others. opening: the seconds that it took to open what it times; peak: the most
    memory that it ever had, in bytes, once it ended (0 where the system doesn't say)."""

    def __init__(self, function: str, argument: str, command: tuple[str, ...] = ()):
        command = command or (sys.executable, "-m", "tests.benchmarks.budgets", "--work")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process: Any = subprocess.Popen([*command, function, argument], text=True, **pipes)
        first = self._process.stdout.readline()
        if not first:
            raise SystemExit(f"the worker {function} {argument} ended before its first turn")
        self.opening, self.peak = float(first), 0

    def step(self, context: int = 0) -> float:
        """Milliseconds of one step, or of a prompt of `context` tokens."""
        print(context, file=self._process.stdin, flush=True)
        return 1e3 * float(self._process.stdout.readline())

    def end(self) -> None:
        """Stop the process."""
        self.peak = self.peak or peak_bytes(self._process.pid)
        self._process.kill()
        self._process.wait()


def peak_bytes(process: int) -> int:
    """The most memory that a running process ever had resident, as Linux counts it; 0 elsewhere."""
    status = Path(f"/proc/{process}/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def side_by_side(workers: dict[str, Worker], alone: Collection[str], context: int) -> dict[str, list[float]]:
    """Milliseconds of the steps after a prompt of `context` tokens, all taking turns; of the program alone too for the
    bundles in `alone`."""
    times: dict[str, list[float]] = {}
    for worker in workers.values():
        worker.step(context)
    for turn in range(TURNS):
        for name, worker in workers.items():
            time.sleep(PAUSE)
            # Who comes second finds the processor awake.
            kinds = [(f"{name} alone", ALONE), (name, 0)][:: 1 if turn % 2 else -1] if name in alone else [(name, 0)]
            for kind, what in kinds:
                worker.step(what)
                times.setdefault(kind, []).extend(worker.step(what) for _ in range(STEPS - 1))
    return times


def _spread(own: list[float], other: list[float]) -> str:
    """The 10th and 90th percentile of the ratios step by step."""
    low, *_, high = statistics.quantiles([mine / theirs for mine, theirs in zip(own, other, strict=True)], n=10)
    return f"{low:.3f}-{high:.3f}"


def _start(code: str) -> subprocess.CompletedProcess:
    """Run Python code in a process as an installed package runs: its modules are compiled already. Where the variable
    keeps Python from storing that, each start would compile this project's, and nobody else's."""
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=settings)


def import_time() -> dict:
    """Seconds of `import genbundle.runtime`, and which engines that loads (none)."""
    code = (
        "import time, sys; t = time.perf_counter(); import genbundle.runtime; s = time.perf_counter() - t; "
        "import json; print(json.dumps([s, [m for m in ('onnxruntime', 'torch', 'transformers') if m in sys.modules]]))"
    )
    _start(code)  # compiles what isn't yet
    runs = [json.loads(_start(code).stdout) for _ in range(5)]
    return {"seconds": statistics.median(run[0] for run in runs), "engines loaded": runs[0][1]}


_FIRST_TOKEN = """
from genbundle.runtime import load_bundle
next(load_bundle({bundle!r}, threads={threads}).stream(input_ids=[list(range(5, 21))], max_new_tokens=1))
"""


def first_token(bundle: str) -> dict:
    """Seconds from a process's start to its first token of a prompt of 16, and of `import transformers` alone."""
    codes = {"first token": _FIRST_TOKEN.format(bundle=bundle, threads=THREADS), "transformers": "import transformers"}
    times: dict[str, list[float]] = {name: [] for name in codes}
    for code in codes.values():
        _start(code)  # compiles what isn't yet
    for _ in range(7):
        for name, code in codes.items():
            started = time.perf_counter()
            _start(code)
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def build_demo(bundle: str) -> dict:
    """Build the included model for `cpu`."""
    from genbundle.builder import build_bundle
    from genbundle.builder.demo.show import MODEL, sample_inputs

    build_bundle(MODEL, sample_inputs(), "cpu", output=bundle, progress=False)
    return {}


def in_process(function: str, *arguments: str) -> dict:
    """Run one of the functions above in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.budgets", "--call", function, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{function} {arguments} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SHAPES, default="full")
    parser.add_argument("--backends", nargs="+", default=["cpu", "xnnpack"])
    parser.add_argument("--keep", type=Path, help="a folder whose model and bundles are used again")
    parser.add_argument("--call", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(*options.work)
    if options.call:
        name, *arguments = options.call
        return print(json.dumps(globals()[name](*arguments)))
    rows = [("import genbundle.runtime, s", import_time()["seconds"], 0.25)]
    with tempfile.TemporaryDirectory() as temporary:
        root = options.keep or Path(temporary)
        names = [*options.backends, *(f"{name}-int4" for name in options.backends if name in LOOPS)]
        folder, bundles = root / "model", {name: root / f"{name}.bundle" for name in names}
        if not folder.exists():
            in_process("make_model", str(folder), options.size)
        for name, bundle in bundles.items():
            if bundle.exists():
                continue
            backend, _, precision = name.partition("-")
            built = in_process("build", str(folder), backend, str(bundle), precision or "fp32")
            print(name, built, flush=True)
            if precision:
                continue
            limit = 1.03 if backend != "xnnpack" else 1.30  # a .pte holds the tied embedding once more
            rows.append((f"{backend}: bytes over weights", built["bytes over weights"], limit))
            rows.append((f"{backend}: build's peak memory over the model's", built["peak over model"], 3.0))
        rows += step_ratios(folder, bundles)
        demo = root / "demo.bundle"
        if not demo.exists():
            in_process("build_demo", str(demo))
        found = first_token(str(demo))
        print("s:", found)
        rows.append(("first token over import transformers", found["first token"] / found["transformers"], 0.15))
    print(f"\n| {'budget':50} | measured | at most |\n|{'-' * 52}|----------|---------|")
    for name, measured, limit in rows:
        print(f"| {name:50} | {measured:8.3f} | {limit:7.2f} |")


def step_ratios(folder: Path, bundles: dict[str, Path]) -> list[tuple[str, float, float]]:
    """The bundles' steps over eager's, and over those of their bare programs."""
    workers = {"memory": Worker("bandwidth", ""), "eager": Worker("eager", str(folder))}
    workers |= {name: Worker("runtime", str(bundle)) for name, bundle in bundles.items()}
    alone = [name for name in bundles if name.partition("-")[0] in LOOPS]
    rows = []
    for context in CONTEXTS:
        times = side_by_side(workers, alone, context)
        found = {name: statistics.median(values) for name, values in times.items()}
        speed = 2**30 / found["memory"] / 1e6
        print(f"context {context}, ms: {found}; memory {speed:.1f} GB/s", flush=True)
        for name in bundles:
            if not name.endswith("-int4"):
                rows.append((f"{name}: step over eager at {context}", found[name] / found["eager"], 0.45))
            if name in alone:
                ratio = found[name] / found[f"{name} alone"]
                rows.append((f"{name}: step over its program alone at {context}", ratio, 1.03))
                print(f"{name}: the loop's steps over the program's, {_spread(times[name], times[f'{name} alone'])}")
    for worker in workers.values():
        worker.end()
    return rows


if __name__ == "__main__":
    main()
