"""Shell metacharacters in what users control are inert: hypothesis draws hostile fields, a real bash runs the scripts.

python -m benchmarks.inertness --cases 100000

Each case is a run directory, sbatch flags, variables, arguments of srun and a PYTHONPATH, as a command line and a
cluster's file may give them. Both scripts that are made of them run in an empty folder where bash finds no programs
and ``srun`` writes down its words: it must get exactly what was asked for, its variables too, the shell must have
nothing to complain of, and the folder must stay empty.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from encdec.command_line import Parser
from encdec.files import RunPaths
from encdec.training.run_config import RunConfig, resolve_run
from launchers.cluster_file import ClusterFile
from launchers.script import JobRequest, job_text, made_inside, sbatch_text, srun_arguments

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "tiny.yaml"
FRAGMENTS = (
    "$(>sang)", "`>sang`", "; >sang;", "& >sang &", "| >sang", "\n>sang\n", "${x:=$(>sang)}", "$((x[$(>sang)]))",
    "<(>sang)", "' >sang '", '" >sang "', "'\"'\"' >sang '", "\\' >sang", "#", "#SBATCH --wrap=>sang",
    "\n#SBATCH --wrap=>sang\n", "$HOME", "~", "*", "?", "[a]", "{a,b}", "!!", "!x", "\\", "\\\n", "$'\\n>sang'",
    "EOF\n>sang\n", "() { :; }; >sang", "%", "--help", "-c", " ", "\t", "\r", "é", "💥", "\u2028", "a=b", "exit 1",
)  # fmt: skip
"""What would leave a file behind, end the script, or change a word, if a shell read it."""
NAMES = ("partition", "account", "qos", "constraint", "reservation", "exclude", "mem", "comment-of-mine", "gres")
DEAF_WORDS = ["sh", "-c", 'trap "" USR2; exec "$@"', "sh"]
MARK = "the environment:"
SRUN = f"""() {{ printf '%s\\0' "$@" '{MARK}' "$HOSTILE" "$PYTHONPATH"; }}"""
"""In srun's place, as an exported function of bash."""


@dataclass(frozen=True)
class Case:
    """What users give."""

    directory: str
    """Name of the run directory."""
    flags: dict[str, str]
    variable: str
    srun_args: list[str]
    pythonpath: str


def texts(refused: str = "", *, printable: bool = False) -> st.SearchStrategy[str]:
    """Hostile fragments and any characters, without those that are refused."""
    any_character = st.characters(codec="utf-8", exclude_characters="\0" + refused)
    text = st.lists(st.sampled_from(FRAGMENTS) | any_character, min_size=1, max_size=8).map("".join)
    text = text.map(lambda value: "".join(c for c in value if c not in refused + "\0"))
    if printable:
        text = text.map(lambda value: "".join(c for c in value if c.isprintable()))
    return text.filter(bool)


CASES = st.builds(
    Case,
    directory=texts("/:%\\", printable=True).filter(lambda name: name not in (".", "..") and len(name.encode()) < 200),
    flags=st.dictionaries(st.sampled_from(NAMES), texts(printable=True), max_size=3),
    variable=texts(),
    srun_args=st.lists(texts(printable=True), max_size=2),
    pythonpath=texts() | st.just(""),
)


class Shell:
    """Runs the scripts of cases in a folder of its own.

    Args:
        folder: an empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.empty, self.runs = folder / "empty", folder / "runs"
        self.empty.mkdir()
        self.runs.mkdir()
        self.run: RunConfig = resolve_run(None, config_file=CONFIG, name="hostile")
        self.count = 0

    def check(self, case: Case) -> None:
        """Run both scripts of a case.

        Raises:
            AssertionError: something was not inert.
        """
        self.count += 1
        paths = RunPaths(self.runs / f"{self.count % 1000}" / case.directory)
        paths.submitit.mkdir(parents=True, exist_ok=True)
        cluster = ClusterFile(environment={"HOSTILE": case.variable}, srun_args=case.srun_args)
        request = JobRequest(
            paths=paths, run=self.run, cluster=cluster, flags=case.flags, lead_seconds=120, submission="12",
            python="/usr/bin/python3", pythonpath=case.pythonpath,
        )  # fmt: skip
        path = os.pathsep.join(filter(None, [str(paths.code), case.pythonpath]))
        srun = ["--unbuffered", "--output", f"{paths.submitit}/%j_%t_log.out", *srun_arguments(request), *DEAF_WORDS]
        python = ["/usr/bin/python3", "-u", "-m"]
        for text, program in (
            (sbatch_text(request), ["submitit.core._submit", str(paths.submitit)]),
            (job_text(request, made_inside("12")), ["launchers.job", str(paths.root)]),
        ):
            require_header(text, case.flags)
            self._require_words(text, [*srun, *python, *program, MARK, case.variable, path])
        assert not list(self.empty.iterdir()), "a file was left behind"
        (paths.batch_host("7")).unlink()

    def _require_words(self, text: str, words: Sequence[str]) -> None:
        environment = {
            "BASH_FUNC_srun%%": SRUN, "PATH": str(self.empty), "SLURM_JOB_ID": "7", "LC_ALL": "C.UTF-8",
            "HOME": "/root", "HOSTNAME": "n1",
        }  # fmt: skip
        done = subprocess.run(
            ["/bin/bash"], input=text.encode(), capture_output=True, env=environment, cwd=self.empty, check=False,
            timeout=60,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, b""), (done.returncode, done.stderr)
        found = done.stdout.decode().split("\0")[:-1]
        assert found == list(words), (found, words)


def require_header(text: str, flags: dict[str, str]) -> None:
    """What sbatch reads, up to the first command, are the flags that were asked for and the launcher's own, a line
    each.
    """
    header = takewhile(lambda line: not line.strip() or line.startswith("#"), text.split("\n"))
    lines = [line for line in header if line.startswith("#SBATCH")]
    read = [shlex.split(line.removeprefix("#SBATCH "), comments=False) for line in lines]
    assert all(len(words) == 1 for words in read), read
    own = {
        "comment", "cpus-per-task", "job-name", "nodes", "ntasks-per-node", "open-mode", "output", "requeue", "signal",
    }  # fmt: skip
    given = {word.partition("=")[0].removeprefix("--"): word.partition("=")[2] for [word] in read}
    assert given.keys() == own | flags.keys(), given.keys()
    assert {name: given[name] for name in flags} == flags


def prove(cases: int, check: Callable[[Case], None]) -> None:
    """Draw and check so many cases.

    Raises:
        AssertionError: for the smallest case that is not inert.
    """

    @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(CASES)
    def every(case: Case) -> None:
        check(case)

    every()


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.inertness", description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000, help="cases to draw (default: 100000)")
    arguments: argparse.Namespace = parser.parse_args(argv)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="inertness-") as folder:
        shell = Shell(Path(folder))
        prove(arguments.cases, shell.check)
    print(f"{shell.count:,} cases, 2 scripts each, all inert, in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
