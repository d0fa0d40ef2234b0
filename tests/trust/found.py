"""What a part found."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Found:
    """How often each thing happened, and findings in words."""

    counts: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)

    def note(self, what: str, *sentences: str) -> None:
        for sentence in sentences:
            self.counts[what] += 1
            self.findings.append(f"{what}: {sentence}"[:400])

    def add(self, other: Found) -> None:
        self.counts += other.counts
        self.findings += other.findings
