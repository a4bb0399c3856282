"""The trained scorer as an ONNX graph: the same function as `marginroute.policy.Network`, for every other language.

    candidate (B, C, F) f32   features as `FeatureSpec` lists them, transformed and clipped, not normalised
    context   (B, G) f32      the same of the request and the fleet
    advice    (B, C) f32      logits of the advice
    legal     (B, C) bool
    logits    (B, C) f32      -inf where not legal
    choice    (B,) i64        the legal candidate with the largest logit

B and C are free, the normaliser is inside.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from marginroute import __version__
from marginroute.features import TIER_CONFIDENCE, FeatureSpec
from marginroute.policy import Network
from marginroute.view import Array

OPSET = 17
NORMALISER = ("candidate_mean", "candidate_std", "context_mean", "context_std")
IR_VERSION = 8  # as old as the opset allows, so that old runtimes read it


STEPS = (  # operator, inputs, output; w. are constants
    ("Sub", ("candidate", "w.candidate_mean"), "candidate_centred"),
    ("Div", ("candidate_centred", "w.candidate_std"), "x"),
    ("Sub", ("context", "w.context_mean"), "context_centred"),
    ("Div", ("context_centred", "w.context_std"), "y"),
    ("MatMul", ("x", "w.candidate"), "of_candidate"),
    ("MatMul", ("y", "w.context"), "of_context"),
    ("Add", ("of_context", "w.bias_1"), "shift"),
    ("Unsqueeze", ("shift", "w.axis_1"), "shift_of_all"),
    ("Add", ("of_candidate", "shift_of_all"), "sum_1"),
    ("Relu", ("sum_1",), "hidden_1"),
    ("MatMul", ("hidden_1", "w.hidden"), "of_hidden"),
    ("Add", ("of_hidden", "w.bias_2"), "sum_2"),
    ("Relu", ("sum_2",), "hidden_2"),
    ("MatMul", ("hidden_2", "w.head"), "of_head"),
    ("Squeeze", ("of_head", "w.axis_2"), "full_correction"),
    ("Gather", ("candidate", "w.told"), "column"),
    ("Squeeze", ("column", "w.axis_2"), "confidence"),
    ("Mul", ("confidence", "w.trust_told"), "trust_told"),
    ("Add", ("trust_told", "w.trust_always"), "trust"),
    ("Mul", ("full_correction", "trust"), "correction"),
    ("Mul", ("advice", "w.kappa"), "weighted"),
    ("Add", ("weighted", "correction"), "score"),
    ("Where", ("legal", "score", "w.never"), "logits"),
    ("ArgMax", ("logits",), "choice"),
)


def to_onnx(network: Network, spec: FeatureSpec) -> bytes:
    """The graph of a network, as a file's bytes."""
    normaliser = {name: getattr(spec, name) for name in NORMALISER}
    figures = network.arrays() | normaliser | {"head": network.head[:, None], "never": np.array(-np.inf)}
    figures |= dict(zip(("trust_always", "trust_told"), figures.pop("trust"), strict=True))
    constants = [_constant(name, array.astype(np.float32)) for name, array in figures.items()]
    constants += [_constant(f"axis_{axis}", np.array([axis])) for axis in (1, 2)]
    constants.append(_constant("told", np.array([TIER_CONFIDENCE])))
    more: dict[str, dict[str, Any]] = {"ArgMax": {"axis": 1, "keepdims": 0}, "Gather": {"axis": 2}}
    nodes = [helper.make_node(kind, inputs, [output], **more.get(kind, {})) for kind, inputs, output in STEPS]
    inputs = [
        _value("candidate", TensorProto.FLOAT, "B", "C", spec.n_candidate),
        _value("context", TensorProto.FLOAT, "B", spec.n_context),
        _value("advice", TensorProto.FLOAT, "B", "C"),
        _value("legal", TensorProto.BOOL, "B", "C"),
    ]
    outputs = [_value("logits", TensorProto.FLOAT, "B", "C"), _value("choice", TensorProto.INT64, "B")]
    graph = helper.make_graph(nodes, "marginroute", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, producer_name="marginroute", producer_version=__version__, opset_imports=opsets)
    model.ir_version = IR_VERSION
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))


def _value(name: str, kind: int, *shape: str | int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _constant(name: str, array: Array) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(array), f"w.{name}")
