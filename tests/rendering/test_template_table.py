"""Every chat template in the table of docs/models.md is accepted or refused as it says, and training on what it writes is exact."""

from __future__ import annotations

import pytest
from support.chat_templates import native_templates
from support.template_table import BEGIN, END, PAGE, row_of

TABLE = {
    cells[1].strip(): [cell.strip() for cell in cells[2:-1]]
    for line in PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].split("\n")[3:]
    if len(cells := line.split("|")) > 2
}


def test_the_table_has_all_templates() -> None:
    assert sorted(TABLE) == native_templates()
    assert sum(not cells[0].startswith("refused") for cells in TABLE.values()) >= 0.9 * len(TABLE)


@pytest.mark.parametrize("name", native_templates())
def test_a_template_is_as_exact_as_the_table_says(name: str) -> None:
    if TABLE[name][0].startswith("refused"):
        with pytest.raises(ValueError):
            row_of(name)
        return
    row = row_of(name)
    assert [row.native, row.thoughts] == TABLE[name][:2]
    assert row.gap < 1e-4 and row.difference < 1e-4
