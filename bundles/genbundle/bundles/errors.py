"""The errors of this package: what is wrong, what was given, where, and what to do."""


class GenbundleError(Exception):
    """Base of every error that genbundle raises on purpose; the command line shows it as one line, exit code 2."""


class BundleError(GenbundleError):
    """A bundle that can't be trusted or read: a bad manifest, a missing or changed file, a path that escapes."""


class BundleVersionError(BundleError):
    """A bundle written in a newer format than this version reads."""


class MissingExtraError(GenbundleError):
    """An optional dependency that isn't installed; the message names the pip command."""

    def __init__(self, purpose: str, package: str, extra: str):
        super().__init__(f"{purpose} needs `{package}`, which is not installed: pip install 'genbundle[{extra}]'")


class EngineError(GenbundleError):
    """An engine, device or program version that can't run this bundle here."""


class InputError(GenbundleError, ValueError):
    """Generation inputs or options that this bundle can't take."""


class BuildError(GenbundleError):
    """A model, setting or target that can't be built into a bundle."""


class UnsupportedModelError(BuildError):
    """A model whose generation can't be replayed exactly; names the component and the cause."""


class VerificationError(BuildError):
    """A finished bundle that didn't reproduce eager generation; names the input and the step.

    case, step: the recorded case's name and the step of its generation, 0 for the prompt's; None where it isn't one
    step. programs: those that can be at fault, where that was looked for; held: the others of that step, which gave
    eager's logits for another case.
    """

    def __init__(self, message: str, *, case: str | None = None, step: int | None = None):
        super().__init__(message)
        self.case, self.step = case, step
        self.programs: tuple[str, ...] = ()
        self.held: tuple[str, ...] = ()
