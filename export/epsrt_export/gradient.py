"""The gradient of a classifier's log-probability as a module that torch.export takes: classifier guidance's addend.

Exporting autograd itself fails. Its work is traced here once, to plain forward operators, for a batch that stays free.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.attention import SDPBackend, sdpa_kernel

from epsrt.errors import InputError, one_line
from epsrt.types import Shape
from epsrt_export.backward import table

aten = torch.ops.aten
LIMIT = 1e-4  # relative L2 of a traced gradient against autograd's


def log_prob_gradient(classifier: nn.Module, shape: Shape, classes: int) -> nn.Module:
    """A module whose forward returns ∇_x log p(target | x, t) of softmax(classifier(x, t)) (arXiv 2105.05233, sec. 4).

    classifier  forward(x [B, C, …] float32, t [B] float32) -> logits [B, classes] float32
    shape       C, then the extents
    The module's forward takes x, t as the classifier's does and target [B] int64, and returns [B, C, …] float32. A
    target outside 0 … classes − 1 gives zeros: that row is not guided. It holds the classifier's own parameters under
    their names, or an eval copy's where the classifier is in train mode.
    Raises InputError for a classifier that does not return such logits, whose gradient is not finite, or whose gradient
    cannot be traced, the operator named.
    """
    if any(module.training for module in classifier.modules()):  # dropout, and statistics of the batch
        classifier = copy.deepcopy(classifier).eval()
    check_classifier(classifier, shape, classes)
    made = _traced(classifier, shape)
    _compare(made, classifier, shape, classes)
    return made


def check_classifier(classifier: nn.Module, shape: Shape, classes: int) -> None:
    """Run the classifier twice on two images.

    Raises InputError unless it returns one tensor of finite float32 logits [2, classes], the same each time.
    """
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    name = type(classifier).__name__
    try:
        with torch.inference_mode():
            out, again = classifier(x.clone(), torch.zeros(2)), classifier(x.clone(), torch.zeros(2))
    except Exception as error:  # somebody else's code
        reason = one_line(error)
        raise InputError(f"{name} cannot run forward(x, t) on x {[2, *shape]}, t [2] float32: {reason}") from error
    if not isinstance(out, Tensor):
        raise InputError(f"{name} returns a {type(out).__name__}, not one tensor: wrap it so that it returns logits")
    if tuple(out.shape) != (2, classes):
        raise InputError(f"{name} returns {list(out.shape)} for 2 images of {classes} classes: return {[2, classes]}")
    if out.dtype != torch.float32:
        raise InputError(f"{name} returns {out.dtype}: give it in float32, whose gradient small numbers survive")
    if not out.isfinite().all():
        raise InputError(f"{name} returns logits that are not finite for images of N(0, I) at t = 0: check its weights")
    if not torch.allclose(out, again, rtol=1e-3, atol=1e-3):
        raise InputError(f"{name} returns other logits each time: switch its dropout or noise off")
    if (out >= 0).all() and torch.allclose(out.sum(1), torch.ones(2), atol=1e-4):
        raise InputError(f"{name} returns probabilities: leave its softmax out, for log p is taken of logits")


def _gradient(logits_of: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, target: Tensor) -> Tensor:
    """∇_x log softmax(logits)[target], by autograd; 0 where there is no such class."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        logits = logits_of(x, t)
    p = logits.detach().softmax(1)
    mine = (target[:, None] == torch.arange(p.shape[1])).to(p.dtype)
    others = p * (1 - mine)
    # 1_y − p: its own entry as the sum of the others, for 1 − p_y of a sure classifier is a rounding error
    slope = mine * others.sum(1, keepdim=True) - others * mine.sum(1, keepdim=True)
    return torch.autograd.grad(logits, x, slope)[0]


def _traced(classifier: nn.Module, shape: Shape) -> fx.GraphModule:
    """_gradient of the classifier as forward operators on its own parameters and buffers."""
    name = type(classifier).__name__
    held = {**dict(classifier.named_parameters()), **dict(classifier.named_buffers())}
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)  # it may hold tensors that are no buffers

    def free(tensor: Tensor) -> Tensor:  # in its batch alone; DUCK: equal examples are one symbol
        sizes = [DimDynamic.DUCK, *[DimDynamic.STATIC] * (tensor.ndim - 1)]
        return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    n = 3  # neither 0 nor 1, which are taken for constants
    inputs = [free(v) for v in (torch.zeros(n, *shape), torch.zeros(n), torch.zeros(n, dtype=torch.int64))]
    values = [mode.from_tensor(tensor.detach(), static_shapes=True) for tensor in held.values()]

    def run(*flat: Tensor) -> Tensor:
        given = dict(zip(held, flat, strict=False))
        return _gradient(lambda x, t: functional_call(classifier, given, (x, t)), *flat[-3:])

    try:
        with mode, enable_python_dispatcher(), sdpa_kernel(SDPBackend.MATH):  # of its parts, which have gradients
            traced = make_fx(run, decomposition_table=table())(*values, *inputs)
    except Exception as error:  # torch raises many kinds
        raise InputError(f"the gradient of {name} cannot be traced: {_reason(error)}") from error
    placeholders = traced.graph.find_nodes(op="placeholder")
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    new |= {node: graph.placeholder(key) for key, node in zip(("x", "t", "target"), placeholders[-3:], strict=True)}
    new |= {node: graph.get_attr(key) for key, node in zip(held, placeholders[:-3], strict=True)}
    for node in traced.graph.nodes:
        if node.op != "placeholder":
            new[node] = _shorter(node, new) or graph.node_copy(node, new.__getitem__)
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.op == "call_function" and "backward" in str(node.target):
            raise InputError(f"the gradient of {name} cannot be exported: it needs {node.target}, which ONNX has not")
    constants = {key: value for key, value in vars(traced).items() if isinstance(value, Tensor)}
    return fx.GraphModule({**constants, **dict(traced.named_buffers()), **held}, graph, "LogProbGradient")


def _shorter(node: fx.Node, new: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """What stands for `node` in the new graph, where that is less than its copy.

    A product with a transposed weight becomes a linear layer again: the graph would store that weight transposed, and
    for the gradient once more as it is.
    """
    args: Any = node.args
    if node.target is aten.detach.default:
        return new[args[0]]
    if _transposes(node) and _transposes(args[0]):
        return new[args[0].args[0]]
    if node.target is aten.addmm.default and _transposes(args[2]) and not node.kwargs:
        bias, x, weight = new[args[0]], new[args[1]], new[args[2].args[0]]
    elif node.target is aten.mm.default and _transposes(args[1]) and not _transposes(args[1].args[0]):
        bias, x, weight = None, new[args[0]], new[args[1].args[0]]
    else:
        return None
    return x.graph.call_function(aten.linear.default, (x, weight, bias))


def _transposes(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.target is aten.t.default


def _compare(made: fx.GraphModule, classifier: nn.Module, shape: Shape, classes: int) -> None:
    """Refuse a trace that holds for its example alone, as a Python `if` on the batch or on values makes it."""
    name, generator = type(classifier).__name__, torch.Generator().manual_seed(1)
    for n in (1, 2, 5):
        x, t = torch.randn(n, *shape, generator=generator), torch.arange(n) % 2.0
        target = torch.arange(n) % classes
        truth = _gradient(classifier, x, t, target)
        if not truth.isfinite().all():
            raise InputError(f"the gradient of {name} is not finite for images of N(0, I): check its weights")
        try:
            with torch.no_grad():
                found = fx.Interpreter(made).run(x, t, target)
                error = (found - truth).flatten(1).norm(dim=1)
        except Exception as problem:
            raise InputError(
                f"the gradient of {name} was traced for one batch alone, and fails at {n}: let it take any, without "
                f"Python ints of x.shape[0] ({_reason(problem)})"
            ) from problem
        if not (error <= LIMIT * truth.flatten(1).norm(dim=1)).all():
            raise InputError(
                f"the gradient of {name} as traced differs from autograd's at batch {n}: let it have no Python `if` on "
                "values or on the batch"
            )


def _reason(error: BaseException) -> str:
    """The first line of torch's long stories, of the root cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
