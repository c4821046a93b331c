"""A run that is killed again and again, and what must be true of its checkpoints after each kill and at its end."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.kill_points import ANY, MOMENT, QUARANTINE, REACHED, REPLACE, Kill
from benchmarks.small_agent import Agent, BrokenChainError
from benchmarks.undisturbed import Twin, differences, records_of
from encdec.checkpoints import logical_digest
from encdec.checkpoints.manifest import verify
from encdec.errors import CheckpointError
from encdec.files import RunPaths
from encdec.records import RankResult, read_json_lines, read_record

COMMITTED = re.compile(r"step-(\d+)")
SET_ASIDE = re.compile(r"step-(\d+)\.tmp-replaced-\d+")
SECONDS_BETWEEN_WARNINGS = 0.05


@dataclass
class Figures:
    """What was counted over all runs."""

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By place and scope; a victim that did not come to its place counts at ANY."""
    recomputed: Counter[str] = field(default_factory=Counter)
    """Steps computed again, by the place of the kill before."""
    steps: int = 0
    """Steps computed, each time counted."""
    runs: int = 0
    checked: int = 0
    """Checkpoints read after a kill and compared with the twin's."""
    quarantined: int = 0
    """Checkpoints that were damaged on purpose and moved away."""
    lost: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    alarms: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    @property
    def killed(self) -> int:
        return sum(self.kills.values())

    @property
    def failures(self) -> list[str]:
        return [*self.lost, *self.broken, *self.alarms, *self.differences]


class KilledRun:
    """One run from its first step to its last.

    Args:
        paths: its run directory, made.
        twin: what it must come to.
        figures: where everything is counted.
    """

    def __init__(self, paths: RunPaths, twin: Twin, figures: Figures) -> None:
        self.paths, self.twin, self.figures = paths, twin, figures
        self.complete = False
        self._agent: Agent | None = None
        self._newest = 0
        """Step of the newest whole checkpoint; 0: none yet."""
        self._damaged: dict[int, int] = {}
        """Inode of what was damaged on purpose, by step, until the step is committed again."""
        self._damaged_ever: set[int] = set()
        self._deleted: dict[int, int] = {}
        """How often a step had been committed that retention had deleted when a newer one was damaged."""
        self._sound: set[tuple[int, int, int]] = set()
        self._last_place = ""
        self._seen: set[int] = set()

    def go_on(self, kill: Kill | None) -> bool:
        """Start the ranks once, until they are killed or the run is complete; whether they were killed."""
        if kill and kill.place == QUARANTINE:
            self._damage_newest()
        if kill and kill.place == REPLACE:
            self._stop_at_a_step()
        if self.complete:
            return False
        agent = self._start(kill)
        place = self._await(agent, kill)
        codes = agent.codes()
        if codes is None:
            self._leave_agent()
        self._look_at_steps(agent)
        if codes is not None and not any(codes):
            self._end_of_attempt()
            return False
        if not place or (codes and -9 not in codes):
            raise BrokenChainError(f"{self.paths.root}: attempt {agent.attempt} ended with {codes}, killed by nobody")
        assert kill is not None
        self.figures.kills[place, kill.scope] += 1
        self._last_place = place
        self._check()
        return True

    def close(self) -> None:
        """Kill what still runs of it."""
        if self._agent:
            self._agent.kill_all()
            self._agent = None

    # ---- one start

    def _start(self, kill: Kill | None) -> Agent:
        self._agent = self._agent or Agent(self.paths)
        self._agent.start_ranks(kill)
        return self._agent

    def _await(self, agent: Agent, kill: Kill | None) -> str:
        """Until the ranks have ended or are killed; the place of the kill."""
        if kill is None:
            agent.wait(None)
            return ""
        place = MOMENT
        if kill.place != MOMENT:
            note = agent.note() if agent.wait(None) == "noted" else b""
            if not note:
                return ""
            place = kill.place if note == REACHED else ANY
            if kill.delay:
                time.sleep(kill.delay)
        elif agent.wait(kill.delay):
            return ""
        if kill.delay:
            with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                agent.strike(kill)
        return place

    def _stop_at_a_step(self) -> None:
        """Warn the ranks once they have done a step, so that the next start finds a checkpoint without metrics, which
        it commits again.
        """
        agent, before = self._start(None), len(self._records())
        while not agent.wait(SECONDS_BETWEEN_WARNINGS):
            if len(self._records()) > before:
                agent.warn()
        codes = agent.codes()
        if codes is None or any(codes):
            raise BrokenChainError(f"{self.paths.root}: attempt {agent.attempt}, warned, ended with {codes}")
        self._look_at_steps(agent)
        self._last_place = ""
        self._end_of_attempt(warned=True)
        if not self.complete:
            self._check()

    def _end_of_attempt(self, *, warned: bool = False) -> None:
        """The ranks have ended by themselves: the run is complete, or was stopped."""
        assert self._agent
        result = read_record(self.paths.attempt(self._agent.attempt).result, RankResult)
        self._leave_agent()
        self.complete = result.cause == "complete"
        if self.complete:
            self.figures.runs += 1
            found = differences(self.paths, self.twin, warned=warned)
            self.figures.differences += [f"{self.paths.root}: {line}" for line in found]
            self._check()

    def _leave_agent(self) -> None:
        assert self._agent
        self._agent.end()
        self._agent = None

    def _damage_newest(self) -> None:
        """Flip a bit of the newest checkpoint, if another one is there to fall back to."""
        whole = sorted(step for step in self._whole() if step not in self._damaged)
        if len(whole) < 2:
            return
        folder = self.paths.checkpoints / f"step-{whole[-1]}"
        victim = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        with victim.open("r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            last = stream.read(1)[0]
            stream.seek(-1, os.SEEK_END)
            stream.write(bytes([last ^ 1]))
        self._damaged[whole[-1]] = folder.stat().st_ino
        self._damaged_ever.add(folder.stat().st_ino)
        self._newest = whole[-2]
        self._deleted = {step: times for step, times in self._committed().items() if step not in self._whole()}

    # ---- what must be true

    def _records(self) -> list[dict]:
        return records_of(self.paths)

    def _look_at_steps(self, agent: Agent) -> None:
        """The start went on from the newest whole checkpoint; count what it computed again."""
        done = [r for r in self._records() if (r["attempt"], r["restart"]) == (agent.attempt, agent.restart)]
        if done and done[0]["step"] != self._newest + 1:
            self.figures.lost.append(f"{self.paths.root}: went on at {done[0]['step']}, not after {self._newest}")
        steps = [record["step"] for record in done]
        self.figures.steps += len(steps)
        self.figures.recomputed[self._last_place] += sum(step in self._seen for step in steps)
        self._seen.update(steps)

    def _whole(self) -> dict[int, Path]:
        """Folders that are to be whole, by step: the committed, and one that was set aside by a killed commit."""
        names = [path.name for path in self.paths.checkpoints.iterdir()]
        found = {int(match[1]): match[0] for match in map(SET_ASIDE.fullmatch, names) if match}
        found |= {int(match[1]): match[0] for match in map(COMMITTED.fullmatch, names) if match}
        return {step: self.paths.checkpoints / name for step, name in found.items()}

    def _check(self) -> None:
        """After a kill: everything committed reads back as the twin's, and nothing committed is missing."""
        whole = self._whole()
        for step, folder in sorted(whole.items()):
            facts = folder.stat()
            if self._damaged.get(step) == facts.st_ino:
                continue
            self._damaged.pop(step, None)
            if (step, facts.st_ino, facts.st_mtime_ns) not in self._sound:
                self._compare(step, folder)
                self._sound.add((step, facts.st_ino, facts.st_mtime_ns))
        self._newest = max((step for step in whole if step not in self._damaged), default=0)
        committed = max(
            (
                step
                for step, times in self._committed().items()
                if step not in self._damaged and self._deleted.get(step) != times
            ),
            default=0,
        )
        if committed > self._newest:
            self.figures.lost.append(
                f"{self.paths.root}: step-{committed} was committed, step-{self._newest} is newest"
            )
        for average in self.paths.checkpoints.glob("average-*"):
            try:
                verify(average)
            except CheckpointError as error:
                self.figures.broken.append(f"{self.paths.root}: {error}")
        self._look_at_quarantine()

    def _compare(self, step: int, folder: Path) -> None:
        self.figures.checked += 1
        try:
            same = logical_digest(folder) == self.twin.digests.get(step, "not made")
        except CheckpointError as error:
            self.figures.broken.append(f"{self.paths.root}: {error}")
            return
        if not same and step in self.twin.digests:
            self.figures.differences.append(f"{folder}: another state than the twin's at that step")

    def _committed(self) -> Counter[int]:
        """How often the commit of a step was told in the ledger."""
        ledgers = [self.paths.attempt(number).events("rank-0") for number in self.paths.attempt_numbers()]
        entries = [entry for ledger in ledgers for entry in read_json_lines(ledger)]
        return Counter(entry["step"] for entry in entries if entry["event"] == "saved")

    def _look_at_quarantine(self) -> None:
        shelf = self.paths.checkpoints / "quarantine"
        moved = {path.stat().st_ino: path for path in shelf.iterdir()} if shelf.is_dir() else {}
        for inode in moved.keys() - self._damaged_ever:
            line = f"{moved[inode]}: moved away although nobody damaged it"
            if line not in self.figures.alarms:
                self.figures.alarms.append(line)
        if self.complete:
            self.figures.quarantined += len(moved.keys() & self._damaged_ever)
