"""What others may see of a bench."""

from __future__ import annotations

import msgspec

from epsrt.bench.report import Device, Figures, Report, Row

PRIVATE = ("kernel",)  # of the machine: some hosts have one of their own name


def shared(report: Report) -> Report:
    """A whole report that names no host, user, file or path: what was measured, on what, and of which network.

    Left out are engines that did not run, and all sentences: they quote paths. The bundle is known by its digest, and
    is called by its network's class. `epsrt bench compare` reads it.
    """
    of = report.bundle
    return msgspec.structs.replace(
        report,
        date=report.date[:10],
        bundle=msgspec.structs.replace(of, name=of.network.rpartition(".")[2] or "network"),
        machine={name: value for name, value in report.machine.items() if name not in PRIVATE},
        rows=tuple(_bare(row, row.figures) for row in report.rows if row.figures),
        uncounted="not counted" if report.uncounted else "",
    )


def _bare(row: Row, figures: Figures) -> Row:
    device = figures.device
    if device is not None and device.power_w is None:
        device = Device(device.step_ms_p50, device.step_ms_p95, None, "not known")
    return msgspec.structs.replace(row, figures=msgspec.structs.replace(figures, device=device))
