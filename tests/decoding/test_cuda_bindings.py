"""What `conditional` takes from cuda-bindings, held against that package; it needs no driver.

Calls of the driver are answered here, once their arguments fit the signature that the package
documents. All else is the package's own: structures, enumerations, conversions. Where the package
is absent this fails; it is among the requirements of the tests.
"""

from __future__ import annotations

import ctypes
import importlib
import re
from typing import Any

import pytest

from speckv.decoding import plan
from speckv.decoding.choice import choose_loop
from speckv.decoding.conditional import CudaError, Driver, PlanGraph
from speckv.kernels import layout as at
from speckv.kernels import set_conditions
from tests.decoding.test_choice import OnCuda

CONTEXT, FUNCTION, WORDS = 0x77, 0x88, 0x9000
_PHGRAPH_OUT = 16
"""Offset in CUDA_CONDITIONAL_NODE_PARAMS (cuda.h): handle, type, size, then this pointer."""


@pytest.fixture(scope="module")
def package() -> Any:
    return importlib.import_module("cuda.bindings.driver")


class Answering:
    """The package, whose calls succeed without a driver and are noted."""

    def __init__(self, package: Any) -> None:
        self._package = package
        self.calls: list[str] = []
        self.conditionals: list[tuple[int, str, int]] = []
        self.kernels: list[list[int]] = []
        self._numbers = iter(range(1000, 100_000))
        self._bodies: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._package, name)
        if not re.match(r"cu[A-Z]", name):
            return found
        takes = re.match(rf"{name}\((.*)\)", found.__doc__)[1]
        count = len(re.sub(r"\[[^\]]*\]", "", takes).split(",")) if takes else 0

        def call(*arguments: Any) -> tuple[Any, ...]:
            assert len(arguments) == count, (name, takes)
            self.calls.append(name)
            results = getattr(self, f"_{name}", lambda *_: ())(*arguments)
            return (self._package.CUresult.CUDA_SUCCESS, *results)

        return call

    def _new(self, kind: str) -> tuple[Any]:
        return (getattr(self._package, kind)(next(self._numbers)),)

    def _cuDriverGetVersion(self) -> tuple[int]:
        return (13_000,)

    def _cuCtxGetCurrent(self) -> tuple[Any]:
        return (self._package.CUcontext(CONTEXT),)

    def _cuGraphCreate(self, flags: int) -> tuple[Any]:
        return self._new("CUgraph")

    def _cuModuleLoadData(self, image: bytes) -> tuple[Any]:
        assert image.endswith(b"\0")
        return self._new("CUmodule")

    def _cuModuleGetFunction(self, module: Any, name: bytes) -> tuple[Any]:
        assert name == set_conditions.NAME.encode()
        return (self._package.CUfunction(FUNCTION),)

    def _cuGraphConditionalHandleCreate(
        self, graph: Any, context: Any, default: int, flags: int
    ) -> tuple[Any]:
        assert int(context) == CONTEXT and (default, flags) == (0, 1)
        return self._new("CUgraphConditionalHandle")

    def _cuGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any]:
        return self._new("CUgraphExec")

    def _cuGraphAddChildGraphNode(
        self, graph: Any, after: list[Any], count: int, child: Any
    ) -> tuple[Any]:
        self._check(graph, after, count)
        assert isinstance(child, self._package.CUgraph) and int(child) == 10
        return self._new("CUgraphNode")

    def _cuGraphAddKernelNode(
        self, graph: Any, after: list[Any], count: int, parameters: Any
    ) -> tuple[Any]:
        """The arguments are read as the driver reads them: pointers to their values."""
        self._check(graph, after, count)
        assert isinstance(parameters, self._package.CUDA_KERNEL_NODE_PARAMS)
        assert int(parameters.func) == FUNCTION
        places = ctypes.cast(parameters.kernelParams, ctypes.POINTER(ctypes.c_void_p))
        types = [ctypes.c_uint64] + [ctypes.c_uint64, ctypes.c_uint32] * set_conditions.HANDLES_MAX
        found = [kind.from_address(places[i]).value for i, kind in enumerate(types)]
        self.kernels.append(found)
        return self._new("CUgraphNode")

    def _cuGraphAddNode(
        self, graph: Any, after: list[Any], edges: None, count: int, parameters: Any
    ) -> tuple[Any]:
        """Bodies are written where the driver writes them."""
        self._check(graph, after, count)
        kinds = self._package.CUgraphNodeType
        assert parameters.type == kinds.CU_GRAPH_NODE_TYPE_CONDITIONAL
        wanted = parameters.conditional
        assert int(wanted.ctx) == CONTEXT
        self.conditionals.append((int(wanted.handle), wanted.type.name, wanted.size))
        bodies = (ctypes.c_void_p * wanted.size)(*(next(self._numbers) for _ in range(wanted.size)))
        self._bodies.append(bodies)
        place = ctypes.c_void_p.from_address(int(wanted.getPtr()) + _PHGRAPH_OUT)
        assert place.value is None
        place.value = ctypes.addressof(bodies)
        return self._new("CUgraphNode")

    def _check(self, graph: Any, after: list[Any], count: int) -> None:
        assert isinstance(graph, self._package.CUgraph) and int(graph) >= 1000
        assert count == len(after) <= 1
        assert all(isinstance(node, self._package.CUgraphNode) for node in after)


@pytest.mark.parametrize("drafts", plan.DRAFTS)
def test_a_plan_is_built_with_the_package(package: Any, drafts: str) -> None:
    api = Answering(package)
    whole = plan.generation_plan(3, drafts)
    graph = PlanGraph(whole, dict.fromkeys(plan.works(whole), 10), WORDS, Driver(api))
    graph.upload(5)
    graph.launch(5)
    graph.close()
    assert api.calls[-4:] == [
        *("cuGraphUpload", "cuGraphLaunch", "cuGraphExecDestroy", "cuGraphDestroy")
    ]
    nodes = [n for n in plan.nodes(whole) if isinstance(n, plan.While | plan.If | plan.Switch)]
    kinds = [f"CU_GRAPH_COND_TYPE_{type(node).__name__.upper()}" for node in nodes]
    sizes = [len(node.bodies) if isinstance(node, plan.Switch) else 1 for node in nodes]
    assert [kind for _, kind, _ in sorted(api.conditionals)] == kinds
    assert [size for _, _, size in sorted(api.conditionals)] == sizes
    assert api.calls.count("cuGraphAddChildGraphNode") == sum(
        isinstance(node, plan.Work) for node in plan.nodes(whole)
    )
    handles = dict(zip(plan.handles(whole), sorted(h for h, *_ in api.conditionals), strict=True))
    running = [WORDS, handles[plan.RUNNING], at.RUNNING_ROWS, *[0, set_conditions.NO_WORD] * 3]
    assert api.kernels[0] == running
    assert len(api.kernels) == sum(isinstance(node, plan.Set) for node in plan.nodes(whole))


def test_names_that_are_enumerations(package: Any) -> None:
    assert int(package.CU_GRAPH_COND_ASSIGN_DEFAULT) == 1
    kinds = package.CUgraphConditionalNodeType
    assert [int(getattr(kinds, f"CU_GRAPH_COND_TYPE_{k}")) for k in ("IF", "WHILE", "SWITCH")] == [
        *range(3)
    ]
    assert int(Driver(Answering(package)).context()) == CONTEXT


def test_an_error_has_its_name(package: Any) -> None:
    api: Any = Answering(package)
    api.cuGraphCreate = lambda flags: (package.CUresult.CUDA_ERROR_INVALID_VALUE, None)
    with pytest.raises(CudaError, match="^cuGraphCreate: CUDA_ERROR_INVALID_VALUE$"):
        Driver(api).new_graph()


def test_where_there_is_no_driver_the_choice_of_a_loop_says_so(package: Any) -> None:
    def without() -> Driver:
        raise DynamicLibNotFoundError("no libcuda")

    pathfinder = importlib.import_module("cuda.pathfinder")
    DynamicLibNotFoundError = pathfinder.DynamicLibNotFoundError  # what the first call raises
    here = OnCuda()
    expected = "graphed loop (the CUDA driver cannot be asked: no libcuda)"
    assert str(choose_loop(here, None, driver=without)) == expected
