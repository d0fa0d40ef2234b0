"""What the documentation says: its Python runs, its table of methods is the program's."""

import re
from pathlib import Path

from epsrt import Plan
from epsrt.solvers import METHODS, options_of

PAGE = (Path(__file__).parents[1] / "docs" / "reference" / "samplers.md").read_text()


def test_the_pages_python_runs():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) >= 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert isinstance(names["plan"], Plan)


def test_the_table_of_methods_is_the_programs():
    rows = {}
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and re.fullmatch(r"`[a-z0-9-]+`", cells[0]):
            rows[cells[0].strip("`")] = cells
    assert list(rows) == list(METHODS)
    for name, (_, order, evaluations, stochastic, options, paper) in rows.items():
        method = METHODS[name]
        assert (order, evaluations) == (str(method.order), method.evaluations)
        assert stochastic == (method.stochastic if method.stochastic in ("no", "yes") else f"{method.stochastic} > 0")
        assert paper
        if options != "the same":
            assert [o.strip() for o in options.split(",") if o.strip()] == list(options_of(name))
