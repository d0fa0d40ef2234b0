"""State dicts of other people's networks: found in whatever a training saved, put into a module, checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn, strided

from epsrt.errors import BundleError, InputError, typed
from epsrt_export.families.tensorfile import SAVE_TENSORS, load

Shapes = Mapping[str, tuple[int, ...]]
Hint = Callable[[Shapes, Shapes], str]  # (the file's, the network's) -> what to do, or ""

DEEPEST = 4  # dicts within dicts
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # of torch, anywhere in a name
_AVERAGED = re.compile(r"(?:^|_)(?:ema|swa|averaged)(?:$|_)", re.IGNORECASE)
_SHADOW = "shadow_params"  # of diffusers' EMAModel, torch_ema and score_sde: averages without names


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


@dataclass(frozen=True, eq=False)
class Place:
    """Where a file has tensors under names: a dict of it, by its keys, and the prefix that they all have there."""

    keys: tuple[str, ...]
    prefix: str
    named: Mapping[str, Any]
    wrapped: tuple[str, ...] = ()  # of WRAPPERS: what was taken out of its names

    @property
    def words(self) -> list[str]:
        return [*self.keys, *filter(None, self.prefix.split("."))]

    @property
    def averaged(self) -> bool:
        """ema_pytorch, timm and Lightning say so in a name; torch's AveragedModel counts beside its weights."""
        if "n_averaged" in self.named and self.prefix.startswith("module."):
            return True
        return any(map(_AVERAGED.search, self.words)) and not self.online

    @property
    def online(self) -> bool:
        """ema_pytorch keeps the model in training beside its average: once more what a trainer saves as `model`."""
        return any(word.startswith("online") for word in self.words)

    def __str__(self) -> str:
        return ".".join(self.words)


def weights(path: str | Path, anchors: str | Sequence[str], ema: bool | None = None) -> Weights:
    """The state dict in a file of torch.save or *.safetensors, wherever a training has put it.

    anchors  tensors that the network always has, by its own names; they are looked for in every dict of the file, under
             any prefix
    ema      true: the averaged weights. false: the plain ones. None: the averaged where there are some

    Names that torch.compile or its data parallelism changed ("_orig_mod.", …) become the network's own.
    Raises BundleError for files that `tensorfile.load` refuses and where no dict holds the anchors, InputError where
    `ema` asks for what the file lacks, or where the file holds several such networks.
    """
    return weights_in(load(path), path, anchors, ema)


def weights_in(found: Any, path: str | Path, anchors: str | Sequence[str], ema: bool | None = None) -> Weights:
    """`weights`, of what a file held."""
    if ema is not None:
        typed("ema", ema, False)
    wanted = (anchors,) if isinstance(anchors, str) else tuple(anchors)
    places = [place for keys, named in dicts_of(found, path) for place in _places(keys, named, wanted)]
    if not places:
        raise BundleError(_foreign(path, found, wanted))
    if any(name.startswith("first_stage_model.") for place in places for name in place.named):
        raise InputError(
            f"{path} is a checkpoint of latent diffusion, whose network draws latents of its first_stage_model: "
            "convert it with diffusers' scripts/convert_ldm_original_checkpoint_to_diffusers.py, and export that "
            "folder with --from diffusers"
        )
    plain, averaged = [p for p in places if not p.averaged], [p for p in places if p.averaged]
    shadow = None if averaged else next(_shadows(found), None)
    both = bool(averaged) or shadow is not None, bool(plain)
    take = both[0] if ema is None else ema
    if not both[0 if take else 1]:
        has = "plain" if take else "averaged"
        raise InputError(f"ema = {str(ema).lower()}, but {path} holds the {has} weights alone: leave ema out")
    place = _one(averaged if take and averaged else plain, path)
    return Weights(
        _tensors(place, path),
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


def dicts_of(found: Any, path: str | Path) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every dict in a file that holds tensors under names, with the keys that lead there, outermost first.

    Raises BundleError for a file that is no dict.
    """
    if not isinstance(found, Mapping) or not found:
        raise BundleError(f"{path} holds a {type(found).__name__}, not a dict of tensors: {SAVE_TENSORS}")
    level: list[tuple[tuple[str, ...], Mapping[Any, Any]]] = [((), found)]
    for _ in range(DEEPEST):
        for keys, part in level:
            if any(isinstance(value, Tensor) for value in part.values()):
                yield keys, {name: value for name, value in part.items() if isinstance(name, str)}
        level = [
            ((*keys, str(key)), value)
            for keys, part in level
            for key, value in part.items()
            if isinstance(value, Mapping) and key not in ("optimizer", "opt", "optim", "optimizer_states")
        ]


def _places(keys: tuple[str, ...], named: Mapping[str, Any], anchors: Sequence[str]) -> Iterator[Place]:
    """Where in one dict all the anchors are under one prefix."""
    wrapped = tuple(wrapper for wrapper in WRAPPERS if any(wrapper in name for name in named))
    own = {unwrapped(name): value for name, value in named.items()}
    for name in own:
        prefix = name.removesuffix(anchors[0])
        if (name == anchors[0] or name.endswith(f".{anchors[0]}")) and all(prefix + a in own for a in anchors):
            yield Place(keys, prefix, own, wrapped)


def unwrapped(name: str) -> str:
    """A tensor's name as the network has it, without what torch.compile and data parallelism put in its middle."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _one(places: Sequence[Place], path: str | Path) -> Place:
    """The place that is nearest to the top; a copy in training gives way to any other."""
    ranked = sorted(places, key=lambda p: (p.online, len(p.words)))
    best = [p for p in ranked if (p.online, len(p.words)) == (ranked[0].online, len(ranked[0].words))]
    if len(best) > 1:
        names = " and ".join(map(str, best[:2]))
        raise InputError(
            f"{path} holds {len(best)} networks of this kind, {names}: save the one that is wanted alone, "
            "torch.save(part, path)"
        )
    return best[0]


def _tensors(place: Place, path: str | Path) -> dict[str, Tensor]:
    found = {}
    for name, value in place.named.items():
        if not name.startswith(place.prefix):
            continue
        if not isinstance(value, Tensor) or value.layout is not strided:
            what = str(value.layout) if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise BundleError(f"{path} is no state dict: its entry {name!r} is {what}, not a tensor; {SAVE_TENSORS}")
        found[name.removeprefix(place.prefix)] = value
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


def rest_of(found: Mapping[Any, Any]) -> dict[str, Any]:
    """The plain values of a file."""
    return {str(name): value for name, value in found.items() if not _holds_tensors(value)}


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_tensors(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return any(_holds_tensors(v) for v in value)
    return isinstance(value, Tensor)


def _shadows(found: Any, depth: int = 0) -> Iterator[tuple[Tensor, ...]]:
    if not isinstance(found, Mapping) or depth > DEEPEST:
        return
    shadow = found.get(_SHADOW)
    if isinstance(shadow, (list, tuple)) and shadow and all(isinstance(t, Tensor) for t in shadow):
        yield tuple(shadow)
    for value in found.values():
        yield from _shadows(value, depth + 1)


def _averages(module: nn.Module, found: Weights, path: str | Path) -> Mapping[str, Tensor]:
    """The tensors with the averages in place of the parameters, which lie in the order of the file's own names."""
    if found.shadow is None:
        return found.tensors
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    names = [name for name in found.tensors if name in trained]
    fit = len(names) == len(found.shadow) and all(
        found.tensors[name].shape == tensor.shape for name, tensor in zip(names, found.shadow, strict=True)
    )
    if not fit:
        raise BundleError(
            f"{path}: its {_SHADOW} are {len(found.shadow)} tensors without names, which are not the network's "
            f"{len(names)} parameters: take the plain weights with ema=false, or copy the averages into the model and "
            "save its state_dict()"
        )
    return {**found.tensors, **dict(zip(names, found.shadow, strict=True))}


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
    if next(_shadows(found), None) is not None:
        return (
            f"{path} holds averages without names ({_SHADOW}), and no network beside them: copy them into the model "
            "(ema.copy_to(model.parameters())) and save its state_dict()"
        )
    lists = next(iter(dicts_of(found, path)), None)
    if lists is None:
        return f"{path} holds no tensors under names: {SAVE_TENSORS}"
    return (
        f"{path} holds no network of this family, which has a tensor {anchors[0]}; its first is "
        f"{next(iter(lists[1]))}: epsrt inspect {path} says what it looks like"
    )
