"""One function call in a forked child with limits on its time and memory, its prints kept off the terminal."""

import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def first_line(error: BaseException) -> str:
    """An exception as one line without this machine's paths."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A validator's first line says only which validator; torch's assertions hide behind theirs too.
    shown = (
        " ".join(lines[:2]) if lines and lines[0].endswith(("'validate_architecture':", ":")) else " ".join(lines[:1])
    )
    text = f"{type(error).__name__}: {shown}".rstrip(": ")
    for folder in {str(Path.cwd()), str(Path.home()), sys.prefix}:
        if len(folder) > 1:
            text = text.replace(folder, "…")
    return text[:400]


def call(
    function: Callable[..., dict[str, Any]], *arguments: Any, limit_s: float = 60, memory_gb: float = 8
) -> dict[str, Any]:
    """`function(*arguments)` from a child of this process; {"error": cause} where it fails or passes a limit."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _answer(write, function, arguments, memory_gb)
    os.close(write)
    chunks, end = [], time.monotonic() + limit_s
    while True:
        ready, _, _ = select.select([read], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(read)
            return {"error": f"timeout after {limit_s:g} s", "timeout": True}
        chunk = os.read(read, 1 << 16)
        if not chunk:
            break
        chunks.append(chunk)
    os.close(read)
    _, status = os.waitpid(child, 0)
    if not chunks:
        how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {os.WEXITSTATUS(status)}"
        return {"error": f"the process ended with {how}", "type": "crash"}
    return json.loads(b"".join(chunks))


def _answer(write: int, function: Callable[..., dict[str, Any]], arguments: tuple, memory_gb: float) -> None:
    """In the child: call, send the answer, leave without the parent's clean-up."""
    os.setpgid(0, 0)
    limit = int(memory_gb * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    null = os.open(os.devnull, os.O_RDWR)
    if not os.environ.get("ZOO_VERBOSE"):
        os.dup2(null, 1)
        os.dup2(null, 2)
    torch.set_num_threads(1)
    try:
        answer = function(*arguments)
    except BaseException as error:  # whatever a class does, the parent goes on
        if os.environ.get("ZOO_VERBOSE"):
            traceback.print_exc()
        answer = {"error": first_line(error), "type": type(error).__name__}
    data = json.dumps(answer).encode()
    while data:
        data = data[os.write(write, data) :]
    os._exit(0)
