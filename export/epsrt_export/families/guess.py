"""Guess: what a file of somebody's training looks like, from the names and shapes of its tensors."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Guess:
    """What a family's `recognise` says of a file.

    family   for --from; "" where no family reads it, and the last of `facts` says why and what to do
    facts    for people: what is seen, by a word for it (network, channels, classes, conditions, …)
    options  what --set must say, and the file shows
    missing  what --set must say, and no file shows: option -> why, in a few words
    """

    family: str
    facts: dict[str, str] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
