"""An autoencoder's halves, and a linear preview, as parts of a bundle: a graph and a weights file a precision each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from epsrt.bundle import Bundle
from epsrt.engines import open_engine
from epsrt.errors import InputError
from epsrt.manifest import Manifest
from epsrt.parity.golden import Golden
from epsrt.parity.measure import r_squared, told
from epsrt.parity.pictures import PREVIEW_R2
from epsrt.part import FREE, IMAGE, Part, Port, ports
from epsrt.types import Float32
from epsrt.verify import part_checks
from epsrt_export import onnx_passes, pictures, unlisted
from epsrt_export.autoencoder import Autoencoder
from epsrt_export.dialects import in_dialects
from epsrt_export.onnx_graph import WeightsFile, line_of, quiet, reason_of, translated
from epsrt_export.precision import half_copy
from epsrt_export.sizes import example

EXAMPLE = 3  # the batch that is traced: neither 0 nor 1, which torch.export would treat as constants


def add_parts(
    autoencoder: Autoencoder, manifest: Manifest, golden: Golden, precisions: Iterable[str], opset: int, directory: Path
) -> tuple[Manifest, Golden]:
    """Write an autoencoder's parts into a directory; the manifest and the golden file with them.

    A linear preview is among them where it is near enough; a note of the manifest has its R² where it is not.
    """
    parts = write_parts(autoencoder, manifest, precisions, opset, directory)
    golden = pictures.with_pictures(golden, autoencoder, manifest)
    assert manifest.latent
    preview = preview_of(*pictures.others(golden, autoencoder, manifest), manifest.latent.factor)
    _, run = pictures.drawn(golden)
    assert run.decoded is not None
    useful, found = near_enough(preview, run.x, run.decoded)
    if useful:
        parts["preview"] = (_write(preview, "the linear preview", "preview", "fp32", manifest, opset, directory),)
    else:
        note = f"a linear preview of its latents was left out: its R² is {found:.2f}, below {PREVIEW_R2:g}"
        by = manifest.provenance
        by = msgspec.structs.replace(by, notes=(*(by.notes or ()), note))
        manifest = msgspec.structs.replace(manifest, provenance=by)
    return msgspec.structs.replace(manifest, parts=parts), golden


def half_parts(bundle: Bundle, wanted: Iterable[str]) -> tuple[Manifest, dict[str, str]]:
    """The manifest without the parts that miss their rung in FP16, and what each missed; their files are removed.

    Where FP16 alone is wanted, those that pass are in FP16 alone.
    """
    manifest, lost = bundle.manifest, dict[str, str]()
    with open_engine(bundle, "onnxruntime", precision="fp16") as engine:
        for check in part_checks(engine, bundle.golden()):
            if check.precision == "fp16" and not (rung := check.run(engine)).passed:
                lost[check.name] = told(rung)
    alone, parts = set(wanted) == {"fp16"}, dict[str, tuple[Part, ...]]()
    for name, made in (manifest.parts or {}).items():
        halved = name not in lost and any(part.precision == "fp16" for part in made)
        needless = "fp16" if name in lost else "fp32" if alone and halved else None
        parts[name] = tuple(part for part in made if part.precision != needless)
        for part in set(made) - set(parts[name]):
            for file in (part.file, part.weights):
                (bundle.path / file).unlink()
    return msgspec.structs.replace(manifest, parts=parts or msgspec.UNSET), lost


def write_parts(
    autoencoder: Autoencoder, manifest: Manifest, precisions: Iterable[str], opset: int, directory: Path
) -> dict[str, tuple[Part, ...]]:
    """Write `decode`, and `encode` where there is one, into a directory: in FP32, and in FP16 where that is asked for.

    `manifest` has the latent. In FP16 a half that does not compute in it is left out. Raises InputError where torch
    cannot export a half, or an engine would not be given it.
    """
    made: dict[str, tuple[Part, ...]] = {}
    for name in ("decode", "encode"):
        own = getattr(autoencoder, name)
        if own is None:
            continue
        rank, kind = len(manifest.shape), f"{type(own).__name__} ({name})"
        found = [_write(autoencoder.half(name, rank), kind, name, "fp32", manifest, opset, directory)]
        if "fp16" in precisions and not autoencoder.forced:
            half = autoencoder.half(name, rank, half_copy(own))
            if _computes(half, found[0], manifest):
                found.append(_write(half, kind, name, "fp16", manifest, opset, directory))
        made[name] = tuple(found)
    return made


class Preview(nn.Module):
    """x [B, c, …] -> pictures: a linear map of each latent pixel's channels, and that colour over all its pixels."""

    def __init__(self, weight: Tensor, bias: Tensor, factor: int):
        super().__init__()
        self.factor, self.weight, self.bias = factor, nn.Buffer(weight), nn.Buffer(bias)  # [C, c] and [C]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        small = torch.einsum("oc,bc...->bo...", self.weight, x) + self.bias.view(-1, *[1] * (x.ndim - 2))
        return {IMAGE: nn.functional.interpolate(small, scale_factor=float(self.factor), mode="nearest")}


def preview_of(x: Float32, pictures: Float32, factor: int) -> Preview:
    """The preview that is nearest to pictures [n, C, …] of latents [n, c, …], in least squares over their pixels."""
    n, channels, *extents = pictures.shape
    blocks = [each for extent in extents for each in (extent // factor, factor)]
    small = pictures.reshape(n, channels, *blocks).mean(tuple(range(3, 3 + 2 * len(extents), 2)), dtype=np.float64)
    columns = np.moveaxis(x, 1, -1).reshape(-1, x.shape[1]).astype(np.float64)
    columns = np.concatenate([columns, np.ones((len(columns), 1))], 1)
    found, *_ = np.linalg.lstsq(columns, np.moveaxis(small, 1, -1).reshape(-1, channels), rcond=None)
    weight, bias = (torch.from_numpy(a.astype(np.float32)) for a in (found[:-1].T, found[-1]))
    return Preview(weight, bias, factor)


def near_enough(preview: Preview, x: Float32, pictures: Float32) -> tuple[bool, float]:
    """Whether a preview is of use for latents that it was not fitted to, and its R² there."""
    with torch.inference_mode():
        found = r_squared(preview(torch.from_numpy(x))[IMAGE].numpy(), pictures)
    return found >= PREVIEW_R2, found


def _computes(half: nn.Module, part: Part, manifest: Manifest) -> bool:
    """Whether a half runs in half precision and gives finite numbers of the shapes of `part`."""
    (port,), factor = part.inputs, manifest.latent.factor if manifest.latent else 1
    try:
        with torch.inference_mode():
            found = half(torch.zeros(1, *port.of(manifest.shape[1:], factor)))
    except Exception:  # somebody else's code, in a dtype that it may never have met
        return False
    wanted = {p.name: (1, *p.of(manifest.shape[1:], factor)) for p in part.outputs}
    return all(
        tuple(found[name].shape) == shape and bool(found[name].isfinite().all()) for name, shape in wanted.items()
    )


def _write(
    module: nn.Module, kind: str, name: str, precision: str, manifest: Manifest, opset: int, directory: Path
) -> Part:
    assert manifest.latent
    takes, gives = ports(name, manifest.free, manifest.latent)
    weights = WeightsFile(f"{name}-weights-{precision}.bin")
    model = _to_onnx(module, kind, takes, gives, manifest, opset, weights)
    if precision == "fp16":
        onnx_passes.softmax_in_fp32(model)
    model = in_dialects(model)["cpu"]
    part = Part(f"{name}-{precision}.onnx", weights.name, precision, takes, gives)  # type: ignore[arg-type]
    (directory / part.file).write_bytes(model.SerializeToString(deterministic=True))
    weights.write(directory)
    if not (directory / part.weights).stat().st_size:  # no engine is given an empty file
        (directory / part.weights).write_bytes(b"\0")
    onnx.checker.check_model(directory / part.file)
    unlisted.check_file(directory / part.file, {part.weights: (directory / part.weights).stat().st_size}, "cpu", kind)
    return part


def _to_onnx(
    module: nn.Module,
    kind: str,
    takes: Sequence[Port],
    gives: Sequence[Port],
    manifest: Manifest,
    opset: int,
    weights: WeightsFile,
) -> onnx.ModelProto:
    assert manifest.latent
    factor, own, sizes = manifest.latent.factor, manifest.shape[1:], manifest.sizes
    traced = own if sizes is None else example(manifest.shape, sizes)
    (port,) = takes
    symbols: dict[int, torch.export.Dim] = {0: torch.export.Dim.AUTO}
    for axis in (i for i, n in enumerate(port.shape) if n == FREE):
        assert sizes is not None
        multiple, largest = sizes.axes(len(own))[axis - 1]
        one = multiple * (factor if port.name == IMAGE else 1)
        multiples = torch.export.Dim(f"axis{axis}", min=1, max=max(largest, traced[axis - 1]) // multiple)
        symbols[axis + 1] = one * multiples if one > 1 else multiples
    given = {port.name: torch.zeros(EXAMPLE, *port.of(traced, factor))}
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(module.eval(), (), given, dynamic_shapes={port.name: symbols})
            made = translated(program, [port.name], [p.name for p in gives], opset)
    except Exception as error:  # torch.export raises many kinds; the user needs the sentence that names the line
        raise InputError(f"torch cannot export {kind}: {reason_of(error)}{line_of(error)}") from error
    weights.take(made)
    model: onnx.ModelProto = ir.to_proto(made)
    unlisted.check(model, kind)
    onnx_passes.strip(model)
    _name_dimensions(model, kind, {p.name: p for p in (*takes, *gives)})
    return model


def _name_dimensions(model: onnx.ModelProto, kind: str, wanted: dict[str, Port]) -> None:
    """Call the free dimensions batch and by their port: engines fix them by these names.

    Raises InputError where torch froze one, which it does without a word.
    """
    for value in (*model.graph.input, *model.graph.output):
        port = wanted[value.name]
        dims = value.type.tensor_type.shape.dim
        free = [i for i, n in enumerate((FREE, *port.shape)) if n == FREE]
        frozen = next((i for i in free if (dims[i].dim_param or "0").isdigit()), None)
        if frozen is not None:
            what, extent = "batch" if frozen == 0 else f"extent {frozen}", dims[frozen]
            raise InputError(
                f"the {what} of {value.name} was frozen to {extent.dim_param or extent.dim_value}: {kind} fixes it, "
                "often by an int of a shape"
            )
        for i in free:
            dims[i].dim_param = port.symbol(i - 1) if i else "batch"
