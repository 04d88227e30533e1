"""Markdown tables, aligned for terminals."""

import io
from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], num_left: int = 1) -> str:
    """A Markdown table, without a newline at its end.

    Args:
        head: titles of the columns.
        rows: cells of each row, as many as titles.
        num_left: number of left-aligned columns; the others are right-aligned.

    >>> print(markdown_table(["system", "FAD"], [["ours", "4.50"], ["theirs", "12.25"]]))
    | system |   FAD |
    |--------|------:|
    | ours   |  4.50 |
    | theirs | 12.25 |
    """
    from rich.box import MARKDOWN
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=MARKDOWN)
    for i, title in enumerate(head):
        table.add_column(
            Text(_escape(title)), justify="left" if i < num_left else "right", no_wrap=True
        )
    for row in rows:
        table.add_row(*(Text(_escape(cell)) for cell in row))
    # Wide enough for any row: rich cuts cells at the width of the terminal.
    console = Console(file=io.StringIO(), width=1_000_000, color_system=None)
    with console.capture() as capture:
        console.print(table)
    titles, rule, *body = [line.strip() for line in capture.get().splitlines() if line.strip()]
    dashes = rule.strip("|").split("|")
    marked = [part if i < num_left else f"{part[:-1]}:" for i, part in enumerate(dashes)]
    return "\n".join([titles, f"|{'|'.join(marked)}|", *body])


def _escape(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")
