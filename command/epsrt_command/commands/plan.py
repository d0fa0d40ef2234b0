"""epsrt plan: a sampler as its table, and drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import numpy as np
import typer
from typer import Option

from epsrt.errors import InputError
from epsrt.noise_levels import PREDICTIONS
from epsrt.plan import CLIP_OFF, COLUMNS, DEFAULTS, Plan
from epsrt.schedule import Kind, Schedule
from epsrt.solvers import METHODS, make, options_of
from epsrt.types import Float64
from epsrt_command import show
from epsrt_command.planning import AnyPlanning

EXAMPLES = """\
epsrt plan --list
epsrt plan --method dpmpp-2m --steps 20 --spacing karras --out plan.png
epsrt plan --method ddpm --steps 1000 --bundle out/digits.epsrt --json
epsrt plan --method heun --schedule ve --prediction edm --spacing karras --steps 18 --set s_churn=40
"""


def plan(
    *,
    bundle: Annotated[
        Path | None,
        Option("--bundle", "-b", help="Take schedule, prediction and clip from a bundle.", show_default=False),
    ] = None,
    schedule: Annotated[
        str | None,
        Option(
            help=f"The schedule, without a bundle: {', '.join(k for k in get_args(Kind) if k != 'given')}; else linear."
        ),
    ] = None,
    prediction: Annotated[
        str | None,
        Option(help=f"What the network returns, without a bundle: {', '.join(PREDICTIONS)}; by default epsilon."),
    ] = None,
    planning: AnyPlanning,
    out: Annotated[Path | None, Option("--out", "-o", help="Also draw it: .png or .svg.")] = None,
    listed: Annotated[bool, Option("--list", help="List every method, and stop.")] = False,
    as_json: show.JsonOption = False,
) -> None:
    """Show a sampler's table: one row a network evaluation. Or list the samplers."""
    if listed:
        _list(as_json)
        return
    if out is not None:
        from epsrt_command import charts

        charts.check_target(out)
    if bundle is not None:
        if schedule is not None or prediction is not None:
            raise InputError("--bundle says which schedule and prediction: leave --schedule and --prediction out")
        from epsrt.bundle import Bundle

        opened = Bundle.open(bundle)
        m = opened.manifest
        visited, prediction = m.schedule, m.prediction
        made = opened.plan(**planning.asked(m.bound))
    else:
        visited = Schedule("linear" if schedule is None else schedule)  # type: ignore[arg-type]
        prediction = "epsilon" if prediction is None else prediction
        given = {"method": "ddim", "prediction": prediction, **planning.asked(1.0)}
        made = make(schedule=visited, **given)
    if prediction == "edm":  # it is told ¼ ln σ
        t, alpha, sigma = visited.level(-4 * made["t"])
    else:
        t, (alpha, sigma) = made["t"], visited.at(made["t"])
    if out is not None:
        title = f"{made.name}, {len(made)} rows"
        title += f", {planning.spacing} timesteps" if planning.spacing and planning.timesteps is None else ""
        charts.save(charts.plan(visited, t, title), out)
    with np.errstate(divide="ignore"):
        log_snr = np.log(alpha / sigma)
    if as_json:
        rows = [dict(zip(COLUMNS, row, strict=True)) for row in made.table.tolist()]
        show.print_json(
            {
                "method": made.name,
                "start": list(made.start),
                "stochastic": made.stochastic,
                "timesteps": t.tolist(),
                "alpha": alpha.tolist(),
                "sigma": sigma.tolist(),
                "rows": rows,
            }
        )
        return
    for line in show.lines(_table(made, log_snr), right=True):
        typer.echo(line)
    begin = " + ".join(f"{k:.6g}·{what}" for k, what in zip(made.start, ("init", "z"), strict=True) if k)
    where = f"; {out}" if out is not None else ""
    typer.echo(f"\n{made.name}: {len(made)} rows, x begins as {begin}; columns not shown hold their defaults{where}")


def _table(made: Plan, log_snr: Float64) -> list[list[str]]:
    used = [name for name in COLUMNS if name == "t" or np.any(made[name] != DEFAULTS[name])]
    if np.array_equal(made["n"], np.arange(len(made))):
        used.remove("n")
    used = [name for name in used if name not in ("j", "ka", "kb")]  # of other graphs than the plain
    table = [["row", "λ", *used]]
    for i in range(len(made)):
        cells = ["off" if n == "clip" and made[n][i] == CLIP_OFF else f"{made[n][i] + 0.0:.5g}" for n in used]
        table.append([str(i), f"{log_snr[i]:.4g}", *cells])
    return table


def _list(as_json: bool) -> None:
    if as_json:
        show.print_json(
            [
                {
                    "method": name,
                    "order": m.order,
                    "evaluations_a_step": m.evaluations,
                    "stochastic": m.stochastic,
                    "options": {k: v if v != np.inf else None for k, v in options_of(name).items()},
                    "paper": m.paper,
                }
                for name, m in METHODS.items()
            ]
        )
        return
    table = [["method", "order", "evaluations", "stochastic", "paper", "options"]]
    for name, m in METHODS.items():
        options = ", ".join(f"{k}={v}" for k, v in options_of(name).items())
        stochastic = m.stochastic if m.stochastic in ("no", "yes") else f"{m.stochastic} > 0"
        table.append([name, str(m.order), m.evaluations, stochastic, m.paper, options])
    for line in show.lines(table):
        typer.echo(line)
