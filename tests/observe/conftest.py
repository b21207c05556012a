"""The worlds of other folders that the tests of the store's capacity use."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[1:1] = [str(Path(__file__).parents[1] / "dcs"), str(Path(__file__).parents[1] / "decide")]
