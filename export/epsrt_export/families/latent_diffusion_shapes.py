"""What the shapes in a checkpoint of latent diffusion show: network, labels, autoencoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from epsrt.errors import BundleError, InputError
from epsrt_export.families.adm_shapes import Seen, seen
from epsrt_export.families.first_stage import StageShape
from epsrt_export.families.shapes import shape_in
from epsrt_export.families.statedict import Shapes

STAGE, CONDITION = "first_stage_model.", "cond_stage_model."
TABLE = f"{CONDITION}embedding.weight"
# widths, and context_dim, of the published networks -> what no tensor shows of their attentions
PUBLISHED: dict[tuple[int, tuple[float, ...], int], tuple[str, int]] = {
    (224, (1, 2, 3, 4), 0): ("num_head_channels", 32),  # CelebA-HQ, FFHQ, LSUN bedrooms
    (192, (1, 2, 2, 4, 4), 0): ("num_heads", 8),  # LSUN churches
    (192, (1, 2, 3, 5), 512): ("num_heads", 1),  # ImageNet, f = 4
    (256, (1, 2, 4), 512): ("num_head_channels", 32),  # ImageNet, f = 8
}


@dataclass(frozen=True)
class Shown:
    """A network, how many labels it knows, and the autoencoder of its latents where that is there.

    attends   its blocks attend to a row of the table of labels, which is not the network's own
    """

    network: Seen
    labels: int
    attends: bool
    stage: StageShape | None

    @classmethod
    def of(cls, shapes: Shapes, beside: Shapes, path: str | Path) -> Shown:
        """`shapes` of the network, by its own names, and those beside it.

        Raises InputError for networks that are told a text or a second image, and where the autoencoder is of another
        network; BundleError where tensors are missing.
        """
        network = seen(shapes, path, contexts=True)
        stage = None
        if any(name.startswith(STAGE) for name in beside):
            stage = StageShape.of({name.removeprefix(STAGE): s for name, s in beside.items()}, path)
            if stage.latents != network.in_channels:
                raise InputError(
                    f"{path}: its autoencoder's latents have {stage.latents} channels, and the network's "
                    f"{network.in_channels}: it is not the autoencoder that the network was trained with; --set "
                    "autoencoder=false leaves it out"
                )
        if not network.context_dim:
            return cls(network, network.num_classes, False, stage)
        if any(name.startswith(CONDITION) and name != TABLE for name in beside):
            raise InputError(
                f"{path} takes a context in each step that its cond_stage_model makes, of a text say, and this family "
                "reads networks that are told a class or nothing: from Python, give the context as a condition "
                "(export_network, conditions=)"
            )
        labels, width = shape_in(beside, TABLE, 2, path)
        if width != network.context_dim:
            raise BundleError(
                f"{path}: {TABLE} has rows of {width} numbers, and the network attends to {network.context_dim}: copy "
                "the file again"
            )
        return cls(network, labels, True, stage)

    @property
    def published(self) -> tuple[str, int] | None:
        """num_heads or num_head_channels of the published network that looks so."""
        found = self.network
        return PUBLISHED.get((found.num_channels, found.channel_mult, found.context_dim))
