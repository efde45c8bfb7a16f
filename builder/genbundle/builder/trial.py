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


def expect_survival(bundle: Path, cases: Sequence[GoldenCase], code: str = _REPLAY) -> None:
    """UnsupportedModelError where running the bundle on the cases ends the process that runs it.

    ExecuTorch divides by sizes without a look at them, for instance (LongT5's blocks, ExecuTorch 1.4.1).
    """
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "cases"
        write_golden(records, list(cases))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(
            [sys.executable, "-c", code, str(bundle), str(records)], env=environment, capture_output=True, check=False
        )
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise UnsupportedModelError(
            f"the engine ends its process ({name}) when it runs this model's programs: build for another backend, for "
            "instance cpu"
        )
