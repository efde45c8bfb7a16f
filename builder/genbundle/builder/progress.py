"""The build's progress: a bar with the stage's name on a terminal, or whatever callable the caller gives."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str], None]


@contextmanager
def show_progress(progress: bool | Progress, stages: int) -> Iterator[Progress]:
    """A callable to announce each of about `stages` stages with.

    progress: True for a bar on standard error, False for silence, or a callable that gets every stage's name.
    """
    if callable(progress):
        yield progress
        return
    if not progress:
        yield lambda stage: None
        return
    import os

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    # A duplicate of standard error: the exporters' noise is hidden by redirecting the original.
    with os.fdopen(os.dup(2), "w") as stream:
        console = Console(file=stream)
        columns = (BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Bar(*columns, console=console, redirect_stdout=False, redirect_stderr=False) as bar:
            task = bar.add_task("start", total=stages)
            begun = False

            def advance(stage: str) -> None:
                nonlocal begun
                bar.update(task, description=stage, advance=1 if begun else 0)
                begun = True

            yield advance
            bar.update(task, description="done", completed=stages, total=stages)
