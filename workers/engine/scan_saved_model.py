"""A SavedModel's graphs, read as data before TensorFlow may run any of them.

Operators that reach files, the network, other processes or Python are refused by name, in the main
graph and in every function. Those that save and restore variables every SavedModel has: they are
refused where the graph itself, not who loads it, says which file. What hides better than that is
stopped by the sandbox.
"""

import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

from workers.engine.scan import unsafe

# Of the 1,910 operators of TensorFlow 2.21. Those of queues, sessions of other processes and
# processors that are not here have no place in a model to convert.
_BANNED = re.compile(
    r"^(?:ReadFile|WriteFile|MatchingFiles\w*|\w*PyFunc\w*|\w*Reader(?:V2)?|Reader\w+|\w*Dataset\w*|"
    r"\w*Summary\w*Writer\w*|Write\w*Summary|ImportEvent|InitializeTableFromTextFile\w*|"
    r"ImmutableConst|DecodeProto\w*|EncodeProto\w*|RecordInput|\w*Rpc\w*|Debug\w+|DumpTensor|"
    r"FileSystem\w*|LMDB\w*|Dynamic\w*Copy|Collective\w*|Nccl\w*|XlaCustomCall\w*|XlaHostCompute\w*|"
    r"Xla(?:Send|Recv)\w*|RemoteCall|_?(?:Host)?(?:Send|Recv)|WorkerHeartbeat|"
    r"\w*(?:GetSession|DeleteSession)\w*|LoadAndRemapMatrix|CalibrationStatisticsSaver|"
    r"DistributedSave|DTensor\w*|FixedUnigramCandidateSampler|Sleep\w*Op|"
    r"(?:Configure|Shutdown|_Configure|_Shutdown)\w*TPU\w*)$"
)
# Operator -> which of its inputs are paths.
_CHECKPOINTS = {
    "Save": (0,), "SaveSlices": (0,), "SaveV2": (0,), "Restore": (0,), "RestoreSlice": (0,),
    "RestoreV2": (0,), "MergeV2Checkpoints": (0, 1),
}  # fmt: skip


def scan(saved_model: Any) -> None:
    """Check a parsed `SavedModel` message. Raises WorkError `unsafe_model`."""
    for meta_graph in saved_model.meta_graphs:
        graph = meta_graph.graph_def
        _scan_body("the main graph", graph.node)
        for function in graph.library.function:
            _scan_body(f"function {function.signature.name}", function.node_def)
        for asset in meta_graph.asset_file_def:
            path = PurePosixPath(asset.filename)
            if path.is_absolute() or ".." in path.parts:
                raise unsafe(f"the model has an asset outside its folder, '{asset.filename[:100]}'")


def _scan_body(where: str, nodes: Iterable[Any]) -> None:
    by_name = {node.name: node for node in nodes}
    for node in by_name.values():
        printed = node.op == "PrintV2" and b"file:" in node.attr["output_stream"].s
        if _BANNED.match(node.op) or printed:
            raise unsafe(
                f"the graph holds a {node.op} operator ('{node.name}' in {where}), which"
                " reaches files, the network or Python"
            )
        operands = [name for name in node.input if not name.startswith("^")]
        for place in _CHECKPOINTS.get(node.op, ()):
            if place < len(operands) and _names_a_file(operands[place], by_name):
                raise unsafe(
                    f"the graph holds a {node.op} operator ('{node.name}' in {where}) with a path"
                    " of its own"
                )


def _names_a_file(operand: str, by_name: dict[str, Any]) -> bool:
    """Whether a path is made of the graph's constants alone, and leads out of the folder that it
    is run in. What a function is given, or a placeholder, stands for the loader's path."""
    seen: set[str] = set()
    pending, named = [operand], False
    while pending:
        name = pending.pop().split(":", 1)[0]
        node = by_name.get(name)
        if node is None or node.op.startswith("Placeholder"):
            return False
        if name in seen:
            continue
        seen.add(name)
        if node.op == "Const":
            values = node.attr["value"].tensor.string_val
            named = named or any(b"/" in value or b":" in value for value in values)
        pending += [source for source in node.input if not source.startswith("^")]
    return named
