"""Flags of improved- and guided-diffusion's scripts: by name, or as a command line of their READMEs."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from epsrt.errors import InputError, one_of, typed

Flags = dict[str, Any]

# each repository's defaults for training on images, in its own order
IMPROVED: Flags = {
    "image_size": 64, "num_channels": 128, "num_res_blocks": 2, "num_heads": 4, "num_heads_upsample": -1,
    "attention_resolutions": "16,8", "dropout": 0.0, "learn_sigma": False, "sigma_small": False, "class_cond": False,
    "diffusion_steps": 1000, "noise_schedule": "linear", "timestep_respacing": "", "use_kl": False,
    "predict_xstart": False, "rescale_timesteps": True, "rescale_learned_sigmas": True, "use_checkpoint": False,
    "use_scale_shift_norm": True,
}  # fmt: skip
GUIDED: Flags = {
    "image_size": 64, "num_channels": 128, "num_res_blocks": 2, "num_heads": 4, "num_heads_upsample": -1,
    "num_head_channels": -1, "attention_resolutions": "16,8", "channel_mult": "", "dropout": 0.0, "class_cond": False,
    "use_checkpoint": False, "use_scale_shift_norm": True, "resblock_updown": False, "use_fp16": False,
    "use_new_attention_order": False, "learn_sigma": False, "diffusion_steps": 1000, "noise_schedule": "linear",
    "timestep_respacing": "", "use_kl": False, "predict_xstart": False, "rescale_timesteps": False,
    "rescale_learned_sigmas": False,
}  # fmt: skip
DEFAULTS = {"improved-diffusion": IMPROVED, "guided-diffusion": GUIDED}
# what the scripts write into the code, and flags of image_sample.py
MORE: Flags = {
    "num_classes": 1000, "in_channels": 3, "conv_resample": True, "channel_mult": "", "sigma_small": False,
    "use_ddim": False, "clip_denoised": True,
}  # fmt: skip
# of training and of how much is sampled: the network is the same with any. Taken, and recorded where given
IDLE: Flags = {
    "lr": 1e-4, "batch_size": 1, "microbatch": -1, "weight_decay": 0.0, "lr_anneal_steps": 0, "ema_rate": "0.9999",
    "schedule_sampler": "uniform", "fp16_scale_growth": 1e-3, "log_interval": 10, "save_interval": 10000,
    "num_samples": 10000, "use_fp16": False,
}  # fmt: skip
PATHS = ("model_path", "data_dir", "resume_checkpoint")  # of the machine of the training: taken, and not looked at
SUPER_RESOLUTION = ("large_size", "small_size", "base_samples")
CLASSIFIER_TRAINING = ("iterations", "anneal_lr", "noised", "eval_interval", "val_data_dir")
YES, NO = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")
EXAMPLE = "write flags as in --image_size 64 --class_cond True"
_ASSIGNED, _VARIABLE = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL), re.compile(r"\$\{?([A-Za-z_]\w*)\}?")


def flags_of(family: str, given: Flags) -> tuple[Flags, dict[str, str]]:
    """A family's defaults and what was given, each of its default's type; and what was given of PATHS and classifiers.

    given   flags by name, and `flags`, a command line; a flag that is in both has the value by name
    Raises InputError for a flag that is unknown or has no such value, and for a script of other networks.
    """
    given = dict(given)
    given = {**command_line(given.pop("flags", "")), **given}
    defaults = DEFAULTS[family]
    known, flags, aside = {**IDLE, **MORE, **defaults}, dict(defaults), {}
    for name, value in given.items():
        if name in SUPER_RESOLUTION:
            raise _upsampler(f"{name} is a flag")
        if name in CLASSIFIER_TRAINING:
            raise _classifier(f"{name} is a flag")
        unknown_here = family != "guided-diffusion" and name not in known
        if unknown_here and (name in GUIDED or name.startswith("classifier_")):
            raise InputError(
                f"{name} is a flag of guided-diffusion, not of {family}: leave it out, or say --from guided-diffusion"
            )
        if name in PATHS or name.startswith("classifier_"):
            aside[name] = str(value)
        elif name in known:
            flags[name] = _typed(name, value, known[name])
        else:
            raise InputError(
                f"{family} has no flag {name!r}: {one_of(name, [*known, *PATHS, 'flags', 'size', 'latents'])}"
            )
    return flags, aside


def command_line(text: Any) -> dict[str, str]:
    """The flags on a command line, name -> value: --name value, or --name=value.

    What stands before them goes, up to the script's name: mpiexec, python, variables of the environment. Lines may be
    continued with a backslash. NAME="--flags …" before the command is put in where it says $NAME; without a command,
    the flags of all such lines count.
    Raises InputError where words are none of these, for a variable without a value, and for a script of other networks.
    """
    variables: dict[str, list[str]] = {}
    words: list[str] = []
    for word in _split(re.sub(r"\\\r?\n", " ", typed("flags", text, ""))):
        assigned = _ASSIGNED.fullmatch(word)
        if assigned and not any(before.startswith("--") for before in words):
            variables[assigned[1]] = _split(assigned[2])
        elif word != "export":
            words.append(word)
    scripts = [place for place, word in enumerate(words) if word.endswith(".py")]
    if len(scripts) > 1:
        raise InputError(
            f"flags hold {len(scripts)} command lines, of {' and '.join(words[i] for i in scripts)}: give one"
        )
    if scripts:
        script = words[scripts[0]].split("/")[-1]
        if script.startswith("super_res_"):
            raise _upsampler(f"{script} is the script")
        if script == "classifier_train.py":
            raise _classifier(f"{script} is the script")
        words = words[scripts[0] + 1 :]
    if not words:
        words = [f"${name}" for name, value in variables.items() if value and value[0].startswith("--")]
    return _pairs(part for word in words for part in _value(word, variables))


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InputError(f"flags = {text!r} cannot be split into words ({error}): mend its quotes") from None


def _value(word: str, variables: Mapping[str, list[str]]) -> list[str]:
    """The words that stand for `word`, which may name a variable."""
    variable = _VARIABLE.fullmatch(word)
    return variables.get(variable[1], [word]) if variable else [word]


def _pairs(words: Iterable[str]) -> dict[str, str]:
    found, rest = {}, iter(words)
    for word in rest:
        name, equals, value = word.removeprefix("--").partition("=")
        if _VARIABLE.fullmatch(word):
            raise _of_the_shell(word)
        if not word.startswith("--"):
            raise InputError(f"flags go wrong at {word!r}, which is no flag: {EXAMPLE}")
        if not equals:
            value = next(rest, "--")
            if value.startswith("--"):
                raise InputError(f"flags go wrong at {word!r}, which has no value: {EXAMPLE}")
        if name not in PATHS and (variable := _VARIABLE.search(value)):
            raise _of_the_shell(variable[0])
        found[name] = value
    return found


def _of_the_shell(variable: str) -> InputError:
    line = f"{variable.strip('${}')}=…"
    return InputError(
        f"flags name {variable}, which only your shell knows: paste its value instead, or the line {line} before it"
    )


def _typed(name: str, value: Any, like: Any) -> Any:
    if isinstance(like, str):
        return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    if isinstance(like, bool):
        word = str(value).lower()
        if word not in (*YES, *NO):
            raise InputError(f"{name} = {value!r} is not true or false")
        return word in YES
    if isinstance(value, str):
        with contextlib.suppress(ValueError):  # typed says what is wrong
            value = float(value)
    return typed(name, value, like)


def _upsampler(what: str) -> InputError:
    return InputError(
        f"{what} of an upsampler (super-resolution), whose network takes a second image in each step, the small one; "
        "this family reads none: from Python, give it as a condition of pixels (export_network, conditions=)"
    )


def _classifier(what: str) -> InputError:
    return InputError(
        f"{what} of a classifier's training, which is no diffusion network: give the flags of image_train.py or "
        "image_sample.py"
    )
