"""Places: where in what a training saved the tensors of a network lie, under which names, averaged or plain."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from epsrt.errors import BundleError
from epsrt_export.families.tensorfile import SAVE_TENSORS

DEEPEST = 4  # dicts within dicts
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # of torch, anywhere in a name
_AVERAGED = re.compile(r"(?:^|_|(?<=[a-z])(?=E))(?:ema|EMA|Ema|swa|SWA|averaged|avg)(?=$|_|[A-Z])")
_PLAIN = re.compile(r"(?:^|_)(?:non?|without)_?ema", re.IGNORECASE)
_CURRENT = "current_model_state"  # of Lightning's WeightAveraging: the plain weights, state_dict the averages
LATENT_DIFFUSION = "is a checkpoint of latent diffusion: say --from latent-diffusion"
SHADOW = "shadow_params"  # of diffusers' EMAModel, torch_ema and score_sde: averages without names


@dataclass(frozen=True, eq=False)
class Place:
    """Where a file has tensors under names: a dict of it, by its keys, and the prefix that they all have there."""

    keys: tuple[str, ...]
    prefix: str
    named: Mapping[str, Any]
    wrapped: tuple[str, ...] = ()  # of WRAPPERS: what was taken out of its names
    current: bool | None = None  # of a file with _CURRENT: whether this is that

    @property
    def words(self) -> list[str]:
        return [*self.keys, *filter(None, self.prefix.split("."))]

    @property
    def averaged(self) -> bool:
        """ema_pytorch, timm and Lightning say so in a name; torch's AveragedModel counts beside its weights."""
        if self.current is not None:
            return not self.current
        if self.prefix.endswith("module.") and f"{self.prefix.removesuffix('module.')}n_averaged" in self.named:
            return True
        plain = self.online or any(map(_PLAIN.search, self.words))
        return any(map(_AVERAGED.search, self.words)) and not plain

    @property
    def online(self) -> bool:
        """ema_pytorch keeps the model in training beside its average: once more what a trainer saves as `model`."""
        return any(word.startswith("online") for word in self.words)

    def __str__(self) -> str:
        return ".".join(self.words)


def places_of(found: Any, anchors: Sequence[str], path: str | Path) -> list[Place]:
    """Everywhere in a file that a network lies, which always has the tensors `anchors`.

    Raises BundleError for a file that is no dict, and where two names are one tensor of the network.
    """
    places = []
    for keys, named in dicts_of(found, path):
        for place in _in_one(keys, named, anchors, path):
            current = None if _CURRENT not in found else keys[:1] == (_CURRENT,)
            places += [replace(place, current=current), *_undotted(place)]
    return places


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


def _in_one(
    keys: tuple[str, ...], named: Mapping[str, Any], anchors: Sequence[str], path: str | Path
) -> Iterator[Place]:
    """Where in one dict all the anchors are under one prefix. Raises BundleError where two names become one."""
    wrapped = tuple(wrapper for wrapper in WRAPPERS if any(wrapper in name for name in named))
    own = {unwrapped(name): value for name, value in named.items()}
    if len(own) < len(named):
        twice = next(name for name in named if name != unwrapped(name) and unwrapped(name) in named)
        raise BundleError(f"{path} holds {twice} and {unwrapped(twice)}, one tensor of the network: {SAVE_TENSORS}")
    for name in own:
        prefix = name.removesuffix(anchors[0])
        if (name == anchors[0] or name.endswith(f".{anchors[0]}")) and all(prefix + a in own for a in anchors):
            yield Place(keys, prefix, own, wrapped)


def _undotted(place: Place) -> Iterator[Place]:
    """The averages beside a network `attribute` that a LitEma keeps as attribute_ema, under names without dots."""
    parts = place.prefix.split(".")[:-1]
    names = [name for name in place.named if name.startswith(place.prefix)]
    for depth in range(1, len(parts) + 1):
        attribute, inner = ".".join(parts[:depth]), ".".join([*parts[depth:], ""])
        kept = {name: f"{attribute}_ema.{name.removeprefix(f'{attribute}.').replace('.', '')}" for name in names}
        dotted = {name: other for name, other in kept.items() if "." in name.removeprefix(f"{attribute}.")}
        if any(other in place.named for other in dotted.values()):
            averages = {name: place.named.get(other, place.named[name]) for name, other in kept.items()}
            prefix = f"{attribute}_ema.{inner}"
            others = {name: tensor for name, tensor in place.named.items() if not name.startswith(f"{attribute}_ema.")}
            own = {prefix + name.removeprefix(place.prefix): tensor for name, tensor in averages.items()}
            yield replace(place, prefix=prefix, named=others | own)


def latent_diffusion(named: Iterable[str]) -> bool:
    """Whether these are the names of CompVis' latent diffusion, an autoencoder beside the network."""
    return any(name.startswith("first_stage_model.") or ".first_stage_model." in name for name in named)


def unwrapped(name: str) -> str:
    """A tensor's name as the network has it, without what torch.compile and data parallelism put in its middle."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def rest_of(found: Mapping[Any, Any]) -> dict[str, Any]:
    """The plain values of a file."""
    return {str(name): value for name, value in found.items() if not holds_tensors(value)}


def holds_tensors(value: Any, depth: int = 0) -> bool:
    """Whether it is not plain; what lies too deep, or in a circle, is taken to be so."""
    if depth > 2 * DEEPEST:
        return True
    if isinstance(value, Mapping):
        return any(holds_tensors(v, depth + 1) for v in value.values())
    if isinstance(value, (list, tuple)):
        return any(holds_tensors(v, depth + 1) for v in value)
    return isinstance(value, Tensor)


def shadows(found: Any, depth: int = 0) -> Iterator[tuple[Tensor, ...]]:
    """Averages without names, wherever a file has them."""
    if not isinstance(found, Mapping) or depth > DEEPEST:
        return
    shadow = found.get(SHADOW)
    if isinstance(shadow, (list, tuple)) and shadow and all(isinstance(t, Tensor) for t in shadow):
        yield tuple(shadow)
    for value in found.values():
        yield from shadows(value, depth + 1)
