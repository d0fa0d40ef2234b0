"""What a user can mend. Each message is one sentence: the thing, the value and the way out."""

from collections.abc import Iterable


class EpsrtError(ValueError):
    """Base of every error that epsrt raises on bad input; the command prints it and exits 1."""


class BundleError(EpsrtError):
    """A bundle, checkpoint or other file is damaged, foreign or of an unknown version."""


class EngineError(EpsrtError):
    """An engine cannot be opened here, or cannot run what it was given."""


class OutOfMemoryError(EngineError):
    """The device's memory does not suffice; the message says what was asked for and what is free."""


class NotFiniteError(EpsrtError):
    """The network produced NaN or infinity; the message names the sample and the step."""


def one_of(word: str, known: Iterable[str]) -> str:
    """The way out of an unknown name: the near ones first, then all."""
    from difflib import get_close_matches  # only where something went wrong

    names = list(known)
    near = get_close_matches(word, names, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{hint}use one of {', '.join(names)}"
