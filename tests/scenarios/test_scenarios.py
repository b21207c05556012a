"""Each story's transcript is what it was, line by line: whoever changes what pgha decides, or how it explains it, sees it here.

    pytest tests/scenarios --update-transcripts      after a change that was meant: read the diff before you commit it
"""

from __future__ import annotations

import difflib
import inspect
from pathlib import Path

import pytest

from tests.scenarios.stories import STORIES, Story

HERE = Path(__file__).parent


def written(story: Story) -> str:
    stage, said = story.play()
    assert not stage.violations, f"{stage.violations[0].checker}: {stage.violations[0].text}\n\n{said}"
    return f"{inspect.cleandoc(story.text)}\n\n\n{said}"


@pytest.mark.parametrize("story", STORIES, ids=lambda s: s.name)
def test_story(story: Story, request: pytest.FixtureRequest) -> None:
    path = HERE / f"{story.name}.txt"
    now = written(story)
    if request.config.getoption("--update-transcripts"):
        path.write_text(now)
    before = path.read_text() if path.exists() else ""
    if now != before:
        diff = "\n".join(difflib.unified_diff(before.splitlines(), now.splitlines(), f"{path.name} (as it was)", f"{path.name} (now)", lineterm=""))
        pytest.fail(f"{diff}\n\nIf this is meant: pytest tests/scenarios --update-transcripts", pytrace=False)


def test_every_transcript_has_its_story() -> None:
    assert {p.stem for p in HERE.glob("*.txt")} == {s.name for s in STORIES}
