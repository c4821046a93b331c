"""Storage that takes no more: the run ends with a word about it, and continues once there is room."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from encdec.errors import EncdecError
from encdec.files import RunPaths, atomic_write_text
from encdec.training import storage
from tests.conftest import REPOSITORY, Lab, losses

RULE = "The run directory must take checkpoints and records"
FULL = os.strerror(errno.ENOSPC)
ROOM_BESIDE_THE_CODE = 500_000
"""Bytes that hold a run directory's small files, but not a checkpoint of the micro model."""
ROOM_FOR_SMALL_FILES = 100_000


@pytest.mark.parametrize("number", sorted(storage.MENDABLE))
def test_error_names_rule_reason_place_and_room(tmp_path: Path, number: int):
    missing = tmp_path / "not" / "yet"
    with pytest.raises(EncdecError) as caught, storage.explained("It must take this", missing):
        raise OSError(number, os.strerror(number), "some/file")
    assert caught.value.exit_code == 1
    for word in ("It must take this", os.strerror(number), "some/file", f"bytes free in {tmp_path}", "same command"):
        assert word in str(caught.value)


def test_error_of_another_kind_stays_what_it_is(tmp_path: Path):
    with pytest.raises(ProcessLookupError), storage.explained("It must take this", tmp_path):
        raise ProcessLookupError(errno.ESRCH, "no such process")


def test_run_on_a_full_disk_says_so_and_continues_when_there_is_room(
    lab: Lab, twin: RunPaths, tmp_path: Path, mounts: Callable[..., None]
):
    disk = tmp_path / "disk"
    disk.mkdir()
    code = sum(512 * path.stat().st_blocks for path in twin.code.rglob("*"))
    room = code + ROOM_BESIDE_THE_CODE  # for a run directory, not for its first checkpoint
    mounts("-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(disk))
    paths = RunPaths(disk / "run")
    require_told(paths, FULL, *lab.submit(paths.root))
    mounts("-o", f"remount,size={100 * room}", str(disk))
    require_continued(paths, twin, *lab.submit(paths.root))


def test_run_under_a_limit_of_file_size_says_so_and_continues_without(lab: Lab, twin: RunPaths, tmp_path: Path):
    """As on a full disk, where nobody is root: setrlimit(2) lets no file of a checkpoint be as large as it is."""
    paths = RunPaths(tmp_path / "run")
    arguments = ("--phase", "sanity_check", "--cluster", "local", "--run-dir", str(paths.root), *lab.arguments())
    limited = ("prlimit", f"--fsize={ROOM_FOR_SMALL_FILES}", sys.executable)
    require_told(paths, os.strerror(errno.EFBIG), *lab.run("launchers.submit", *arguments, launcher=limited))
    require_continued(paths, twin, *lab.submit(paths.root))


def require_told(paths: RunPaths, reason: str, code: int, output: str) -> None:
    assert code == 1, output
    assert RULE in " ".join(output.replace("│", " ").split())
    assert "Traceback" not in output
    outcome = json.loads(paths.attempt(0).outcome.read_text())
    assert (outcome["cause"], outcome["exit_code"], outcome["restarts"]) == ("crash", 1, 0)
    assert reason in outcome["message"]
    assert "bytes free" in outcome["message"]


def require_continued(paths: RunPaths, twin: RunPaths, code: int, output: str) -> None:
    assert code == 0, output
    assert losses(paths) == losses(twin)


REFUSE = """
import resource
import sys
from pathlib import Path
from encdec.errors import ConfigError
from encdec.files import RunPaths
from encdec.training.rank import refuse, start_log
start_log()
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
refuse(RunPaths(Path(sys.argv[1])), 0, ConfigError("This must hold", found="that", remedy="Mend it"))
"""


def refuse_where_files_may_have(size: int, paths: RunPaths) -> subprocess.CompletedProcess[str]:
    """``rank.refuse`` in a process that cannot write beyond byte ``size`` of any file."""
    command = [sys.executable, "-c", REFUSE, str(paths.root), str(size)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_refusal_survives_a_report_that_cannot_be_written(tmp_path: Path):
    paths = RunPaths(tmp_path)
    paths.make()
    paths.claim_attempt()
    unfinished = paths.checkpoints / "step-5.tmp-0"
    finished = paths.checkpoints / "step-4"
    for folder in (unfinished, finished):
        folder.mkdir()
        atomic_write_text(folder / "part", "x" * 100)
    done = refuse_where_files_may_have(0, paths)
    assert done.returncode == 78
    assert "This must hold, found that. Mend it." in done.stderr
    assert "Traceback" not in done.stderr
    assert not paths.attempt(0).error.exists()
    assert not unfinished.exists()  # what it takes up is the first room to be had
    assert finished.exists()
    assert refuse_where_files_may_have(10_000, paths).returncode == 78
    assert json.loads(paths.attempt(0).error.read_text())["exit_code"] == 78


def test_packed_text_that_cannot_be_written_is_told(lab: Lab, tmp_path: Path):
    (tmp_path / "file").write_text("no folder")
    lab = Lab(tmp_path, tmp_path / "file" / "packed")
    arguments = ("--output_dir", str(tmp_path / "run"), *lab.arguments("--set", "infra.num_gpus=1"))
    code, output = lab.run("encdec.train", *arguments)
    assert code == 1
    assert f"data.packed_dir must take it, found {os.strerror(errno.ENOTDIR)} at {tmp_path / 'file'}" in output
    assert "Traceback" not in output
