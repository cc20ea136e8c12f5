"""runs/NAME/report.html: one HTML file about the run."""

from __future__ import annotations

from swirl_fast.config import Config
from swirl_fast.ranks import by_rank_0
from swirl_fast.report import write_report


@by_rank_0
def report(config: Config) -> None:
    print(f"report: {write_report(config.folder)}")
