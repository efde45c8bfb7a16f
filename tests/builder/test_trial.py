"""A bundle that ends the process that runs it."""

from pathlib import Path

import pytest

from genbundle.builder.stock_runners import _run_trial
from genbundle.builder.trial import expect_survival
from genbundle.bundles import UnsupportedModelError


def test_a_process_that_ends_is_an_error(tmp_path: Path) -> None:
    expect_survival(tmp_path, [], code="raise SystemExit(1)")
    with pytest.raises(UnsupportedModelError, match=r"the engine ends its process \(SIGFPE\)"):
        expect_survival(tmp_path, [], code="import os, signal; os.kill(os.getpid(), signal.SIGFPE)")
    with pytest.raises(UnsupportedModelError, match=r"the engine ends its process \(exit code 3\)"):
        expect_survival(tmp_path, [], code="import os; os._exit(3)")


def test_a_process_that_goes_on_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="for more than 1 seconds"):
        expect_survival(tmp_path, [], code="import time; time.sleep(60)", longest_s=1)


def test_nothing_of_the_working_directory_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("import os\nos._exit(7)\n")
    monkeypatch.chdir(tmp_path)
    expect_survival(tmp_path, [], code="import json; json.dumps(1)")
    found = _run_trial({"tokenizer": str(tmp_path / "none.json"), "texts": [], "ids": []})
    assert "exit code 7" not in found.get("error", "")
