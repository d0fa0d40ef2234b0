"""State dicts as trainings leave them: where they lie in a file, under which names, averaged or plain."""

import argparse

import numpy as np
import pytest
import torch
from ema_pytorch import EMA
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from epsrt import BundleError, InputError
from epsrt_export.families import tensorfile
from epsrt_export.families.places import dicts_of
from epsrt_export.families.statedict import load_into, weights

ANCHOR = "first.weight"


class Net(nn.Module):
    def __init__(self, value=0.0):
        super().__init__()
        self.first, self.last = nn.Linear(2, 3), nn.Linear(3, 2)
        self.register_buffer("table", torch.arange(4.0))
        self.frozen = nn.Parameter(torch.full((2,), 7.0), requires_grad=False)
        for p in (*self.first.parameters(), *self.last.parameters()):
            nn.init.constant_(p, value)


PLAIN, AVERAGED = Net(1.0), Net(2.0)
STATE, AVERAGES = PLAIN.state_dict(), AVERAGED.state_dict()


def under(prefix, state=STATE):
    return {prefix + name: value for name, value in state.items()}


def value(found):
    net = Net()
    load_into(net, found, "x.pt")
    assert not net.training
    assert torch.equal(net.table, torch.arange(4.0))
    assert torch.equal(net.frozen, torch.full((2,), 7.0))
    (only,) = {float(v) for p in (*net.first.parameters(), *net.last.parameters()) for v in p.flatten()}
    return only


@pytest.fixture
def file(tmp_path):
    def save(content, name="x.pt"):
        (save_file if name.endswith("safetensors") else torch.save)(content, tmp_path / name)
        return tmp_path / name

    return save


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict", "net", "params"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model."])
def test_prefixes_and_wrappers(file, prefix, wrapper):
    state = under(prefix)
    found = weights(file(state if wrapper is None else {"epoch": 3, wrapper: state}), ANCHOR)
    assert list(found.tensors) == list(STATE)
    assert value(found) == 1
    assert found.rest == ({} if wrapper is None else {"epoch": 3})
    said = " ".join(found.notes)
    assert (wrapper is not None and f"was found in ['{wrapper}']" in said) or wrapper is None
    for part in filter(None, ("_orig_mod." * ("_orig_mod." in prefix), prefix.replace("_orig_mod.", ""))):
        assert f"{part!r} was taken off the names" in said
    assert bool(found.notes) == bool(prefix or wrapper)


def test_a_module_compiled_in_the_middle_and_safetensors(file):
    state = {name.replace("first.", "first._orig_mod."): tensor for name, tensor in under("module.").items()}
    assert value(weights(file(state), ANCHOR)) == 1
    assert value(weights(file(under("module."), "x.safetensors"), ANCHOR)) == 1


def test_half_precision_becomes_float32(file):
    assert value(weights(file({n: t.half() for n, t in STATE.items()}), ANCHOR)) == 1


def ema_pytorch():
    ema = EMA(PLAIN, update_after_step=0)
    ema.ema_model.load_state_dict(AVERAGES)
    return ema.state_dict()


def swa():
    average = AveragedModel(PLAIN)
    average.module.load_state_dict(AVERAGES)
    return average.state_dict()


def litema():
    """As CompVis' LitEma names averages of the attribute `model`."""
    averages = under("model_ema.", {f"unet.{name}".replace(".", ""): tensor for name, tensor in AVERAGES.items()})
    return {name: tensor for name, tensor in averages.items() if "table" not in name and "frozen" not in name}


SHADOW = [p.detach() for p in AVERAGED.parameters() if p.requires_grad]
BOTH = {
    "a trainer of ema_pytorch": lambda: {"step": 5, "model": STATE, "ema": ema_pytorch()},
    "its EMA alone": ema_pytorch,
    "torchcfm": lambda: {"net_model": STATE, "ema_model": AVERAGES, "step": 5},
    "DiT": lambda: {"model": STATE, "ema": AVERAGES, "args": argparse.Namespace(model="DiT-S/2"), "opt": {"state": {}}},
    "timm": lambda: {"state_dict": under("module."), "state_dict_ema": under("module.", AVERAGES)},
    "Lightning": lambda: {
        "pytorch-lightning_version": "2.4", "state_dict": {**under("net."), **under("net_ema.", AVERAGES)},
    },
    "WeightAveraging": lambda: {"state_dict": under("net.", AVERAGES), "current_model_state": under("net.")},
    "AveragedModel in Lightning": lambda: {"state_dict": {**under("net."), **under("avg_model.", swa())}},
    "LitEma": lambda: {"state_dict": {**under("model.unet."), **litema()}},
    "LitEma, deeper": lambda: {"state_dict": under("ldm.", {**under("model.unet."), **litema()})},
    "EMAState": lambda: {"state_dict": STATE, "EMAState": AVERAGES},
    "non_ema": lambda: {"model_non_ema": STATE, "model": {"ema": AVERAGES}},
    "score_sde": lambda: {"model": under("module."), "ema": {"decay": 0.9, "num_updates": 3, "shadow_params": SHADOW}},
}  # fmt: skip


@pytest.mark.parametrize("kind", BOTH)
def test_averaged_and_plain_weights(file, kind):
    path = file(BOTH[kind]())
    for ema, wanted, said in ((None, 2, "the averaged"), (True, 2, "--no-ema takes the others"), (False, 1, "--ema")):
        found = weights(path, ANCHOR, ema)
        assert value(found) == wanted
        assert said in " ".join(found.notes)


def test_one_kind_of_weights_alone(file):
    assert value(weights(file(swa(), "swa.pt"), ANCHOR)) == 2
    for content, ema, message in (
        (STATE, True, "ema = true, but .* holds the plain weights alone: leave ema out"),
        ({"ema": AVERAGES}, False, "ema = false, but .* holds the averaged weights alone: leave ema out"),
    ):
        path = file(content)
        with pytest.raises(InputError, match=message):
            weights(path, ANCHOR, ema)
        weights(path, ANCHOR)  # as it says
    assert "its weights are averaged" in weights(file({"ema": AVERAGES}), ANCHOR).notes[0]


def test_averages_without_names(file):
    lost = {"decay": 0.9, "shadow_params": SHADOW}
    with pytest.raises(BundleError, match=r"averages without names \(shadow_params\).*ema.copy_to\(model.parameters"):
        weights(file(lost), ANCHOR)
    path = file({"model": STATE, "ema": {"shadow_params": SHADOW[:-1]}})
    with pytest.raises(BundleError, match="are 3 tensors without names, .* 4 parameters: take the plain weights"):
        value(weights(path, ANCHOR))
    assert value(weights(path, ANCHOR, ema=False)) == 1


def test_what_stands_beside(file):
    state = {
        **under("module.diffusion.model."),
        "module.diffusion.betas": torch.ones(3),
        "module.loss.a": torch.ones(1),
    }
    found = weights(file({"state_dict": state, "hyper_parameters": {"dim": 3}, "best": np.float64(2.5)}), ANCHOR)
    assert list(found.beside) == ["betas", "loss.a"]
    assert found.rest == {"hyper_parameters": {"dim": 3}, "best": 2.5}
    assert value(found) == 1


def test_what_stands_beside_averages_of_litema(file):
    path = file({**under("model.unet."), **litema(), "betas": torch.ones(3), "model_ema.decay": torch.ones(())})
    for ema, more in ((True, set(under("model.unet."))), (False, set(litema()) | {"model_ema.decay"})):
        assert set(weights(path, ANCHOR, ema).beside) == {"betas"} | more


def test_several_networks_and_none(file):
    for content, names in (
        ({"a": STATE, "b": STATE}, "a and b"),
        (
            {"state_dict": {**under("teacher."), **under("student.net.")}},
            "state_dict.teacher and state_dict.student.net",
        ),
    ):
        with pytest.raises(InputError, match=f"holds 2 networks of this kind, {names}: save the state dict of the one"):
            weights(file(content), ANCHOR)
    with pytest.raises(BundleError, match="holds _orig_mod.first.weight and first.weight, one tensor of the network"):
        weights(file({**STATE, "_orig_mod.first.weight": STATE["first.weight"]}), ANCHOR)
    path = file({"other.weight": torch.zeros(2)})
    with pytest.raises(BundleError, match=r"which has a tensor first.weight; its first is other.weight: epsrt inspect"):
        weights(path, ANCHOR)
    with pytest.raises(BundleError, match="no network of this family"):
        weights(file(STATE), (ANCHOR, "label_emb.weight"))
    latent = {**under("model.diffusion_model."), "first_stage_model.x": torch.zeros(1)}
    for prefix in ("", "ldm."):
        path = file({"state_dict": {prefix + name: tensor for name, tensor in latent.items()}})
        with pytest.raises(InputError, match="is a checkpoint of latent diffusion: say --from latent-diffusion"):
            weights(path, ANCHOR)
        assert list(weights(path, ANCHOR, latent=True).beside) == ["first_stage_model.x"]


def test_lightnings_dict_is_plain_data(tmp_path, monkeypatch):
    import sys
    from types import ModuleType

    module = ModuleType("pytorch_lightning.utilities.parsing")
    kind = type("AttributeDict", (dict,), {"__module__": module.__name__})
    module.AttributeDict = kind
    for name in ("pytorch_lightning", "pytorch_lightning.utilities", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    torch.save({"state_dict": STATE, "hyper_parameters": kind(dim=3)}, tmp_path / "x.ckpt")
    monkeypatch.undo()
    found = weights(tmp_path / "x.ckpt", ANCHOR)
    assert (value(found), dict(found.rest["hyper_parameters"])) == (1, {"dim": 3})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, not a dict of tensors"),
        ({}, "holds a dict, not a dict of tensors"),
        ({"step": 3, "model": {}}, "holds no tensors under names"),
        ({ANCHOR: torch.zeros(1), "x": [torch.zeros(1)]}, "its entry 'x' is a list, not a tensor"),
        ({ANCHOR: torch.zeros(1, device="meta")}, "its entry 'first.weight' is without values, on the meta device"),
        ({ANCHOR: torch.zeros(1), "x": torch.eye(2).to_sparse()}, "its entry 'x' is torch.sparse_coo, not a tensor"),
        (nn.Linear(2, 2), "holds torch.nn.modules.linear.Linear, which loading would run"),
    ],
)
def test_other_contents(file, content, message):
    with pytest.raises(BundleError) as error:
        weights(file(content), ANCHOR)
    assert message in str(error.value)
    assert "torch.save(model.state_dict(), path)" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("last.bias"), "it lacks the tensor last.bias, 1 of 6 in all: epsrt inspect x.pt says"),
        (lambda s: s.update(more=torch.zeros(1)), "it has a tensor more, 1 of 7 in all, that the network lacks"),
        (lambda s: s.update(table=torch.zeros(5)), r"table has shape \[5\], the network \[4\]"),
        (lambda s: s.update(table=torch.zeros(4, dtype=torch.int32)), "table holds torch.int32, the network"),
    ],
)
def test_what_does_not_fit(change, message):
    state = dict(STATE)
    change(state)
    with pytest.raises(BundleError, match=message):
        load_into(Net(), state, "x.pt")
    with pytest.raises(BundleError, match=": is dim right"):
        load_into(Net(), {}, "x.pt", lambda file, network: "is dim right?")


def test_plain_values_among_the_tensors_and_circles(file):
    assert value(weights(file({**STATE, "epoch": 3, "best": {"loss": 1.0}}), ANCHOR)) == 1
    round_and_round = {"x": 1}
    round_and_round["self"] = round_and_round
    assert value(weights(file({"model": STATE, "more": round_and_round}), ANCHOR)) == 1
    with pytest.raises(BundleError, match="its first is none"):
        weights(file({0: torch.zeros(1)}), ANCHOR)


@pytest.mark.parametrize("name", ["x.SAFETENSORS", "x.pt", "x"])
def test_a_file_is_what_its_bytes_say(tmp_path, name):
    save_file(STATE, tmp_path / name)
    assert value(weights(tmp_path / name, ANCHOR)) == 1
    torch.save(STATE, tmp_path / "y.safetensors")
    assert value(weights(tmp_path / "y.safetensors", ANCHOR)) == 1


def test_files_are_mapped_and_dicts_found_outermost_first(file):
    found = list(dicts_of({"a": {"b": {"w": torch.zeros(1)}}, "c": {"w": torch.zeros(1)}}, "x"))
    assert [keys for keys, _ in found] == [("c",), ("a", "b")]
    with pytest.raises(BundleError, match="is a directory: give the file of weights"):
        tensorfile.load(file(STATE).parent)
