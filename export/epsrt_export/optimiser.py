"""onnxscript's optimiser, to which a constant is what it is.

By its own rules x + c is x where c is within 1e-8 of 0, and so are x·c and x/c where c is within 1e-5 of 1. So
relu(x) / (relu(x) + 1e-15), which is 0 at 0, became 0/0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.pattern import Constant, RewriteRule
from onnxscript.rewriter.rules import common

ROUNDS = 2  # as onnxscript has it
ZERO, ONE = (Constant(value, rel_tol=0, abs_tol=0) for value in (0, 1))
SAME: tuple[Callable[[Any, Any], Any], ...] = (
    lambda op, x: x + ZERO, lambda op, x: ZERO + x, lambda op, x: x - ZERO,
    lambda op, x: x * ONE, lambda op, x: ONE * x, lambda op, x: x / ONE,
)  # fmt: skip
# what onnxscript rewrites by default, in its order, but for constants, int8 and dropout; and without its fusions of
# clamps, which give the bounds of two clamps of one tensor the same names
RULES = (
    *(RewriteRule(pattern, lambda op, x: op.Identity(x)) for pattern in SAME),
    common.two_reshapes_matmul_reshape_rule, common.one_reshape_matmul_reshape_rule,
    common.cast_constant_of_shape_rule, common.cast_constant_of_shape_without_value_rule,
    common.collapse_slice_rule, common.collapse_slice2_rule, common.materialize_reshape_shape_rule,
    common.successive_relu_rule, common.cast_cast_rule, common.no_op_cast_rule, common.no_op_expand_rule,
    common.flatten_to_reshape_rule, common.reshape_reshape_rule, common.slice_split_rule, common.no_op_transpose_rule,
    common.transpose_transpose_rule, common.unsqueeze_unsqueeze_rule, common.squeeze_reshape_1d_rule,
    common.no_op_dynamic_scatter_nd_rule, common.no_op_static_scatter_nd_rule,
    common.normalize_pad_format_conv_rule, common.fuse_pad_into_conv_rule,
    common.fuse_batchnorm_into_conv_rule, common.fuse_batchnorm_into_conv_transpose_rule,
    common.fuse_batchnorm_into_gemm_rule, common.remove_optional_bias_from_conv_rule,
    common.remove_optional_bias_from_conv_transpose_rule, common.remove_optional_bias_from_gemm_rule,
)  # fmt: skip


def optimise(model: ir.Model) -> None:
    """Fold constants and drop what does nothing, in place, as torch.onnx.export does by onnxscript's own rules."""
    passes.InlinePass()(model)
    for _ in range(ROUNDS):
        folded = optimizer.fold_constants(model, onnx_shape_inference=True)
        rewritten = ir.passes.Sequential(
            rewriter.RewritePass(RULES),
            passes.RemoveUnusedNodesPass(),
            passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
            passes.RemoveUnusedOpsetsPass(),
        )(model)
        if not (folded.modified or rewritten.modified):
            break
    ir.passes.Sequential(
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    )(model)
