"""The published configurations of score_sde_pytorch (arXiv 2011.13456), as far as a state dict does not show them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Training:
    """What a network was trained for, and how it is sampled.

    sde         vp, ve or subvp; `continuous`: told real times, else the indices of noise levels
    size        pixels; sigma_max of VE, whose sigma_min is 0.01; scales: timesteps
    predictor   of its sampler; VE's has Langevin's corrector besides
    fir, rescaled   of the network: see ScoreConfig
    kind        of the network: what its tensors show, apart from sizes
    width, mult, blocks   its sizes
    """

    sde: str
    continuous: bool
    kind: str
    blocks: int
    predictor: str = "reverse_diffusion"
    size: int = 32
    sigma_max: float = 50.0
    scales: int = 1000
    fir: bool = False
    width: int = 128
    mult: tuple[int, ...] = (1, 2, 2, 2)

    @property
    def rescaled(self) -> bool:
        return self.kind != "ddpm"

    @property
    def centered(self) -> bool:
        return self.sde != "ve"


WIDE, DEEP = (1, 1, 2, 2, 2, 2, 2), (1, 2, 4, 8, 16, 32, 32, 32)
EM, ANCESTRAL, REVERSE = "euler_maruyama", "ancestral_sampling", "reverse_diffusion"
# kinds: ddpm has convolutions between its levels, ddpm++ blocks that resize, ncsn++ the image beside the features
CONFIGS = {
    "vp/cifar10_ddpmpp": Training("vp", False, "ddpm++", 4, ANCESTRAL),
    "vp/cifar10_ddpmpp_continuous": Training("vp", True, "ddpm++", 4, EM),
    "vp/cifar10_ddpmpp_deep_continuous": Training("vp", True, "ddpm++", 8, EM),
    "vp/cifar10_ncsnpp": Training("vp", False, "ncsn++", 4, REVERSE, fir=True),
    "vp/cifar10_ncsnpp_continuous": Training("vp", True, "ncsn++", 4, EM, fir=True),
    "vp/cifar10_ncsnpp_deep_continuous": Training("vp", True, "ncsn++", 8, EM, fir=True),
    "vp/ddpm/bedroom": Training("vp", False, "ddpm", 2, ANCESTRAL, 256, mult=(1, 1, 2, 2, 4, 4)),
    "vp/ddpm/celebahq": Training("vp", False, "ddpm", 2, ANCESTRAL, 256, mult=(1, 1, 2, 2, 4, 4)),
    "vp/ddpm/church": Training("vp", False, "ddpm", 2, ANCESTRAL, 256, mult=(1, 1, 2, 2, 4, 4)),
    "vp/ddpm/cifar10": Training("vp", False, "ddpm", 2, ANCESTRAL),
    "vp/ddpm/cifar10_continuous": Training("vp", True, "ddpm", 2, EM),
    "subvp/cifar10_ddpm_continuous": Training("subvp", True, "ddpm", 2, EM),
    "subvp/cifar10_ddpmpp_continuous": Training("subvp", True, "ddpm++", 4, EM),
    "subvp/cifar10_ddpmpp_deep_continuous": Training("subvp", True, "ddpm++", 8, EM),
    "subvp/cifar10_ncsnpp_continuous": Training("subvp", True, "ncsn++", 4, EM, fir=True),
    "subvp/cifar10_ncsnpp_deep_continuous": Training("subvp", True, "ncsn++", 8, EM, fir=True),
    "ve/cifar10_ddpm": Training("ve", False, "ddpm", 2),
    "ve/cifar10_ncsnpp": Training("ve", False, "ncsn++", 4, fir=True),
    "ve/celeba_ncsnpp": Training("ve", False, "ncsn++", 4, REVERSE, 64, 90.0, fir=True),
    "ve/cifar10_ncsnpp_continuous": Training("ve", True, "ncsn++ fourier", 4, fir=True),
    "ve/cifar10_ncsnpp_deep_continuous": Training("ve", True, "ncsn++ fourier", 8, fir=True),
    **{
        f"ve/{name}_ncsnpp_continuous": Training(
            "ve", True, "ncsn++ skip fourier", 2, REVERSE, 256, sigma_max, 2000, fir=True, mult=WIDE
        )
        for name, sigma_max in {"bedroom": 378.0, "church": 380.0, "celebahq_256": 348.0, "ffhq_256": 348.0}.items()
    },
    **{
        f"ve/{name}_ncsnpp_continuous": Training(
            "ve", True, "ncsn++ skip fourier", 1, REVERSE, 1024, 1348.0, 2000, fir=True, width=16, mult=DEEP
        )
        for name in ("celebahq", "ffhq")
    },
}
