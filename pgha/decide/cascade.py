"""From whom is a member to stream, as everybody's tags have it? (compatibility spec 6 and 9.5)"""

from __future__ import annotations

from pgha.model.cluster import ClusterView, Member, Tags


def cascades_from(view: ClusterView, name: str, tags: Tags, leader: str) -> Member | None:
    """The member that `name` streams from in the leader's place: the one that its replicatefrom names, while that runs.

    None: from the leader, or, with nostream, from nobody.
    """
    chosen = view.members.get(tags.replicatefrom) if tags.replicatefrom and not tags.nostream else None
    if chosen is None or leader in (name, chosen.name) or chosen.state != "running" or not chosen.host or _comes_back(view, name, tags, leader):
        return None
    return chosen


def _comes_back(view: ClusterView, name: str, tags: Tags, leader: str) -> bool:
    """Does the chain of replicatefrom come back to `name`? Who streams from itself, over however many, gets nothing."""
    passed, at = set[str](), tags.replicatefrom
    while at and at not in passed and at != leader:
        if at == name:
            return True
        passed.add(at)
        member = view.members.get(at)
        at = member.tags.replicatefrom if member is not None and member.state == "running" else None
    return False
