"""held: the comparison of every test here. Its figures are printed as a table by `pytest -v tests/parity`."""

import pytest
from theirs import widen
from toy import largest

from unets import bundle_path, edited_bundle_path  # noqa: F401 (fixtures: their networks are at hand)

FIGURES = pytest.StashKey[dict[tuple[str, str], float]]()
REFERENCES = {"float32": "diffusers", "float64": "diffusers in float64"}


@pytest.fixture
def held(request, record_property):
    """held(method, reference, ours, theirs, at_most): both are sane, differ by so much at most, the figure is kept."""

    def hold(method, reference, ours, theirs, at_most):
        assert 0.1 < float(theirs.std()) < 2  # nobody has collapsed or blown up: an absolute figure means something
        assert float(theirs.abs().max()) < 10
        delta = largest(ours, theirs)
        reference = REFERENCES.get(reference, reference)
        record_property(f"{method} | {reference}", delta)
        kept = request.config.stash.setdefault(FIGURES, {})
        kept[method, reference] = max(delta, kept.get((method, reference), 0.0))
        assert delta <= at_most

    return hold


@pytest.fixture(params=["float32", "float64"])
def diffusers(request, monkeypatch):
    """diffusers as it is, or with every float32 of its schedulers a float64: "float32" or "float64"."""
    if request.param == "float64":
        widen(monkeypatch)
    return request.param


def pytest_terminal_summary(terminalreporter, config):
    kept = config.stash.get(FIGURES, {})
    if kept and config.get_verbosity() > 0:
        terminalreporter.section("max |Δ| of whole trajectories")
        for (method, reference), delta in sorted(kept.items()):
            terminalreporter.write_line(f"| {method} | {reference} | {delta:.1e} |")
