"""A recording stand-in for `cuda.bindings.driver`, which can run on the host what was recorded."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from speckv.kernels import set_conditions

SUCCESS, INVALID_VALUE = 0, 1
CONTEXT = 77
UNKNOWN = 12_345


@dataclass
class Recorded:
    """A node.

    Attributes
    ----------
    kind : str
        ``GRAPH``, ``KERNEL``, ``WHILE``, ``IF`` or ``SWITCH``.
    after : list of Recorded
    detail : object
        The child graph, the kernel's (words, values), or the conditional's (handle, bodies).
    """

    kind: str
    after: list[Recorded]
    detail: Any


@dataclass(eq=False)
class Graph:
    nodes: list[Recorded] = field(default_factory=list)
    inside: bool = False


class Api:
    """The part of the driver's API that `speckv.decoding.conditional` calls.

    Parameters
    ----------
    children : mapping of int to callable
        What the captured graphs do, by address.
    fails : str
        A function that returns an error.
    """

    CU_GRAPH_COND_ASSIGN_DEFAULT = 1
    CUgraphNodeType = SimpleNamespace(CU_GRAPH_NODE_TYPE_CONDITIONAL="conditional")
    CUgraphConditionalNodeType = SimpleNamespace(
        CU_GRAPH_COND_TYPE_IF="IF",
        CU_GRAPH_COND_TYPE_WHILE="WHILE",
        CU_GRAPH_COND_TYPE_SWITCH="SWITCH",
    )
    CUgraph = int
    CUstream = int
    CUDA_KERNEL_NODE_PARAMS = SimpleNamespace

    def __init__(self, children: dict[int, Callable[[], None]], fails: str = "") -> None:
        self._children, self._fails = children, fails
        self.graphs: list[Graph] = []
        self.handles: dict[int, Graph] = {}
        self.used: set[int] = set()
        self.values: dict[int, int] = {}
        self.launches: list[int] = []
        self.images: list[bytes] = []
        self.uploads: list[int] = []
        self.executables: list[Graph] = []
        self.ran: list[int] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cu") and name == object.__getattribute__(self, "_fails"):
            return lambda *arguments: (INVALID_VALUE,)
        return object.__getattribute__(self, name)

    @staticmethod
    def CUgraphNodeParams() -> SimpleNamespace:
        return SimpleNamespace(type=None, conditional=SimpleNamespace(phGraph_out=None))

    def cuDriverGetVersion(self) -> tuple[int, int]:
        return SUCCESS, 13_000

    def cuCtxGetCurrent(self) -> tuple[int, int]:
        return SUCCESS, CONTEXT

    def cuGraphCreate(self, flags: int) -> tuple[int, Graph]:
        self.graphs.append(Graph())
        return SUCCESS, self.graphs[-1]

    def cuGraphConditionalHandleCreate(
        self, graph: Graph, context: int, default: int, flags: int
    ) -> tuple[int, int]:
        assert graph in self.graphs and (context, default, flags) == (CONTEXT, 0, 1)
        handle = 1000 + len(self.handles)
        self.handles[handle] = graph
        return SUCCESS, handle

    def cuGraphAddChildGraphNode(
        self, graph: Graph, after: list[Recorded], count: int, child: int
    ) -> tuple[int, Recorded]:
        assert child in self._children
        return self._add(graph, "GRAPH", after, count, child)

    def cuGraphAddKernelNode(
        self, graph: Graph, after: list[Recorded], count: int, parameters: SimpleNamespace
    ) -> tuple[int, Recorded]:
        assert parameters.func == set_conditions.NAME
        sizes = {getattr(parameters, s + a) for s in ("gridDim", "blockDim") for a in "XYZ"}
        assert sizes == {1}
        arguments, types = parameters.kernelParams
        expected = [ctypes.c_uint64] + [ctypes.c_uint64, ctypes.c_uint32] * 4
        assert list(types) == expected and len(arguments) == len(types)
        pairs = zip(arguments[1::2], arguments[2::2], strict=True)
        values = [(handle, word) for handle, word in pairs if word != set_conditions.NO_WORD]
        assert {handle for handle, _ in values} <= set(self.handles)
        return self._add(graph, "KERNEL", after, count, (arguments[0], values))

    def cuGraphAddNode(
        self,
        graph: Graph,
        after: list[Recorded],
        edges: None,
        count: int,
        parameters: SimpleNamespace,
    ) -> tuple[int, Recorded]:
        assert parameters.type == "conditional" and parameters.conditional.ctx == CONTEXT
        wanted = parameters.conditional
        assert wanted.handle in self.handles and wanted.handle not in self.used
        assert wanted.size == 1 or wanted.type == "SWITCH"
        self.used.add(wanted.handle)
        bodies = [Graph(inside=True) for _ in range(wanted.size)]
        wanted.phGraph_out = bodies
        return self._add(graph, wanted.type, after, count, (wanted.handle, bodies))

    def cuGraphInstantiate(self, graph: Graph, flags: int) -> tuple[int, Graph]:
        assert not graph.inside and flags == 0
        assert graph not in self.executables, "one at a time"
        _assert_filled(graph)
        self.executables.append(graph)
        return SUCCESS, graph

    def cuGraphUpload(self, executable: Graph, stream: int) -> tuple[int]:
        assert executable in self.executables
        self.uploads.append(stream)
        return (SUCCESS,)

    def cuGraphLaunch(self, executable: Graph, stream: int) -> tuple[int]:
        assert executable in self.executables
        self.launches.append(stream)
        self.values = dict.fromkeys(self.handles, 0)
        self._run(executable)
        return (SUCCESS,)

    def cuGraphExecDestroy(self, executable: Graph) -> tuple[int]:
        self.executables.remove(executable)
        return (SUCCESS,)

    def cuGraphDestroy(self, graph: Graph) -> tuple[int]:
        self.graphs.remove(graph)
        return (SUCCESS,)

    def cuModuleLoadData(self, image: bytes) -> tuple[int, str]:
        self.images.append(image)
        return SUCCESS, "module"

    def cuModuleGetFunction(self, module: str, name: bytes) -> tuple[int, str]:
        assert module == "module"
        return SUCCESS, name.decode()

    def _add(
        self, graph: Graph, kind: str, after: list[Recorded], count: int, detail: Any
    ) -> tuple[int, Recorded]:
        assert count == len(after) and all(any(n is a for n in graph.nodes) for a in after)
        graph.nodes.append(Recorded(kind, list(after), detail))
        return SUCCESS, graph.nodes[-1]

    def _run(self, graph: Graph) -> None:
        """Nodes in the order of their edges, which must be a chain."""
        for before, node in zip([None, *graph.nodes], graph.nodes, strict=False):
            assert node.after == ([] if before is None else [before])
            if node.kind == "GRAPH":
                self.ran.append(node.detail)
                self._children[node.detail]()
            elif node.kind == "KERNEL":
                words, values = node.detail
                for handle, word in values:
                    found = ctypes.c_uint32.from_address(words + 8 * word).value
                    self.values[handle] = found
            else:
                self._branch(node)

    def _forget(self, body: Graph) -> None:
        """Whether handles keep their values from one iteration to the next nobody promises."""
        for node in body.nodes:
            if node.kind in ("WHILE", "IF", "SWITCH"):
                handle, inner = node.detail
                self.values[handle] = UNKNOWN
                for each in inner:
                    self._forget(each)

    def _branch(self, node: Recorded) -> None:
        handle, bodies = node.detail
        if node.kind == "WHILE":
            while self.values[handle]:
                self._forget(bodies[0])
                self._run(bodies[0])
        elif node.kind == "IF":
            if self.values[handle]:
                self._run(bodies[0])
        elif self.values[handle] < len(bodies):
            self._run(bodies[self.values[handle]])


def _assert_filled(graph: Graph) -> None:
    """No body is empty: whether one may be, the driver does not say."""
    for node in graph.nodes:
        if node.kind in ("WHILE", "IF", "SWITCH"):
            for body in node.detail[1]:
                assert body.nodes
                _assert_filled(body)
