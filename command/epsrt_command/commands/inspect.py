"""epsrt inspect: what a bundle holds, as a person wants to read it; and what a file that is none looks like."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from epsrt.errors import InputError
from epsrt_command import show
from epsrt_command.foreign import needs

EXAMPLES = """\
epsrt inspect out/digits.epsrt
epsrt inspect out/digits.epsrt --json | jq .manifest.schedule
epsrt inspect somebodys-model.pt
epsrt inspect path/to/diffusers-folder
"""


PathArgument = Annotated[
    Path, typer.Argument(metavar="PATH", help="A bundle; or a file of weights or a folder, to be told what it is.")
]


def inspect(path: PathArgument, as_json: show.JsonOption = False) -> None:
    """Show what a bundle holds, where it came from and how well it was proven. Verifies every file first.

    Of anything else it says what it looks like, from the names and shapes of its tensors, and the command to export it.
    """
    from epsrt.bundle import Bundle
    from epsrt.manifest import AXES, MANIFEST

    if path.suffix != ".epsrt" and not (path / MANIFEST).is_file():
        if not path.exists():
            raise InputError(f"{path} does not exist: give a bundle, a file of weights or a folder")
        _look(path, as_json)
        return
    opened = Bundle.open(path)
    m, rungs = opened.manifest, opened.parity()
    if as_json:
        show.print_json({"manifest": msgspec.to_builtins(m), "parity": msgspec.to_builtins(rungs)})
        return
    console, p, s = show.out(), m.provenance, m.schedule
    facts = show.table(f"{path}", "", "")
    alpha, sigma = s.at(s.span)
    span = f", β {s.beta_start:g} … {s.beta_end:g}" if s.kind in ("linear", "scaled-linear", "sigmoid") else ""
    classes = f"{m.classes}{_some(m.class_names)}" if m.classes else "none: unconditional"
    if m.null_label is not None:
        classes += f", null label {m.null_label}"
    what = "latents" if m.latents else "images" if len(m.shape) == 3 else "samples"
    axes = " × ".join(["C", *(name[0].upper() for name in AXES[len(m.shape) - 1])])
    facts.add_row(what, f"{' × '.join(map(str, m.shape))} ({axes}), values {m.value_range[0]:g} … {m.value_range[1]:g}")
    if latent := m.latent:
        low, high = latent.value_range
        forced = ", in FP32 alone" if latent.forced else ""
        facts.add_row(
            "pictures",
            f"{' × '.join(map(str, latent.shape))}, values {low:g} … {high:g}, {latent.factor} pixels each{forced}",
        )
        facts.add_row(
            "", f"latents are (z − shift)·scale: scale {_numbers(latent.scale)}, shift {_numbers(latent.shift)}"
        )
    if m.sizes is not None:
        facts.add_row("sizes", m.sizes.words(len(m.shape) - 1))
    facts.add_row("classes", classes)
    for c in m.conditions or ():
        null = "" if c.null is None else f", null {c.null}"
        shape = " × ".join(map(str, c.shape)) or "a number"
        facts.add_row(c.name, f"{c.role}, {shape}, {c.dtype}{', guided' if c.guided else ''}{null}")
    variance = {None: "", "learned": ", and log σ²", "learned_range": ", and log σ² as a fraction from log β̃ to log β"}
    facts.add_row("predicts", f"{m.prediction}{variance[m.variance]}")
    if by := m.thresholding:
        facts.add_row("x0", f"thresholded by the {by.ratio:g} quantile of |x0|, at most {by.maximum:g} × the values")
    facts.add_row("schedule", f"{s.kind}, T = {s.T}{span}{', zero terminal SNR' if s.zero_snr else ''}")
    if s.preserves_variance:
        facts.add_row("ᾱ", f"{s.alpha_bar[0]:.6g} … {s.alpha_bar[-1]:.3g}")
    else:
        facts.add_row("α, σ", f"{alpha[0]:.6g}, {sigma[0]:.3g} … {alpha[1]:.3g}, {sigma[1]:.6g}")
    own = m.sampling
    how = ", ".join(f"{key} {value}" for key, value in {"spacing": own.spacing, **own.options}.items())
    bounded = "x0 not clipped" if m.clip is None else f"x0 in ±{m.clip:g}"
    guided = f", guidance {own.guidance:g} where there is a label" if own.guidance != 1 else ""
    facts.add_row("samples by", f"{own.method}, {own.steps or 'any'} steps, {how}, {bounded}{guided}")
    if m.prediction == "edm":
        facts.add_row("σ_data", f"{m.sigma_data:g}")
    facts.add_row("batch", f"1 … {m.max_batch}")
    facts.add_row("network", f"{p.network}, {p.parameters:,} parameters")
    whose = f", {p.family}{f' {p.version}' if p.version else ''}" if p.family != "module" else ""
    facts.add_row("from", f"{p.source}{whose}, sha256 {p.source_sha256}")
    for sentence in p.notes or ():
        facts.add_row("", sentence)
    if (judge := m.classifier) is not None:
        told = f"{judge.classes} classes{_some(judge.class_names)}"
        facts.add_row("classifier", f"{judge.network}, {told}, {judge.parameters:,} parameters")
        facts.add_row("", f"from {judge.source}, sha256 {judge.source_sha256}")
    facts.add_row("made with", ", ".join(f"{name} {version}" for name, version in p.versions.items()))
    for title, values in (("config", p.config), ("training", p.training)):
        for name, part in _parts(title, values):
            facts.add_row(name, ", ".join(f"{key} {value}" for key, value in part.items()))
    facts.add_row("digest", m.digest)
    console.print(facts, "")
    graphs = show.table("Step graphs", "file", "precision", "features", "dialects", "weights", "columns")
    graphs.columns[0].no_wrap = True
    plain = m.graphs[0].columns
    for g in m.graphs:
        more = ["…", *g.columns[len(plain) :]] if g.columns[: len(plain)] == plain != g.columns else g.columns
        words = ", ".join(g.features) or "plain", " ".join(g.files())
        graphs.add_row(g.file, g.precision, *words, g.weights, " ".join(more))
    console.print(graphs, "")
    if m.parts:
        parts = show.table("Parts", "part", "file", "precision", "takes", "gives", "weights")
        for name, several in m.parts.items():
            for made in several:
                takes, gives = (
                    ", ".join(f"{p.name} {_extents(p.shape)}" for p in s) for s in (made.inputs, made.outputs)
                )
                parts.add_row(name, made.file, made.precision, takes, gives, made.weights)
        console.print(parts, "")
    files = show.table("Files", "file", "size", "sha256", right=("size",))
    for name, entry in m.files.items():
        files.add_row(name, show.size(entry.size), entry.sha256[:16] + "…")
    console.print(files, "")
    console.print(show.rung_table(rungs))


def _look(path: Path, as_json: bool) -> None:
    """Raises InputError, after all that is known, where no command would export it."""
    with needs(f"{path} is no bundle, and a look at it", "export,cpu"):
        from epsrt_export.families.look import look
    seen = look(path)
    if as_json:
        show.print_json(dataclasses.asdict(seen) | {"path": str(path)})
    else:
        typer.echo(f"{path} is no bundle. It looks like this:")
        facts = show.table("", "", "")
        for what, how in seen.facts:
            facts.add_row(what, how)
        show.out().print(facts, "")
    if seen.problem:
        raise InputError(f"{path}: {seen.problem}")
    if not as_json:
        typer.echo(seen.command)
        for name, why in seen.missing:
            typer.echo(f"  {name}: {why}")


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _extents(shape: tuple[int, ...]) -> str:
    return "×".join("?" if n < 0 else str(n) for n in shape)


def _some(names: tuple[str, ...]) -> str:
    """The first class names, in brackets."""
    return f" ({', '.join(names[:12])}{', …' if len(names) > 12 else ''})" if names else ""


def _parts(title: str, values: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Plain values as rows, those in a dict of their own under its name."""
    plain = {key: value for key, value in values.items() if not isinstance(value, dict)}
    nested = [(f"{title}: {key}", value) for key, value in values.items() if isinstance(value, dict) and value]
    return ([(title, plain)] if plain else []) + nested
