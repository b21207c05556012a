"""`ctl explain --if`: what would happen if? Every agent is asked for what it sees now; the rules themselves say the rest.

Nothing is changed. What is printed is a forecast (pgha/foresee): where the future is open it names all who may lead, and
what it does not know it says.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pgha.ctl import agents
from pgha.ctl import cluster as clusters
from pgha.ctl.cluster import Cluster
from pgha.ctl.ends import DONE, UNREACHABLE, USAGE, End
from pgha.ctl.output import plain
from pgha.ctl.settings import Settings

if TYPE_CHECKING:
    from pgha.foresee.forecast import Forecast
    from pgha.foresee.world import Seen

#: An agent that answers at all does so in this time.
_ANSWER_S = 4.0


def run(settings: Settings, node: str | None, texts: Sequence[str], *, as_json: bool) -> int:
    import msgspec

    from pgha.foresee.forecast import foresee
    from pgha.foresee.hypothesis import NotAHypothesis, UnknownNode, parse, parse_all

    try:
        for text in texts:
            parse(text)     # what is malformed is said before anybody is asked
        cluster = clusters.read_or_ask(settings)
        hypotheses = parse_all(texts, cluster.members)
    except (NotAHypothesis, UnknownNode) as wrong:
        raise End(USAGE, f"--if {wrong}") from None
    if node is not None and node not in cluster.members:
        raise End(USAGE, f"no such member: {node}; there are {', '.join(cluster.members) or 'none'}")
    seen, unheard = observations(settings, cluster)
    if not seen:
        raise End(UNREACHABLE, "no agent tells what it sees: " + "; ".join(f"{name}: {why}" for name, why in sorted(unheard.items())))
    forecast = foresee(seen, hypotheses, unheard=unheard)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode({**msgspec.to_builtins(forecast), "certain": forecast.certain}), indent=2).decode())
    else:
        print("\n".join(plain(line) for line in words(forecast, node)))
    return DONE


def observations(settings: Settings, cluster: Cluster) -> tuple[dict[str, Seen], dict[str, str]]:
    """What every agent saw in a pass of now; and who did not tell, and why. All are asked at the same time."""
    from concurrent.futures import ThreadPoolExecutor

    names = list(cluster.members)
    with ThreadPoolExecutor(max(1, min(16, len(names)))) as pool:
        answers = list(pool.map(lambda name: _ask(settings, cluster, name), names))
    now_s = time.monotonic()
    seen, unheard = {}, {}
    for name, answer in zip(names, answers, strict=True):
        # Read here and not in the threads: msgspec prepares a type at its first use, and two threads at once end the process.
        found = answer if isinstance(answer, str) else _read(name, answer[0], now_s - answer[1])
        if isinstance(found, str):
            unheard[name] = found
        else:
            seen[name] = found
    return seen, unheard


def _ask(settings: Settings, cluster: Cluster, name: str) -> tuple[bytes, float] | str:
    """The answer, and when it came; or why there is none."""
    from pgha.ctl.exchange import NoAnswer

    try:
        answer = agents.ask(settings, cluster.api_url(name), "GET", "/pgha/observation?fresh=1", timeout_s=_ANSWER_S)
    except NoAnswer as failure:
        return str(failure)
    except End as end:
        return end.text
    return (answer.body, time.monotonic()) if answer.status == 200 else f"status {answer.status}"


def _read(name: str, body: bytes, age_s: float) -> Seen | str:
    import msgspec

    from pgha.foresee.world import Seen

    try:
        found = msgspec.json.decode(body, type=Seen)
    except msgspec.DecodeError as error:
        return f"its answer is no observation of this version: {str(error)[:200]}"
    if found.observation.me.name != name:
        return f"{found.observation.me.name} answers at its address"
    return msgspec.structs.replace(found, age_s=found.age_s + age_s)


def words(forecast: Forecast, node: str | None = None) -> list[str]:
    """The forecast for people; `node`: whose decisions, None all."""
    lines = [f"if {' and '.join(forecast.hypotheses)}:", *(f"  {line}" for line in _outcome(forecast))]
    width = max((len(name) for name in forecast.nodes), default=0)
    obstacles = {name: reasons for name, reasons in forecast.obstacles.items() if node in (None, name)}
    if any(obstacles.values()):
        lines += ["", "who does not lead then, and why:"]
        lines += [f"  {name:<{width}}  {reason.rule}  {reason.because}" for name, reasons in obstacles.items() for reason in reasons]
    lines += ["", "what they decide:"]
    for name, decisions in forecast.nodes.items():
        if node in (None, name):
            lines += _decisions(name, decisions, width)
    if forecast.unknown:
        lines += ["", "not known:", *(f"  {line}" for line in forecast.unknown)]
    lines += ["", "by what was seen: " + ", ".join(f"{name} {age:.1f} s ago" for name, age in forecast.ages_s.items())]
    return lines


def _outcome(forecast: Forecast) -> list[str]:
    from pgha.foresee.forecast import in_words

    leader = forecast.leader
    lines = [f"{leader} leads now" + ("" if forecast.writes_now else ", and accepts no writes yet") if leader else "nobody leads now"]
    lines += [f"{name} is demoted {in_words(when)}: {forecast.why_demoted.get(name, '')}" for name, when in forecast.demotes.items()]
    if forecast.failsafe:
        lines.append(forecast.failsafe)
    if forecast.writes_stop and forecast.lock_free_s is not None:
        lines.append(f"the lock may be taken {in_words(forecast.lock_free_s)}")
    if not forecast.writes_stop and forecast.winners == (leader,):
        lines.append(f"{leader} leads on")
    elif forecast.winners:
        who = " or ".join(forecast.winners)
        more = "" if forecast.certain else f" (open; most likely {forecast.likely or 'nobody'})" if len(forecast.winners) > 1 else " (or nobody)"
        lines.append(f"then {who} leads{more}")
    if forecast.nobody_possible and not forecast.winners:
        lines.append("then nobody leads, until something else changes")
    elif forecast.nobody_possible and len(forecast.winners) > 1:
        lines.append("it may be that nobody does")
    if forecast.writes_stop and forecast.writes_back_s is not None:
        lines.append(f"writes are possible again {in_words(forecast.writes_back_s)} (an estimate: promotion and messages take their time)")
    elif forecast.writes_stop:
        lines.append("when writes are possible again is not foretold" if forecast.winners else "writes are not possible until then")
    if forecast.sync is not None:
        lines.append(f"/sync names {forecast.sync_leader} and {', '.join(forecast.sync) or 'nobody else'} in the end" + (f"; {forecast.commits_wait}" if forecast.commits_wait else ""))
    return lines


def _decisions(name: str, decisions: Sequence[Any], width: int) -> list[str]:
    lines = []
    for index, then in enumerate(decisions):
        when = "at once" if then.at_s < 0.05 else f"{then.at_s:.1f} s"
        lines.append(f"  {name if index == 0 else '':<{width}}  {when:>8}  [{then.situation}] {then.summary}")
    return lines

