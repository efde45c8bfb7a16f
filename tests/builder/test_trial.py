"""A bundle that ends the process that runs it."""

from pathlib import Path

import pytest

from genbundle.builder.trial import expect_survival
from genbundle.bundles import UnsupportedModelError


def test_a_process_that_ends_is_an_error(tmp_path: Path) -> None:
    expect_survival(tmp_path, [], code="raise SystemExit(1)")
    with pytest.raises(UnsupportedModelError, match=r"the engine ends its process \(SIGFPE\)"):
        expect_survival(tmp_path, [], code="import os, signal; os.kill(os.getpid(), signal.SIGFPE)")
