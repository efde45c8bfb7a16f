"""A bundle run in a process of its own first: an engine that ends its process would take the build with it."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from genbundle.bundles import UnsupportedModelError
from genbundle.bundles.golden import GoldenCase, write_golden

_LONGEST_S = 3600
# What goes wrong otherwise goes wrong again in the build's own process, which says what.
_REPLAY = """
import sys
from genbundle.bundles.golden import read_golden
from genbundle.runtime import load_bundle
from genbundle.runtime.verify import replay
model = load_bundle(sys.argv[1])
for case in read_golden(__import__("pathlib").Path(sys.argv[2])):
    try:
        replay(model, case)
    except Exception:
        pass
"""


def expect_survival(
    bundle: Path, cases: Sequence[GoldenCase], code: str = _REPLAY, longest_s: float = _LONGEST_S
) -> None:
    """UnsupportedModelError where running the bundle on the cases ends the process that runs it, or doesn't end.

    ExecuTorch divides by sizes without a look at them, for instance (LongT5's blocks, ExecuTorch 1.4.1).
    """
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "cases"
        write_golden(records, list(cases))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        # -P: without it, Python's own modules come from the working directory first, which may be a stranger's model.
        command = [sys.executable, "-P", "-c", code, str(bundle), str(records)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=longest_s)
        except subprocess.TimeoutExpired:
            raise UnsupportedModelError(
                f"the engine runs this model's programs for more than {longest_s:g} seconds: build for another "
                "backend, for instance cpu"
            ) from None
    # Python itself ends with 0 or 1. An engine's end is a signal, or on Windows any other code.
    if done.returncode not in (0, 1):
        raise UnsupportedModelError(
            f"the engine ends its process ({_end(done.returncode)}) when it runs this model's programs: build for "
            "another backend, for instance cpu"
        )


def _end(code: int) -> str:
    """How a process with that exit code ended."""
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"exit code {code}"
