"""Peak memory of prompts of growing length, a process each: python -m tests.benchmarks.memory FOLDER [--precision int4]

What may grow with a prompt is its cache; the work space of a pass may not, since a long prompt goes through in pieces.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.budgets import THREADS, in_process, peak_bytes

LENGTHS = (512, 2048, 8192)
NEW = 8


def run(bundle: str, length: int) -> None:
    """One generation; prints the peak in bytes and the seconds of the prompt."""
    import os

    import numpy as np

    from genbundle.runtime import load_bundle

    ids = np.random.default_rng(0).integers(5, 1900, (1, length))
    generation = load_bundle(bundle, threads=THREADS).generate(input_ids=ids, max_new_tokens=NEW, min_new_tokens=NEW)
    print(json.dumps([peak_bytes(os.getpid()), generation.timings.prompt]))


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        return run(options.run[0], int(options.run[1]))
    capacity = LENGTHS[-1] + NEW
    model, bundle = options.folder / "long-model", options.folder / f"long-{options.precision}.bundle"
    if not bundle.exists():
        if not model.exists():
            in_process("make_model", str(model), "full", str(capacity))
        in_process("build", str(model), "cpu", str(bundle), options.precision, str(capacity))
    manifest = json.loads((bundle / "manifest.json").read_text())
    token = sum(4 * entry["shape"][1] * entry["shape"][3] for entry in manifest["state"])
    weights = manifest["model"]["weight_bytes"]
    print(
        f"weights {weights / 1e6:.0f} MB, cache {token * 1e-6:.3f} MB a token, in pieces of {manifest['flow']['chunk']}"
    )
    print(
        "| prompt | peak, MB | of it cache, MB | the rest beside the weights, MB | prompt, s |\n|---|---|---|---|---|"
    )
    for length in LENGTHS:
        command = [sys.executable, "-m", "tests.benchmarks.memory", str(options.folder), "--run", str(bundle)]
        done = subprocess.run([*command, str(length)], capture_output=True, text=True, check=True)
        peak, seconds = json.loads(done.stdout)
        cache = token * (length + NEW)
        rest = peak - weights - cache
        print(f"| {length} | {peak / 1e6:.0f} | {cache / 1e6:.0f} | {rest / 1e6:.0f} | {seconds:.1f} |", flush=True)
    return None


if __name__ == "__main__":
    main()
