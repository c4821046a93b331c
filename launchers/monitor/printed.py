"""The monitor's table and document, once: for scripts, as a page, and where there is no terminal."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from launchers.monitor import columns, words
from launchers.monitor.observatory import Board, Observatory
from launchers.views.page_file import require_page, write_page
from launchers.views.progress import make_console
from launchers.views.tables import COLUMNS_OF_A_FILE, document
from launchers.views.units import moment

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Training runs</title>
<style>
{stylesheet}
body {{ color: {foreground}; background-color: {background}; margin: 1rem; overflow-x: auto; }}
pre {{ font-family: monospace; line-height: 1.3; }}
</style>
</head>
<body>
<pre><code>{code}</code></pre>
</body>
</html>
"""
"""What rich fills; the page loads nothing."""


def print_once(observatory: Observatory, *, as_json: bool) -> None:
    """Ask Slurm, then print what is known."""
    board = asked_board(observatory)
    if as_json:
        print(json.dumps(board_document(board), indent=2))
        return
    console = make_console()
    if not console.is_terminal:
        console.width = COLUMNS_OF_A_FILE
    print_board(board, console)


def write_once(observatory: Observatory, file: Path) -> None:
    """Ask Slurm, then write what is known as one page.

    Raises:
        ConfigError: the file's name is not a page's, or it cannot be written.
    """
    require_page(file)
    console = Console(record=True, file=io.StringIO(), width=COLUMNS_OF_A_FILE, force_terminal=True)
    board = asked_board(observatory)
    console.print(f"As of {moment(board.now)}", highlight=False)
    print_board(board, console)
    write_page(file, console.export_html(code_format=PAGE))


def asked_board(observatory: Observatory) -> Board:
    """What is known, Slurm's word included."""
    observatory.look()
    observatory.ask_slurm()
    return observatory.look()


def print_board(board: Board, console: Console) -> None:
    console.print(f"{words.total_line(board)}: {words.states_line(board) or 'none'}; {words.slurm_line(board)}")
    if board.trouble or board.slurm_problem:
        console.print(words.printable(str(board.trouble or board.slurm_problem)))
    if board.sights:
        fitting = columns.fitting(console.width)
        for line in (columns.header_of(fitting), *columns.rows_of(board, fitting).values()):
            console.print(line, soft_wrap=True)


def board_document(board: Board) -> dict[str, Any]:
    """For programs: what launchers.status has of each run, with its vitals. The keys stay."""
    runs = [
        document(sight.view)
        | {
            "vitals": asdict(sight.vitals),
            "seconds_left": sight.seconds_left,
            "mfu": sight.mfu,
            "warnings": words.dangers(sight, board.now),
        }
        for sight in board.sights
    ]
    slurm = {"asked": board.slurm_asked, "problem": board.slurm_problem}
    return {"time": board.now, "slurm": slurm, "trouble": board.trouble, "runs": runs}
