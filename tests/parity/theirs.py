"""Whole trajectories of diffusers' schedulers."""

import sys

import numpy as np
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
)

ALL = (
    DDIMInverseScheduler, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler, HeunDiscreteScheduler,
)  # fmt: skip
PREDICTION = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction", "velocity": "flow_prediction"}
TIGHT = 1e-11  # what may be left between us where the constants of diffusers are float64 too


def ready(kind, steps=None, prediction="epsilon", **options):
    """A scheduler with its timesteps set: so many, or those listed."""
    made = kind(prediction_type=PREDICTION[prediction], **options)
    made.set_timesteps(**({"num_inference_steps": steps} if isinstance(steps, int) else {"timesteps": steps}))
    return made


def trajectory(made, network, x, z, monkeypatch, told=None, **options):
    """x after all its steps, z[i] being the i-th's noise. `told`: the network's timesteps, where not its own.

    x travels as [images, 12, 1]: their thresholding needs a dimension behind the channels.
    """
    x, module = x[..., None], sys.modules[made.__module__]
    for i, t in enumerate(made.timesteps):
        monkeypatch.setattr(module, "randn_tensor", lambda *a, i=i, **k: z[i][..., None], raising=False)
        scaled = made.scale_model_input(x, t) if hasattr(made, "scale_model_input") else x
        out = network(scaled[..., 0], t if told is None else told[i])[..., None]
        x = made.step(out, t, x, **options).prev_sample
    return x[..., 0]


class Wide:
    """torch or numpy, whose float32 is float64."""

    def __init__(self, module):
        self.module = module

    def __getattr__(self, name):
        return getattr(self.module, "float64" if name == "float32" else name)


def widen(monkeypatch):
    """Every float32 in diffusers' schedulers is a float64, until the test ends."""
    for module in (sys.modules[kind.__module__] for kind in ALL):
        for short, library in (("torch", torch), ("np", np)):
            if hasattr(module, short):
                monkeypatch.setattr(module, short, Wide(library))
