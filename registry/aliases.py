"""Moving aliases: compare, set, and write the step down, inside the caller's transaction.

The caller holds the scene's row, so that moves of one scene happen one after the other; the
comparison in the statement itself stays, for whoever writes past this code.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, bindparam, insert, select, update

from registry.errors import NotFound, PreconditionFailed
from registry.schema import alias_moves, aliases, versions

# As the expected number: the alias must not exist yet.
ABSENT = 0

# Built once: building a statement takes as long as running it on SQLite.
_HERE = (aliases.c.scene_id == bindparam("of_scene")) & (aliases.c.name == bindparam("of_name"))
_NUMBER = select(aliases.c.number).where(_HERE)
_MOVE = (
    update(aliases)
    .where(_HERE, aliases.c.number == bindparam("previous"))
    .values(number=bindparam("next"))
)
_ADD, _ADD_STEP = insert(aliases), insert(alias_moves)


@dataclass(frozen=True, slots=True)
class Step:
    """What one move is: which alias, where to, on whose account, and whether past a protection."""

    scene_id: int
    scene: str
    alias: str
    number: int
    action: str
    by: str
    at: datetime
    undoes: int | None = None
    override: bool = False


def move_alias(connection: Connection, step: Step, expect: int | None) -> bool:
    """Point the alias to the step's number; False where it points there already.

    Args:
        expect: Number the alias must point to now, ABSENT for none, None for any.

    Raises:
        PreconditionFailed: It points elsewhere than expected.
    """
    previous = expected_number(connection, step.scene_id, step.scene, step.alias, expect)
    if previous == step.number:
        return False
    if previous is None:
        row = {"scene_id": step.scene_id, "name": step.alias, "number": step.number}
        connection.execute(_ADD, row)
    else:
        here = {"of_scene": step.scene_id, "of_name": step.alias}
        there = {"previous": previous, "next": step.number}
        if connection.execute(_MOVE, here | there).rowcount != 1:
            raise _moved_meanwhile(step.scene, step.alias, None, previous)
    connection.execute(
        _ADD_STEP,
        {
            "scene_id": step.scene_id,
            "alias": step.alias,
            "previous": previous,
            "number": step.number,
            "action": step.action,
            "undoes": step.undoes,
            "moved": step.at,
            "moved_by": step.by,
        },
    )
    return True


def expected_number(
    connection: Connection, scene_id: int, scene: str, alias: str, expect: int | None
) -> int | None:
    """The number that the alias points to, or None where there is no such alias.

    Args:
        expect: What it must be, ABSENT for no such alias, None for any.

    Raises:
        PreconditionFailed: It is another.
    """
    here = {"of_scene": scene_id, "of_name": alias}
    number: int | None = connection.execute(_NUMBER, here).scalar_one_or_none()
    if expect is not None and expect != (number or ABSENT):
        raise _moved_meanwhile(scene, alias, number, expect)
    return number


def step_back(connection: Connection, scene_id: int, scene: str, alias: str) -> tuple[int, int]:
    """The latest move that can be taken back: its id, and the number the alias had before it.

    Moves that an earlier rollback took back are passed over, so that repeated rollbacks go
    further back; so are moves away from versions that were retired since, and then those away
    from where the alias is now.

    Raises:
        NotFound: The alias never pointed anywhere else.
    """
    here = (aliases.c.scene_id == scene_id) & (aliases.c.name == alias)
    present = select(aliases.c.number).where(here).scalar_subquery()
    rollbacks = alias_moves.alias("rollbacks")
    taken_back = (
        select(rollbacks.c.id)
        .where(
            rollbacks.c.scene_id == scene_id,
            rollbacks.c.alias == alias,
            rollbacks.c.undoes <= alias_moves.c.id,
            rollbacks.c.id > alias_moves.c.id,
        )
        .exists()
    )
    move = connection.execute(
        select(alias_moves.c.id, alias_moves.c.previous)
        .join(
            versions,
            (versions.c.scene_id == alias_moves.c.scene_id)
            & (versions.c.number == alias_moves.c.previous),
        )
        .where(
            alias_moves.c.scene_id == scene_id,
            alias_moves.c.alias == alias,
            alias_moves.c.undoes.is_(None),
            alias_moves.c.previous != present,
            versions.c.retired.is_(None),
            ~taken_back,
        )
        .order_by(alias_moves.c.id.desc())
        .limit(1)
    ).one_or_none()
    if move is None:
        raise NotFound(
            f"The alias {alias!r} of {scene!r} has no earlier version to go back to: "
            f"`registry history {scene}` shows its moves, `registry alias` sets it freely."
        )
    return move.id, move.previous


def _moved_meanwhile(scene: str, alias: str, number: int | None, expect: int) -> PreconditionFailed:
    now = f"points to version {number}" if number else "does not exist"
    wanted = f"version {expect}" if expect else "no such alias"
    return PreconditionFailed(
        f"The alias {alias!r} of {scene!r} {now} and you expected {wanted}: someone "
        f"moved it meanwhile. Look at `registry history {scene}`, then decide again."
    )
