"""What upstream prints and logs while it loads and exports: hidden from the user, kept in a file where one is named.

Imports no torch, so that it can stand around the imports that are noisy themselves.
"""

import contextlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

_log: ContextVar[Path | None] = ContextVar("log", default=None)


@contextlib.contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Inside the block, what `quiet` hides is appended to the file `path` instead of being lost."""
    token = _log.set(path)
    try:
        yield
    finally:
        _log.reset(token)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what exporters print and log; `logged_to` says where it is kept.

    File descriptors are redirected, since parts of it come from C++.
    """
    log = _log.get()
    if os.environ.get("GENBUNDLE_VERBOSE"):
        yield
        return
    previous = logging.root.manager.disable
    sys.stdout.flush(), sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(log.open("ab") if log else tempfile.TemporaryFile())
        os.dup2(sink.fileno(), 1), os.dup2(sink.fileno(), 2)
        try:
            if not log:
                logging.disable(logging.WARNING)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os.dup2(saved[0], 1), os.dup2(saved[1], 2)
            os.close(saved[0]), os.close(saved[1])
            logging.disable(previous)
