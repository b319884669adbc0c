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
LENGTH = "length"
"""Handles: one a conditional node."""

DRAFTS = ("while", "chain", "switch")
"""How a plan drafts. ``while``: again while a row drafts. ``chain``: so too, each further token
under an IF of its own. ``switch``: a SWITCH over unrolled lengths, for policies of fixed γ only."""


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


def generation_plan(gamma_cap: int, drafts: str = "while") -> Plan:
    """Steps until no row runs.

    A handle is set in the very body that its node stands in, ahead of it, and that of a WHILE at
    the end of its own body besides: whether values outlast an iteration of an outer loop, and
    whether one may be set from within another node, is then of no consequence. An IF has one body:
    drivers before CUDA 13 give child graphs of two to the wrong one.

    Parameters
    ----------
    gamma_cap : int
        Most draft tokens of a step, 0 to 15; with 0 there is no draft.
    drafts : str
        One of `DRAFTS`.

    Raises
    ------
    ValueError
        If either is another.
    """
    if not 0 <= gamma_cap <= at.GAMMA_MAX:
        raise ValueError(f"gamma_cap: expected 0 to {at.GAMMA_MAX}, got {gamma_cap}")
    if drafts not in DRAFTS:
        raise ValueError(f"drafts: expected one of {', '.join(DRAFTS)}, got {drafts!r}")
    running = Set(((RUNNING, at.RUNNING_ROWS),))
    verify = tuple((Work(verify_work(w)),) for w in range(1, gamma_cap + 2))
    step: Plan = (*verify[0], Work(CLOSE), running)
    if gamma_cap:
        step = (
            *_draft(gamma_cap, drafts),
            Set(((WIDTH, at.MOST_DRAFTED),)),
            Switch(WIDTH, verify),
            Work(CLOSE),
            running,
        )
    return Work(BEGIN), running, While(RUNNING, step)


def _draft(gamma_cap: int, drafts: str) -> Plan:
    """What a step does before it verifies."""
    lagging = (LAGGING, at.LAGGING_ROWS)
    catch_up = While(LAGGING, (Work(CATCH_UP), Set((lagging,))))
    if drafts == "switch":
        unrolled: list[Plan] = [(Work(FIRST), *[Work(NEXT)] * n) for n in range(gamma_cap)]
        nothing: Plan = (Set(()),)  # whether a body may be empty nobody says
        lengths: tuple[Plan, ...] = (nothing, *unrolled)
        begin = Set((lagging, (LENGTH, at.FIXED_GAMMA)))
        return begin, catch_up, Switch(LENGTH, lengths)
    begin = Set((lagging, (DRAFTING, at.DRAFTING_ROWS)))
    if drafts == "chain":
        nexts = [f"{MORE}-{n}" for n in range(2, gamma_cap + 1)]
        chain = ((_set_drafting(name), If(name, (Work(NEXT),))) for name in nexts)
        again: Plan = tuple(node for pair in chain for node in pair)
        return begin, catch_up, If(DRAFTING, (Work(FIRST),)), *again
    first: Plan = (Work(FIRST),)
    if gamma_cap > 1:
        more = _set_drafting(MORE)
        first = (Work(FIRST), more, While(MORE, (Work(NEXT), more)))
    return begin, catch_up, If(DRAFTING, first)


def _set_drafting(handle: str) -> Set:
    return Set(((handle, at.DRAFTING_ROWS),))


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
    begun = closed = False

    def run(name: str) -> None:
        nonlocal drafted, total, closed
        total += launches[name] if name != BEGIN else 0
        drafted += name in (FIRST, NEXT)
        closed = name == CLOSE

    def read(conditions: list[int]) -> list[int]:
        nonlocal total, begun
        total += begun  # what is set ahead of the first step is not of a step
        begun = True
        values = {
            at.RUNNING_ROWS: int(not closed),
            at.DRAFTING_ROWS: int(drafted < gamma),
            at.LAGGING_ROWS: 0,
            at.MOST_DRAFTED: drafted,
            at.FIXED_GAMMA: gamma,
        }
        return [values[condition] for condition in conditions]

    for _ in follow(plan, run, read):
        pass
    return total
