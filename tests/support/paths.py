"""Folders that tests need: of the repository, of the scripts beside this file, and of real data where it is at hand."""

import os
from pathlib import Path

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]
DATA = Path(os.environ.get("SWIRL_FAST_DATA", ROOT.parent / "shared" / "data"))
