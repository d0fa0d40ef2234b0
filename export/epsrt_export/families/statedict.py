"""State dicts of other people's networks: found in whatever a training saved, put into a module, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn, strided

from epsrt.errors import BundleError, InputError, typed
from epsrt_export.families.places import (
    LATENT_DIFFUSION,
    SHADOW,
    Place,
    dicts_of,
    holds_tensors,
    latent_diffusion,
    places_of,
    rest_of,
    shadows,
)
from epsrt_export.families.tensorfile import SAVE_TENSORS, load

Shapes = Mapping[str, tuple[int, ...]]
Hint = Callable[[Shapes, Shapes], str]  # (the file's, the network's) -> what to do, or ""


@dataclass(frozen=True, eq=False)
class Weights:
    """A network's tensors in a file, and what stood around them.

    tensors  by the network's own names, on the CPU, dtypes as they are
    beside   other tensors of the same dict: a diffusion's buffers
    rest     plain values of the file: step, epoch, hyper_parameters
    shadow   averages in the order of parameters(), where an averager kept no names; `load_into` takes them
    notes    sentences: what was chosen, and which prefixes were taken off
    prefix   what stood before the names, without torch's wrappers: "model." of a diffusion
    """

    tensors: dict[str, Tensor]
    beside: dict[str, Tensor] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)
    shadow: tuple[Tensor, ...] | None = None
    notes: tuple[str, ...] = ()
    prefix: str = ""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


def weights(path: str | Path, anchors: str | Sequence[str], ema: bool | None = None, latent: bool = False) -> Weights:
    """The state dict in a file of torch.save or *.safetensors, wherever a training has put it.

    anchors  tensors that the network always has, by its own names; they are looked for in every dict of the file, under
             any prefix
    ema      true: the averaged weights. false: the plain ones. None: the averaged where there are some
    latent   the file may be of latent diffusion, whose autoencoder is then in `beside`

    Names that torch.compile or its data parallelism changed ("_orig_mod.", …) become the network's own.
    Raises BundleError for files that `tensorfile.load` refuses and where no dict holds the anchors, InputError where
    `ema` asks for what the file lacks, where the file holds several such networks, or where it is of latent diffusion.
    """
    return weights_in(load(path), path, anchors, ema, latent)


def weights_in(
    found: Any, path: str | Path, anchors: str | Sequence[str], ema: bool | None = None, latent: bool = False
) -> Weights:
    """`weights`, of what a file held."""
    if ema is not None:
        typed("ema", ema, False)
    wanted = (anchors,) if isinstance(anchors, str) else tuple(anchors)
    places = places_of(found, wanted, path)
    if not places:
        raise BundleError(_foreign(path, found, wanted))
    if not latent and any(latent_diffusion(place.named) for place in places):
        raise InputError(f"{path} {LATENT_DIFFUSION}")
    plain, averaged = [p for p in places if not p.averaged], [p for p in places if p.averaged]
    shadow = None if averaged else next(shadows(found), None)
    both = bool(averaged) or shadow is not None, bool(plain)
    take = both[0] if ema is None else ema
    if not both[0 if take else 1]:
        has = "plain" if take else "averaged"
        raise InputError(f"ema = {str(ema).lower()}, but {path} holds the {has} weights alone: leave ema out")
    place = _one(averaged if take and averaged else plain, path)
    return Weights(
        tensors_under(place.prefix, place.named, path),
        _beside(place),
        rest_of(found),
        shadow if take else None,
        tuple(_notes(place, Path(path).name, take, all(both))),
        place.prefix,
    )


def load_into(
    module: nn.Module, found: Weights | Mapping[str, Tensor], path: str | Path, hint: Hint | None = None
) -> None:
    """Make what was found the weights of `module`, which may be on the meta device; it is then in eval mode.

    Floating-point tensors of another dtype (of training in half precision) become the module's, float32; the others
    are taken as they are and not copied. `hint` says what to do, from the shapes, where they do not fit.
    Raises BundleError naming the first tensor that is missing, surplus, or of another shape or kind.
    """
    tensors = _averages(module, found, path) if isinstance(found, Weights) else found
    wanted = module.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    needs = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    misfit = ""
    if missing := [name for name in needs if name not in shapes]:
        misfit = f"it lacks the tensor {missing[0]}, {len(missing)} of {len(needs)} in all"
    elif surplus := [name for name in shapes if name not in needs]:
        misfit = f"it has a tensor {surplus[0]}, {len(surplus)} of {len(shapes)} in all, that the network lacks"
    elif other := [name for name in needs if shapes[name] != needs[name]]:
        misfit = f"{other[0]} has shape {list(shapes[other[0]])}, the network {list(needs[other[0]])}"
    if misfit:
        way_out = (hint(shapes, needs) if hint else "") or f"epsrt inspect {path} says what the file holds"
        raise BundleError(f"{path} does not fit: {misfit}: {way_out}")
    for name, tensor in wanted.items():
        if tensors[name].is_floating_point() != tensor.is_floating_point():
            raise BundleError(f"{path}: {name} holds {tensors[name].dtype}, the network {tensor.dtype}: {SAVE_TENSORS}")
    module.load_state_dict({name: tensors[name].to(wanted[name].dtype) for name in wanted}, assign=True)
    module.eval().requires_grad_(False)


def _one(places: Sequence[Place], path: str | Path) -> Place:
    """The only place; a copy in training gives way to any other."""
    best = [p for p in places if not p.online] or list(places)
    if len(best) > 1:
        names = " and ".join(map(str, best[:2]))
        raise InputError(
            f"{path} holds {len(best)} networks of this kind, {names}: save the state dict of the one that is wanted "
            "alone, torch.save(model.state_dict(), path)"
        )
    return best[0]


def tensors_under(prefix: str, named: Mapping[str, Any], path: str | Path) -> dict[str, Tensor]:
    """The tensors of a dict whose names begin with a prefix, without it. Raises BundleError for what has no values."""
    found = {}
    for name, value in named.items():
        if not name.startswith(prefix):
            continue
        if not isinstance(value, Tensor) and not holds_tensors(value):
            continue  # an epoch or a version beside the tensors
        if not isinstance(value, Tensor) or value.layout is not strided or value.is_meta:
            what = f"a {type(value).__name__}"
            if isinstance(value, Tensor):
                what = "without values, on the meta device" if value.is_meta else str(value.layout)
            raise BundleError(f"{path} is no state dict: its entry {name!r} is {what}, not a tensor; {SAVE_TENSORS}")
        found[name.removeprefix(prefix)] = value
    return found


def _beside(place: Place) -> dict[str, Tensor]:
    """The dict's other tensors, without what part of the prefix they share."""
    parts = place.prefix.split(".")[:-1]
    outer = [".".join(parts[:n]) + "." for n in range(len(parts), 0, -1)]
    return {
        name.removeprefix(next((p for p in outer if name.startswith(p)), "")): value
        for name, value in place.named.items()
        if isinstance(value, Tensor) and not name.startswith(place.prefix)
    }


def _averages(module: nn.Module, found: Weights, path: str | Path) -> Mapping[str, Tensor]:
    """The tensors with the averages in place of the parameters, which lie in the order of the file's own names."""
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    return with_averages(found, [name for name in found.tensors if name in trained], path)


def with_averages(found: Weights, names: Sequence[str], path: str | Path, more: int = 0) -> dict[str, Tensor]:
    """The tensors, with the averages that have no names in place of those of `names`, in that order.

    more  how many averages of something else may follow

    Raises BundleError where they are not of these tensors.
    """
    if found.shadow is None:
        return found.tensors
    fit = len(found.shadow) in (len(names), len(names) + more) and all(
        found.tensors[name].shape == tensor.shape for name, tensor in zip(names, found.shadow, strict=False)
    )
    if not fit:
        raise BundleError(
            f"{path}: its {SHADOW} are {len(found.shadow)} tensors without names, which are not the network's "
            f"{len(names)} parameters: take the plain weights with ema=false, or copy the averages into the model and "
            "save its state_dict()"
        )
    return {**found.tensors, **dict(zip(names, found.shadow, strict=False))}


def _notes(place: Place, file: str, averaged: bool, both: bool) -> Iterator[str]:
    if both:
        which, other = ("averaged (EMA)", "--no-ema") if averaged else ("plain", "--ema")
        yield f"{file}: the {which} weights were taken, of both that it holds; {other} takes the others"
    elif averaged:
        yield f"{file}: its weights are averaged (EMA) ones"
    if place.keys:
        yield f"{file}: the network was found in {''.join(f'[{key!r}]' for key in place.keys)}"
    for taken in (*place.wrapped, *filter(None, [place.prefix])):
        yield f"{file}: {taken!r} was taken off the names of its tensors"


def _foreign(path: str | Path, found: Any, anchors: Sequence[str]) -> str:
    if next(shadows(found), None) is not None:
        return (
            f"{path} holds averages without names ({SHADOW}), and no network beside them: copy them into the model "
            "(ema.copy_to(model.parameters())) and save its state_dict()"
        )
    lists = next(iter(dicts_of(found, path)), None)
    if lists is None:
        return f"{path} holds no tensors under names: {SAVE_TENSORS}"
    return (
        f"{path} holds no network of this family, which has a tensor {anchors[0]}; its first is "
        f"{next(iter(lists[1]), 'none')}: epsrt inspect {path} says what it looks like"
    )
