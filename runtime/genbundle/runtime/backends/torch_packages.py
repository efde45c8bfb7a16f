"""The cache of what AOTInductor compiled: it is machine code, so only this user may have written it."""

import contextlib
import errno
import json
import os
import re
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from genbundle.bundles import EngineError

# Beside the code, in its archive: what a call's sizes have to be (torch_trust.py).
BOUNDS = "genbundle_bounds.json"
_LONGEST_CAUSE = 300
# What Python's zipfile raises for a file that was cut or changed.
_DAMAGED = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, LookupError, RuntimeError, ArithmeticError,
)  # fmt: skip


def package_folder() -> Path:
    """The cache's folder, made if need be; EngineError where another user could put machine code into it."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        folder = base if base.is_absolute() else Path.home() / ".cache"
        folder.mkdir(parents=True, exist_ok=True)
        for level in ("genbundle", "compiled"):  # who may write to the first could replace the second
            folder /= level
            folder.mkdir(mode=0o700, exist_ok=True)
            _expect_own(folder, stat.S_ISDIR)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        raise EngineError(f"no folder to keep compiled programs in: {error}: set XDG_CACHE_HOME to one") from error
    return folder


def load_package(torch: Any, package: Path, device: str, program: str) -> tuple[Any, list[Any]] | None:
    """The loaded code and its bounds; None where there is no package or a damaged one.

    Raises:
        EngineError: the package may be another user's, or it is whole and can't be loaded (no memory, a library that
            isn't there, a temporary folder that nothing may be run from), which compiling again wouldn't change.
    """
    try:
        _expect_own(package, stat.S_ISREG)
        bounds = _bounds(package)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise EngineError(f"{program}: what AOTInductor compiled can't be read: {error}") from error
    if bounds is None:
        return None
    index = int(device.partition(":")[2] or -1)
    try:
        # `aoti_load_package` ends here too, but first compiles tests of the processor, for seconds, to warn of another.
        return torch._C._aoti.AOTIModelPackageLoader(str(package), "model", False, 1, index), bounds
    except Exception as error:  # the dynamic linker's errors and torch's own have no common base
        raise EngineError(
            f"{program}: what AOTInductor compiled can't be loaded: {one_line(error)} ({package})"
        ) from error


def store_package(made: Path, package: Path) -> None:
    """Put a file into the cache, where it appears whole or not at all."""
    with contextlib.ExitStack() as at_last:
        try:
            beside = tempfile.NamedTemporaryFile(dir=package.parent, prefix=f".{package.name}.", delete=False)  # noqa: SIM115
            at_last.callback(Path(beside.name).unlink, missing_ok=True)  # there is none once it has its final name
            with beside:
                beside.write(made.read_bytes())
            Path(beside.name).replace(package)
        except OSError as error:
            raise EngineError(f"{package}: a compiled program can't be kept there: {error}") from error


def one_line(error: BaseException) -> str:
    """The compiler's first error, or the exception's own first line."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = next((line for line in lines if re.search(r"\berror:", line)), lines[0])
    return line.strip()[:_LONGEST_CAUSE]


def _expect_own(path: Path, is_kind: Callable[[int], bool]) -> None:
    """EngineError for a link, and for a folder or file that another user could write to; OSError where there is none.

    What lies above is the user's choice: in a folder that others write to, they could still rename these.
    """
    status = path.lstat()
    if not is_kind(status.st_mode):
        kind = "folder" if is_kind is stat.S_ISDIR else "file"
        raise EngineError(f"{path}: not a plain {kind}, so no compiled program is loaded from it: remove it")
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise EngineError(
            f"{path}: others can write there, so no compiled program is loaded from it: remove it, or chmod go-w"
        )


def _bounds(package: Path) -> list[Any] | None:
    """The bounds beside the code; None where the file is damaged, which torch's reader wouldn't find and would run."""
    try:
        with zipfile.ZipFile(package) as file:
            if file.testzip() is not None:
                return None
            return json.loads(file.read(next(name for name in file.namelist() if name.endswith(f"/{BOUNDS}"))))
    except OSError as error:
        if error.errno != errno.EINVAL:  # a damaged directory can lie before the file's beginning
            raise
        return None
    except (*_DAMAGED, StopIteration):
        return None
