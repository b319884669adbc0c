"""A `plan` as one CUDA graph with conditional nodes, built through the driver's API.

Works come as captured graphs and become child-graph nodes, chained in the order of the plan; a
`Set` becomes the one-thread kernel of `speckv.kernels.set_conditions`; `While`, `If` and `Switch`
become conditional nodes, whose bodies are built likewise. Facts that this rests on are those of the
driver's documentation: a handle is of the top graph and of one conditional node, bodies are known
once the node was added, and a graph with conditional nodes has one executable at a time. No IF has
a second body, whose child graphs drivers before CUDA 13 mistake for the first's.
"""

from __future__ import annotations

import ctypes
import importlib
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ..errors import SpeckvError
from ..kernels import set_conditions
from . import plan as of

DRIVER_MIN = 12_080
"""CUDA 12.8: the first driver with SWITCH nodes."""


class CudaError(SpeckvError):
    """A call of the CUDA driver failed."""


class Driver:
    """The few calls of the CUDA driver that a graph is built with.

    Parameters
    ----------
    api : module, optional
        `cuda.bindings.driver`, or what stands in for it.

    Raises
    ------
    ImportError
        Without cuda-bindings.
    """

    def __init__(self, api: Any = None) -> None:
        self._api: Any = api or importlib.import_module("cuda.bindings.driver")
        self._set_conditions: Any = None

    def call(self, name: str, *arguments: Any) -> Any:
        """The results of a call, or its one result.

        Raises
        ------
        CudaError
            If it failed.
        """
        status, *results = getattr(self._api, name)(*arguments)
        if int(status) != 0:
            raise CudaError(f"{name}: {getattr(status, 'name', status)}")
        return results[0] if len(results) == 1 else results

    @property
    def version(self) -> int:
        """Of the driver, such as 13000."""
        return int(self.call("cuDriverGetVersion"))

    def context(self) -> Any:
        """The calling thread's context.

        Raises
        ------
        CudaError
            There is none: a thread has one once it has called CUDA's runtime.
        """
        context = self.call("cuCtxGetCurrent")
        if int(context) == 0:
            raise CudaError("cuCtxGetCurrent: no context is current in this thread")
        return context

    def new_graph(self) -> Any:
        return self.call("cuGraphCreate", 0)

    def new_handle(self, graph: Any) -> Any:
        """A condition of a node in ``graph`` or in a body within; 0 at first."""
        context = self.context()
        flag = int(self._api.CU_GRAPH_COND_ASSIGN_DEFAULT)
        return self.call("cuGraphConditionalHandleCreate", graph, context, 0, flag)

    def add_graph(self, graph: Any, after: list[Any], child: int) -> Any:
        """A node of the captured graph at address ``child``, which is copied."""
        raw = self._api.CUgraph(child)
        return self.call("cuGraphAddChildGraphNode", graph, after, len(after), raw)

    def add_conditional(
        self, graph: Any, after: list[Any], kind: str, handle: Any, size: int
    ) -> tuple[Any, list[Any]]:
        """A node of ``kind`` WHILE, IF or SWITCH with ``size`` bodies, and these."""
        api = self._api
        parameters = api.CUgraphNodeParams()
        parameters.type = api.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        parameters.conditional.handle = handle
        kinds = api.CUgraphConditionalNodeType
        parameters.conditional.type = getattr(kinds, f"CU_GRAPH_COND_TYPE_{kind}")
        parameters.conditional.size = size
        parameters.conditional.ctx = self.context()
        node = self.call("cuGraphAddNode", graph, after, None, len(after), parameters)
        return node, [parameters.conditional.phGraph_out[i] for i in range(size)]

    def add_set_conditions(
        self, graph: Any, after: list[Any], words: int, values: list[tuple[Any, int]]
    ) -> Any:
        """A node that sets up to four handles to words at address ``words``, by index."""
        if len(values) > set_conditions.HANDLES_MAX:
            raise ValueError(
                f"values: expected at most {set_conditions.HANDLES_MAX}, got {len(values)}"
            )
        arguments: list[Any] = [words]
        types: list[Any] = [ctypes.c_uint64]
        for i in range(set_conditions.HANDLES_MAX):
            handle, word = values[i] if i < len(values) else (0, set_conditions.NO_WORD)
            arguments += [int(handle), word]
            types += [ctypes.c_uint64, ctypes.c_uint32]
        api = self._api
        parameters = api.CUDA_KERNEL_NODE_PARAMS()
        parameters.func = self._function()
        for side in ("gridDim", "blockDim"):
            for axis in "XYZ":
                setattr(parameters, side + axis, 1)
        parameters.sharedMemBytes = 0
        parameters.kernelParams = (tuple(arguments), tuple(types))
        return self.call("cuGraphAddKernelNode", graph, after, len(after), parameters)

    def instantiate(self, graph: Any) -> Any:
        return self.call("cuGraphInstantiate", graph, 0)

    def upload(self, executable: Any, stream: int) -> None:
        """Bring a graph to the device ahead of its first launch."""
        self.call("cuGraphUpload", executable, self._api.CUstream(stream))

    def launch(self, executable: Any, stream: int) -> None:
        self.call("cuGraphLaunch", executable, self._api.CUstream(stream))

    def destroy(self, call: str, what: Any) -> None:
        """Give something back; what the driver says of that helps nobody."""
        with suppress(CudaError):
            self.call(call, what)

    def _function(self) -> Any:
        if self._set_conditions is None:
            module = self.call("cuModuleLoadData", set_conditions.ptx().encode() + b"\0")
            name = set_conditions.NAME.encode()
            self._set_conditions = self.call("cuModuleGetFunction", module, name)
        return self._set_conditions


class PlanGraph:
    """A plan that one launch runs to its end.

    The driver's graphs go with this object, or with `close`. One that is running then ends first.

    Parameters
    ----------
    plan : Plan
    works : mapping of str to int
        Address of the captured graph of each work.
    words : int
        Address of `LoopState.conditions`, on the device.
    driver : Driver
    """

    def __init__(self, plan: of.Plan, works: Mapping[str, int], words: int, driver: Driver) -> None:
        self._driver, self._works, self._words = driver, works, words
        self._graph = driver.new_graph()
        owned = [("cuGraphDestroy", self._graph)]
        self.close = weakref.finalize(self, _destroy, driver, owned)
        """Give the graph back to the driver."""
        self.close.atexit = False
        try:
            self._handles = {name: driver.new_handle(self._graph) for name in of.handles(plan)}
            self._build(self._graph, plan)
            self._executable = driver.instantiate(self._graph)
        except BaseException:
            self.close()
            raise
        owned.insert(0, ("cuGraphExecDestroy", self._executable))

    def upload(self, stream: int) -> None:
        """Bring it to the device ahead of its first launch."""
        self._driver.upload(self._executable, stream)

    def launch(self, stream: int) -> None:
        """Enqueue a run; there must be one at a time."""
        self._driver.launch(self._executable, stream)

    def _build(self, graph: Any, plan: of.Plan) -> None:
        driver, after = self._driver, list[Any]()
        for node in plan:
            if isinstance(node, of.Work):
                added = driver.add_graph(graph, after, self._works[node.name])
            elif isinstance(node, of.Set):
                values = [(self._handles[name], word) for name, word in node.values]
                added = driver.add_set_conditions(graph, after, self._words, values)
            else:
                bodies = node.bodies if isinstance(node, of.Switch) else (node.body,)
                handle = self._handles[node.handle]
                kind = type(node).__name__.upper()
                added, made = driver.add_conditional(graph, after, kind, handle, len(bodies))
                for body, inner in zip(bodies, made, strict=True):
                    self._build(inner, body)
            after = [added]


def _destroy(driver: Driver, owned: list[tuple[str, Any]]) -> None:
    for call, what in owned:
        driver.destroy(call, what)
