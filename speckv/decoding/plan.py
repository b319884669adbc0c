"""A whole generation as a tree of prepared works and of conditions that the device decides.

One plan is followed by the host, node by node (`follow`), and built into one CUDA graph
(`speckv.decoding.conditional`). What a node means is the same in both: a handle keeps the value
that was last set for it, a WHILE or an IF runs its body while, or if, its handle is not 0, and a
SWITCH runs the body of that number, or none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from ..kernels import layout as at

BEGIN, CATCH_UP, FIRST, NEXT, CLOSE = "begin", "catch-up", "first", "next", "close"
"""Works: nothing; the draft reads what it has missed; it drafts the first token of a step, and
another; the step is told to the host. Each ends by publishing the conditions."""

RUNNING, LAGGING, DRAFTING, MORE, WIDTH = "running", "lagging", "drafting", "more", "width"
"""Handles: one a conditional node."""


@dataclass(frozen=True)
class Work:
    """Launches that were prepared under a name."""

    name: str


@dataclass(frozen=True)
class Set:
    """Give handles the values of conditions that the work before it has published.

    Attributes
    ----------
    values : tuple of (handle, index into `LoopState.conditions`)
    """

    values: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class While:
    handle: str
    body: Plan


@dataclass(frozen=True)
class If:
    handle: str
    body: Plan


@dataclass(frozen=True)
class Switch:
    handle: str
    bodies: tuple[Plan, ...]


Node = Work | Set | While | If | Switch
Plan = tuple[Node, ...]


def verify_work(width: int) -> str:
    """The name of the verification of ``width`` positions, which publishes no conditions."""
    return f"verify-{width}"


def publishes(name: str) -> bool:
    """Whether a work ends by publishing the conditions."""
    return not name.startswith("verify")


def generation_plan(gamma_cap: int) -> Plan:
    """Steps until no row runs.

    Parameters
    ----------
    gamma_cap : int
        Most draft tokens of a step, 0 to 15; with 0 there is no draft.

    Raises
    ------
    ValueError
        If it is outside that range.
    """
    if not 0 <= gamma_cap <= at.GAMMA_MAX:
        raise ValueError(f"gamma_cap: expected 0 to {at.GAMMA_MAX}, got {gamma_cap}")
    running = (RUNNING, at.RUNNING_ROWS)
    if gamma_cap == 0:
        one = (Work(verify_work(1)), Work(CLOSE), Set((running,)))
        return Work(BEGIN), Set((running,)), While(RUNNING, one)
    lagging, drafting = (LAGGING, at.LAGGING_ROWS), (DRAFTING, at.DRAFTING_ROWS)
    width, more = (WIDTH, at.MOST_DRAFTED), (MORE, at.DRAFTING_ROWS)
    begin = Set((running, lagging, drafting, width))
    draft: Plan = (Work(FIRST), Set((width,)))
    if gamma_cap > 1:
        again = (Work(NEXT), Set((more, width)))
        draft = (Work(FIRST), Set((more, width)), While(MORE, again))
    step: Plan = (
        While(LAGGING, (Work(CATCH_UP), Set((lagging,)))),
        If(DRAFTING, draft),
        Switch(WIDTH, tuple((Work(verify_work(w)),) for w in range(1, gamma_cap + 2))),
        Work(CLOSE),
        begin,
    )
    return Work(BEGIN), begin, While(RUNNING, step)


def works(plan: Plan) -> list[str]:
    """The names of a plan's works, each once, in order of appearance."""
    return list(dict.fromkeys(node.name for node in nodes(plan) if isinstance(node, Work)))


def handles(plan: Plan) -> list[str]:
    """The handles of a plan's conditional nodes, in order of appearance."""
    found = (node.handle for node in nodes(plan) if isinstance(node, While | If | Switch))
    return list(dict.fromkeys(found))


def nodes(plan: Plan) -> Iterator[Node]:
    """Every node of a plan, those of bodies after the one they belong to."""
    for node in plan:
        yield node
        if isinstance(node, While | If):
            yield from nodes(node.body)
        elif isinstance(node, Switch):
            for body in node.bodies:
                yield from nodes(body)


def follow(
    plan: Plan, run: Callable[[str], None], read: Callable[[list[int]], list[int]]
) -> Iterator[str]:
    """Follow a plan from the host.

    Parameters
    ----------
    run : callable
        Runs, or enqueues, a work.
    read : callable
        The values of conditions, once the works so far have published them.

    Yields
    ------
    str
        The name of every work that was run, after it.
    """
    yield from _follow(plan, run, read, {})


def _follow(
    plan: Plan,
    run: Callable[[str], None],
    read: Callable[[list[int]], list[int]],
    values: dict[str, int],
) -> Iterator[str]:
    for node in plan:
        if isinstance(node, Work):
            run(node.name)
            yield node.name
        elif isinstance(node, Set):
            found = read([condition for _, condition in node.values])
            values.update(zip((handle for handle, _ in node.values), found, strict=True))
        elif isinstance(node, While):
            while values.get(node.handle, 0):
                yield from _follow(node.body, run, read, values)
        elif isinstance(node, If):
            if values.get(node.handle, 0):
                yield from _follow(node.body, run, read, values)
        elif 0 <= (number := values.get(node.handle, 0)) < len(node.bodies):
            yield from _follow(node.bodies[number], run, read, values)


def launches_per_step(plan: Plan, launches: Mapping[str, int], gamma: int) -> int:
    """Kernels of one step whose longest draft has ``gamma`` tokens and lacks none before.

    Parameters
    ----------
    launches : mapping of str to int
        Kernels of each work. A `Set` is one more.
    """
    drafted = total = 0
    closed = False

    def run(name: str) -> None:
        nonlocal drafted, total, closed
        total += launches[name] if name != BEGIN else 0
        drafted += name in (FIRST, NEXT)
        closed = name == CLOSE

    def read(conditions: list[int]) -> list[int]:
        nonlocal total
        total += drafted > 0 or closed  # those ahead of the first step are not of a step
        values = {
            at.RUNNING_ROWS: int(not closed),
            at.DRAFTING_ROWS: int(drafted < gamma),
            at.LAGGING_ROWS: 0,
            at.MOST_DRAFTED: drafted,
        }
        return [values[condition] for condition in conditions]

    for _ in follow(plan, run, read):
        pass
    return total
