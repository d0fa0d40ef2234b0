"""The codes of a vector-quantised autoencoder (VQ-VAE, arXiv 1711.00937)."""

from __future__ import annotations

from torch import Tensor


def nearest(z: Tensor, codes: Tensor) -> Tensor:
    """Each pixel of z [B, c, …] replaced by the nearest of codes [n, c], which is found in float32; of z's dtype."""
    flat, codes = z.movedim(1, -1).float(), codes.float()
    index = (codes.square().sum(1) - 2 * flat @ codes.T).argmin(-1)  # |z|² is the same for all
    return codes[index].movedim(-1, 1).to(z.dtype)
