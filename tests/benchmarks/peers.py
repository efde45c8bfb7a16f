"""The budgets against what users could pick instead, side by side in one run: python -m tests.benchmarks.peers FOLDER

FOLDER keeps the model, the bundles, the peers' files and their environment, and is used again. llama.cpp is compiled
for it (ten minutes on two cores). As in budgets.py each is a process of its own and they take turns; figures are
medians over the turns of all launches, ratios are of medians, and the spread is that of the ratios turn by turn (10th
to 90th percentile).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sysconfig
import time
import venv
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.benchmarks.budgets import PAUSE, Worker, in_process

PACKAGES = ("llama-cpp-python==0.3.36", "gguf", "onnxruntime-genai==0.18.0", "matplotlib")
CAPACITY = 4096
CONTEXTS = (128, 900)
LONG = 3900
PROMPTS, TURNS, STEPS = 6, 24, 3  # six prompts in a launch, more of short ones
# What llama.cpp is compiled for: all that the processor says it has, as by default, but for AMX, whose registers
# virtual machines may list and refuse: it ends with an illegal instruction then.
CPU_FEATURES = {
    "avx": "AVX",
    "avx2": "AVX2",
    "avx512_bf16": "AVX512_BF16",
    "avx512_vnni": "AVX512_VNNI",
    "avx512f": "AVX512",
    "avx512vbmi": "AVX512_VBMI",
    "avx_vnni": "AVX_VNNI",
    "bmi2": "BMI2",
    "f16c": "F16C",
    "fma": "FMA",
    "sse4_2": "SSE42",
}
LAUNCHES = 2  # how fast a process reads its memory depends on where the system placed it
BUNDLES = {  # name -> backend, precision
    "cpu": ("cpu", "fp32"),
    "cpu-int4": ("cpu", "int4"),
    "xnnpack": ("xnnpack", "fp32"),
    "xnnpack-int4": ("xnnpack", "int4"),
}


@dataclass(frozen=True)
class Budget:
    """At most `limit` x the fastest of `peers`, in steps, prompts or opening."""

    bundle: str
    what: str
    peers: tuple[str, ...]
    limit: float


_FULL, _FOUR = ("llama.cpp f32", "ort-genai fp32"), ("llama.cpp q4_0", "ort-genai int4")
BUDGETS = (
    Budget("cpu", "step", _FULL, 1.0),
    Budget("cpu", "prompt", _FULL, 0.9),
    Budget("cpu-int4", "step", _FOUR[1:], 1.0),
    Budget("cpu-int4", "prompt", _FOUR[1:], 0.8),
    Budget("xnnpack", "step", _FULL, 0.95),
    Budget("xnnpack-int4", "step", _FOUR, 0.95),
    Budget("xnnpack-int4", "prompt", _FOUR, 0.7),
    Budget("cpu", "opening", _FULL[:1], 5.0),
)


def prepare(root: Path, bundles: Iterable[str]) -> dict[str, tuple[str, str, tuple[str, ...]]]:
    """Make what isn't there yet; every worker's function, argument and command by name."""
    model, python = root / "model", root / "environment" / "bin" / "python"
    if not model.exists():
        in_process("make_model", str(model), "full")
    if not python.exists():
        venv.create(root / "environment", with_pip=True)
        settings = {**os.environ, "CMAKE_ARGS": _compiled_for()}
        # pip would take a wheel that it compiled once, whatever it was compiled for.
        install = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", *PACKAGES]
        subprocess.run(install, check=True, env=settings)
        # GenAI's model builder needs torch and transformers: the project's own.
        packages = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, check=True
        )
        shared = Path(packages.stdout.decode().strip()) / "project.pth"
        shared.write_text(sysconfig.get_path("purelib") + "\n")
    script = str(Path(__file__).with_name("peer_workers.py"))
    workers: dict[str, tuple[str, str, tuple[str, ...]]] = {}
    for kind in ("f32", "q4_0"):
        path = root / f"{kind}.gguf"
        if not path.exists():
            subprocess.run([python, script, "write_gguf", path, kind], check=True)
        workers[f"llama.cpp {kind}"] = ("llamacpp", str(path), (str(python), script))
    for kind in ("fp32", "int4"):
        folder = root / f"genai-{kind}"
        if not folder.exists():
            builder = [python, "-m", "onnxruntime_genai.models.builder", "-p", kind, "-e", "cpu"]
            subprocess.run([*builder, "-m", model, "-i", model, "-o", folder, "-c", root / "cache"], check=True)
        workers[f"ort-genai {kind}"] = ("ort_genai", str(folder), (str(python), script))
    for name in bundles:
        backend, precision = BUNDLES[name]
        path = root / f"{name}-{CAPACITY}.bundle"
        if not path.exists():
            in_process("build", str(model), backend, str(path), precision, str(CAPACITY))
        workers[name] = ("runtime", str(path), ())
    return workers


Times = dict[tuple[str, str], list[float]]
"""Milliseconds by worker and what was timed."""


def measure(workers: dict[str, Worker], contexts: Iterable[int], times: Times) -> None:
    """Add to `times`, all taking turns."""
    for name, worker in workers.items():
        times.setdefault((name, "opening"), []).append(1e3 * worker.opening)
        worker.step(16)
    for context in contexts:
        for _ in range(max(PROMPTS, 1200 // context) if context < LONG else 1):
            for name, worker in workers.items():
                time.sleep(PAUSE)
                times.setdefault((name, f"prompt {context}"), []).append(worker.step(context))
        for worker in workers.values():
            worker.step()
        for _ in range(TURNS):
            for name, worker in workers.items():
                time.sleep(PAUSE)
                worker.step()
                times.setdefault((name, f"step {context}"), []).extend(worker.step() for _ in range(STEPS))


@dataclass(frozen=True)
class Row:
    """A budget with what was measured: milliseconds, and the ratio of medians with the spread turn by turn."""

    bundle: str
    what: str
    own: float
    peer: str
    theirs: float
    ratio: float
    low: float
    high: float
    limit: float

    def __str__(self) -> str:
        """A line of the table."""
        spread = f"{self.ratio:.2f} ({self.low:.2f}-{self.high:.2f})" if self.low != self.high else f"{self.ratio:.2f}"
        limit = "" if self.what.endswith(f" {LONG}") else f"{self.limit:.2f}"  # budgets are for the shorter contexts
        theirs = f"{self.theirs:.1f} ({self.peer})"
        return f"| `{self.bundle}` {self.what} | {self.own:.1f} | {theirs} | {spread} | {limit} |"


def compare(times: Times, budget: Budget, what: str) -> Row:
    """The bundle against the fastest of the budget's peers."""
    own = times[budget.bundle, what]
    best = min(budget.peers, key=lambda peer: statistics.median(times[peer, what]))
    each = sorted(mine / theirs for mine, theirs in zip(own, times[best, what], strict=True))
    low, high = each[len(each) // 10], each[-1 - len(each) // 10]
    mine, theirs = statistics.median(own), statistics.median(times[best, what])
    return Row(budget.bundle, what, mine, best, theirs, mine / theirs, low, high, budget.limit)


def run(known: dict[str, tuple[str, str, tuple[str, ...]]], names: list[str], contexts: tuple[int, ...]) -> list[Row]:
    """Time these side by side; prints every median and peak, and returns the budgets' rows."""
    for name in names:  # once before it counts: its files are in memory then
        Worker(*known[name]).end()
    times: Times = {}
    peaks: dict[str, int] = {}
    for launch in range(LAUNCHES):
        for name in names:
            _place_anew(Path(known[name][1]))
        os.sync()
        workers = {name: Worker(*known[name]) for name in names}
        measure(workers, [context for context in contexts if context < LONG or not launch], times)
        for name, worker in workers.items():
            worker.end()
            peaks[name] = max(worker.peak, peaks.get(name, 0))
    print({f"{name}, {what}": round(statistics.median(found), 1) for (name, what), found in times.items()})
    print("peak memory, MB:", {name: round(peak / 1e6) for name, peak in peaks.items()}, flush=True)
    if LONG in contexts and "cpu" in names:
        grown = {
            name: statistics.median(times[name, f"step {LONG}"]) / statistics.median(times[name, "step 128"])
            for name in ("cpu", "llama.cpp f32")
        }
        print(f"step at {LONG} over 128: {grown}")
    return [
        compare(times, budget, what)
        for budget in BUDGETS
        if budget.bundle in names
        for what in (["opening"] if budget.what == "opening" else [f"{budget.what} {context}" for context in contexts])
    ]


def _place_anew(path: Path) -> None:
    """Copy a file, or those of a folder, in place of themselves. Pages of a mapped file stay where they first came into
    memory, and of a virtual machine's memory some can be slower by a third; what engines copy lies elsewhere in each
    launch."""
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        copy = file.with_name(f"{file.name}.copy")
        shutil.copyfile(file, copy)
        copy.replace(file)


def main() -> None:
    """Measure, print a table, draw it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bundles", nargs="+", choices=BUNDLES, default=list(BUNDLES))
    parser.add_argument("--long", action="store_true", help=f"a context of {LONG} too")
    parser.add_argument("--plot", type=Path, help="an .svg of the ratios")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    known = prepare(options.folder, options.bundles)
    contexts = (*CONTEXTS, LONG) if options.long else CONTEXTS
    rows: list[Row] = []
    for group in (_FULL, _FOUR):
        own = [name for name in options.bundles if name.endswith("int4") == (group is _FOUR)]
        rows += run(known, [*group, *own], contexts) if own else []
    print("bytes:", {name: _bytes(Path(path)) for name, (_, path, _) in known.items()})
    print("\n| | ms | fastest of the budget's peers, ms | ratio (spread) | at most |\n|---|---|---|---|---|")
    print("\n".join(map(str, rows)))
    if options.plot:
        (options.folder / "rows.json").write_text(json.dumps([asdict(row) for row in rows]))
        python, script = options.folder / "environment" / "bin" / "python", Path(__file__).with_name("peer_plot.py")
        subprocess.run([python, script, options.folder / "rows.json", options.plot], check=True)


def _compiled_for() -> str:
    """CMake's arguments for llama.cpp here; none, and so its own choice, where the system doesn't list features."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    features = next((line.split() for line in lines if line.startswith("flags")), [])
    named = [f"-DGGML_{CPU_FEATURES[name]}=ON" for name in sorted(CPU_FEATURES.keys() & features)]
    return " ".join(["-DGGML_NATIVE=OFF", *named]) if named else ""


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size


if __name__ == "__main__":
    main()
