"""A registry as the source of scenes: what an export writes down, and another registry takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from sqlalchemy import Connection, select

from registry import catalog
from registry.manifest import MoveEntry, SceneEntry, VersionEntry
from registry.records import check_scene
from registry.schema import alias_moves, protected_aliases, scenes

if TYPE_CHECKING:
    from registry.registry import Registry

PAGE = 200


class RegistrySource:
    """Scenes of a registry, to be taken by another.

    Args:
        names: Scenes to take; none for all.
    """

    def __init__(self, registry: Registry, names: Sequence[str] = ()) -> None:
        self._registry = registry
        self._names = [check_scene(name) for name in names]

    @property
    def place(self) -> str:
        """See Source."""
        return f"the registry at {self._registry.database.place}"

    def scenes(self) -> list[SceneEntry]:
        """See Source."""
        return [_describe(self._registry, name) for name in self._names or self._every()]

    def read(self, digest: str) -> bytes:
        """See Source."""
        return self._registry.blobs.get(digest)

    def signature(self, digest: str) -> bytes | None:
        """See Source."""
        return self._registry.blobs.signature(digest)

    def _every(self) -> Iterator[str]:
        after = ""
        while page := self._registry.scenes(after=after, limit=PAGE):
            yield from (scene.name for scene in page)
            after = page[-1].name


def _describe(registry: Registry, name: str) -> SceneEntry:
    """All that the registry says of a scene, seen at one moment."""
    with registry.database.reading() as connection:
        scene = catalog.find_scene(connection, name)
        here = scenes.c.name == name
        scene_id = connection.execute(select(scenes.c.id).where(here)).scalar_one()
        versions: list[VersionEntry] = []
        before: int | None = None
        while page := catalog.list_versions(
            connection, name, before=before, limit=PAGE, retired=True
        ):
            before = page[-1].number
            fields = VersionEntry.__dataclass_fields__
            versions += [VersionEntry(**{f: getattr(v, f) for f in fields}) for v in page]
            if before == 1:
                break
        guarded = select(protected_aliases.c.name).where(protected_aliases.c.scene_id == scene_id)
        return SceneEntry(
            name=name,
            created=scene.created,
            latest=scene.latest,
            versions=versions[::-1],
            aliases=dict(scene.aliases),
            history=history(connection, scene_id),
            protected=sorted(connection.execute(guarded).scalars()),
        )


def history(connection: Connection, scene_id: int) -> list[MoveEntry]:
    """Every step of the scene's aliases, as an export names them."""
    mine = select(alias_moves).where(alias_moves.c.scene_id == scene_id)
    rows = connection.execute(mine.order_by(alias_moves.c.id)).all()
    places = {row.id: k for k, row in enumerate(rows)}
    return [
        MoveEntry(
            alias=row.alias,
            previous=row.previous,
            number=row.number,
            action=row.action,
            undoes=None if row.undoes is None else places[row.undoes],
            moved=row.moved,
            moved_by=row.moved_by,
        )
        for row in rows
    ]
