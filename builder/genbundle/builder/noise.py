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
from typing import Any

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

    File descriptors are redirected, since parts of it come from C++, and Python's streams, which in a notebook go
    elsewhere.
    """
    log = _log.get()
    if os.environ.get("GENBUNDLE_VERBOSE"):
        yield
        return
    previous = logging.root.manager.disable
    _flush()
    saved = [(os.dup(stream), stream) for stream in (1, 2)]
    with log.open("ab") if log else tempfile.TemporaryFile() as sink:
        for _, stream in saved:
            os.dup2(sink.fileno(), stream)
        try:
            if not log:
                logging.disable(logging.WARNING)
            with warnings.catch_warnings(), _python_streams(sink.fileno()):
                warnings.simplefilter("ignore")
                yield
        finally:
            _flush()
            for duplicate, stream in saved:
                os.dup2(duplicate, stream)
                os.close(duplicate)
            logging.disable(previous)


class _Stream:
    """What stands in for a stream. A logging handler made meanwhile keeps it, and then writes where the stream does."""

    def __init__(self, target: Any):
        self.target = target

    def write(self, text: str) -> int:
        return self.target.write(text)

    def flush(self) -> None:
        """A method of its own, which handlers keep too (transformers'): the target's would flush a file long closed."""
        self.target.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.target, name)


@contextlib.contextmanager
def _python_streams(sink: int) -> Iterator[None]:
    """Python's own standard streams, written to the file descriptor `sink`."""
    before = sys.stdout, sys.stderr
    with os.fdopen(os.dup(sink), "w", buffering=1) as text:
        stand_ins: Any = _Stream(text), _Stream(text)
        sys.stdout, sys.stderr = stand_ins
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
            for stand_in, stream in zip(stand_ins, before, strict=True):
                stand_in.target = stream


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
