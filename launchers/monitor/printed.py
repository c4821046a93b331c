"""The monitor's table and document, printed once: for scripts, and where there is no terminal."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from launchers.monitor import columns, words
from launchers.monitor.observatory import Board, Observatory
from launchers.views.progress import make_console
from launchers.views.tables import COLUMNS_OF_A_FILE, document


def print_once(observatory: Observatory, *, as_json: bool) -> None:
    """Ask Slurm, then print what is known."""
    observatory.look()
    observatory.ask_slurm()
    board = observatory.look()
    if as_json:
        print(json.dumps(board_document(board), indent=2))
        return
    console = make_console()
    if not console.is_terminal:
        console.width = COLUMNS_OF_A_FILE
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
