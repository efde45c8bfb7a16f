"""What upstream prints is hidden, kept where a file is named, and never lost from what comes after."""

import logging
import os
import sys
import warnings

from genbundle.builder.noise import logged_to, quiet


def make_noise():
    print("printed")
    print("to standard error", file=sys.stderr)
    os.write(1, b"from C\n")
    os.write(2, b"errors from C\n")
    warnings.warn("a warning", stacklevel=1)
    logging.getLogger("upstream").warning("logged")


def test_quiet_hides_everything(capfd):
    with quiet():
        make_noise()
    print("after")
    assert capfd.readouterr() == ("after\n", "")


def test_a_log_file_keeps_it(capfd, tmp_path):
    with logged_to(tmp_path / "log"), quiet():
        make_noise()
        with quiet():
            print("inside")
    kept = (tmp_path / "log").read_text()
    assert all(
        piece in kept for piece in ("printed\n", "to standard error\n", "from C\n", "errors from C\n", "inside\n")
    )
    assert capfd.readouterr() == ("", "")
    with quiet():
        print("not kept")
    assert "not kept" not in (tmp_path / "log").read_text()


def test_a_handler_made_inside_writes_to_the_stream_afterwards(capfd):
    with quiet():
        handler = logging.StreamHandler()
        handler.flush = sys.stderr.flush  # as transformers has it
        handler.emit(logging.makeLogRecord({"msg": "hidden"}))
    handler.emit(logging.makeLogRecord({"msg": "shown"}))
    assert capfd.readouterr() == ("", "shown\n")


def test_verbose(capfd, monkeypatch):
    monkeypatch.setenv("GENBUNDLE_VERBOSE", "1")
    with quiet():
        print("shown")
    assert capfd.readouterr().out == "shown\n"
