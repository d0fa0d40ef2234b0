"""epsrt train: placeholder until the trainer lands."""

EXAMPLES = ""


def train() -> None:
    """x"""
