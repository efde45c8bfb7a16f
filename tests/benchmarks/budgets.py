"""Measure the budgets side by side in one run: python -m tests.benchmarks.budgets [--size full|small] [--backends ...]

Every figure comes from a process of its own; steps are medians, and what counts is the ratio. The shape is
Qwen2-0.5B's with random weights (2.0 GB in float32), as the peers are timed on; speed doesn't depend on the weights.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONTEXTS = (128, 900)
STEPS = 24
THREADS = 2
SHAPES = {
    "full": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936},
    "small": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 8000},
}  # fmt: skip


def make_model(folder: Path, size: str) -> None:
    """Save the reference model."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = Qwen2Config(**SHAPES[size], max_position_embeddings=4096, tie_word_embeddings=True, **tokens)
    Qwen2ForCausalLM(config).save_pretrained(folder)


def build(folder: Path, backend: str, bundle: Path) -> dict:
    """Build a bundle; peak memory of this process over the model's size in memory, and bytes over bytes."""
    import resource

    from genbundle.builder import build_bundle

    started = time.perf_counter()
    built = build_bundle(folder, None, backend, output=bundle, max_length=1024, progress=False)
    facts = built.manifest.model
    programs = {program.file for program in built.manifest.programs} | {built.manifest.weights}
    stored = sum(file.size for name, file in built.manifest.files.items() if name in programs)
    return {
        "seconds": time.perf_counter() - started,
        "peak over model": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / facts.weight_bytes,
        "bytes over weights": stored / facts.weight_bytes,
    }


def eager(folder: Path) -> dict:
    """Milliseconds per step of transformers' eager model."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    result = {}
    for context in CONTEXTS:
        with torch.no_grad():
            output = model(torch.randint(5, 1900, (1, context)), use_cache=True, logits_to_keep=1)
            token, times = torch.tensor([[7]]), []
            for _ in range(STEPS):
                started = time.perf_counter()
                output = model(token, past_key_values=output.past_key_values, use_cache=True)
                times.append(time.perf_counter() - started)
        result[f"step at {context}"] = 1e3 * statistics.median(times)
    return result


def runtime(bundle: Path) -> dict:
    """Milliseconds per step of the runtime's loop and, for ONNX, of a bare session.run on the same inputs; peak RSS."""
    import resource

    import numpy as np

    from genbundle.runtime import load_bundle

    started = time.perf_counter()
    model = load_bundle(bundle, threads=THREADS)
    rng, result = np.random.default_rng(0), {}
    for context in CONTEXTS:
        ids = rng.integers(5, 1900, (1, context))
        generated = model.generate(input_ids=ids, max_new_tokens=STEPS + 1, min_new_tokens=STEPS + 1)
        result[f"step at {context}"] = 1e3 * generated.timings.steps / STEPS
        result[f"prompt of {context}"] = 1e3 * generated.timings.prompt
        if model.bundle.manifest.backend == "cpu":
            result[f"bare at {context}"] = bare_session(model, context + STEPS // 2)
    result["seconds"] = time.perf_counter() - started
    result["peak RSS"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result


def bare_session(model, context: int) -> float:
    """Milliseconds of a bare `session.run` of the step's program at this context."""
    import numpy as np

    session = model.backend.program("decode").session
    feeds = {}
    for item in session.get_inputs():
        if item.name.startswith("past"):
            feeds[item.name] = np.zeros((1, item.shape[1], context, item.shape[3]), np.float32)
        else:
            length = context + 1 if item.name == "attention_mask" else 1
            feeds[item.name] = np.full((1, length), context if item.name == "position_ids" else 1, np.int64)
    times = []
    for _ in range(STEPS):
        started = time.perf_counter()
        session.run(None, feeds)
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


def import_time() -> dict:
    """Seconds of `import genbundle.runtime`, and which engines that loads (none)."""
    code = (
        "import time, sys; t = time.perf_counter(); import genbundle.runtime; s = time.perf_counter() - t; "
        "import json; print(json.dumps([s, [m for m in ('onnxruntime', 'torch', 'transformers') if m in sys.modules]]))"
    )
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(5)
    ]
    return {"seconds": statistics.median(run[0] for run in runs), "engines loaded": runs[0][1]}


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
    parser.add_argument("--call", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.call:
        name, *arguments = options.call
        paths = [Path(item) if "/" in item else item for item in arguments]
        print(json.dumps(globals()[name](*paths)))
        return
    rows = [("import genbundle.runtime, s", import_time()["seconds"], 0.25)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        make_model(folder, options.size)
        reference = in_process("eager", str(folder))
        print("eager", reference, flush=True)
        for backend in options.backends:
            bundle = str(Path(temporary) / f"{backend}.bundle")
            built = in_process("build", str(folder), backend, bundle)
            ran = in_process("runtime", bundle)
            print(backend, built, ran, flush=True)
            limit = 1.03 if backend != "xnnpack" else 1.30  # a .pte holds the tied embedding once more
            rows.append((f"{backend}: bytes over weights", built["bytes over weights"], limit))
            rows.append((f"{backend}: build's peak memory over the model's", built["peak over model"], 3.0))
            for context in CONTEXTS:
                ratio = ran[f"step at {context}"] / reference[f"step at {context}"]
                rows.append((f"{backend}: step over eager at {context}", ratio, 0.45))
                if f"bare at {context}" in ran:
                    bare = ran[f"step at {context}"] / ran[f"bare at {context}"]
                    rows.append((f"{backend}: step over bare session.run at {context}", bare, 1.05))
    print(f"\n| {'budget':50} | measured | at most |\n|{'-' * 52}|----------|---------|")
    for name, measured, limit in rows:
        print(f"| {name:50} | {measured:8.3f} | {limit:7.2f} |")


if __name__ == "__main__":
    main()
