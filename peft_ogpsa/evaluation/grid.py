# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""A table of texts for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def text_grid(
    title: str, note: str, headings: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str]
) -> Table:
    """Build a table whose cells are shown as they are, without rich's markup.

    Args:
        title: The line above the table.
        note: The text below it.
        headings: One heading for each column.
        rows: The cells, row by row.
        left: Headings of the columns that are aligned to the left. The others are aligned to the right.
    """
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=Text(title), caption=Text(note, style="table.caption"))
    for heading in headings:
        grid.add_column(heading, justify="left" if heading in left else "right")
    for row in rows:
        grid.add_row(*map(Text, row))
    return grid
