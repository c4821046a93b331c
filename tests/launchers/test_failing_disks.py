"""Runs on disks that fail or are slow: real file systems on loop devices, failed and slowed by the kernel itself."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from encdec.checkpoints import CheckpointManager
from encdec.files import RunPaths
from encdec.records import read_json_lines
from tests.conftest import Lab, kill_everything, losses, ranks_of, wait_for_step, wait_until

THROTTLES = Path("/sys/fs/cgroup/blkio")
"""Where cgroup v1 limits a device's bytes a second."""
THROTTLED = "encdec-slow-disk"
SLOW_BYTES_PER_SECOND = 400_000
"""About one checkpoint of the micro model a second."""


@dataclass
class Disk:
    """An ext4 file system of 64 MB on a loop device, mounted at ``place``."""

    image: Path
    place: Path
    mount: Callable[..., None]

    def open(self) -> None:
        self.mount("-o", "loop,errors=remount-ro", str(self.image), str(self.place))

    @contextlib.contextmanager
    def slowed(self, pids: list[int], bytes_per_second: int) -> Iterator[None]:
        """Inside, what these processes write to it is throttled; skips where nothing can do that."""
        group = THROTTLES / f"{THROTTLED}-{os.getpid()}"
        if not (THROTTLES / "blkio.throttle.write_bps_device").exists():
            pytest.skip("needs cgroup v1's blkio throttles")
        group.mkdir()
        numbers = Path("/sys/block", self.device, "dev").read_text().strip()
        (group / "blkio.throttle.write_bps_device").write_text(f"{numbers} {bytes_per_second}")
        try:
            for pid in pids:
                (group / "cgroup.procs").write_text(str(pid))
            yield
        finally:
            for left in (group / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    (THROTTLES / "cgroup.procs").write_text(left)
            group.rmdir()

    @property
    def device(self) -> str:
        """Its name below /dev."""
        [line] = [line for line in Path("/proc/mounts").read_text().splitlines() if f" {self.place} " in line]
        return Path(line.split()[0]).name

    def fail(self) -> None:
        """As an error of the hardware: the kernel lets nothing more be written, whatever files are open."""
        Path("/sys/fs/ext4", self.device, "trigger_fs_error").write_text("1")

    def mend(self) -> None:
        """What was on it, on a new one: the old one may still be mounted where another process looks at mounts."""
        wait_until(lambda: subprocess.run(["umount", str(self.place)]).returncode == 0, "nothing runs on it any more")
        failed, self.image = self.image, self.image.with_name("new-image")
        shutil.copyfile(failed, self.image)
        assert subprocess.run(["e2fsck", "-fy", str(self.image)], capture_output=True).returncode < 4
        self.open()


@pytest.fixture
def disk(tmp_path: Path, mounts: Callable[..., None]) -> Disk:
    made = Disk(tmp_path / "image", tmp_path / "disk", mounts)
    made.place.mkdir()
    if not shutil.which("mkfs.ext4"):
        pytest.skip("needs mkfs.ext4")
    with made.image.open("wb") as image:
        image.truncate(64 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(made.image)], check=True)
    try:
        made.open()
    except subprocess.CalledProcessError:
        pytest.skip("needs loop devices")
    return made


def test_disk_that_fails_mid_run(lab: Lab, twin: RunPaths, twin_digest: str, disk: Disk):
    paths = RunPaths(disk.place / "run")
    process = lab.start_submit(paths.root)
    wait_for_step(paths, 20)
    disk.fail()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    said = " ".join(output.replace("│", " ").split())
    assert "Read-only file system" in said
    assert "give the same command again" in said
    assert "Traceback" not in output
    CheckpointManager(paths.checkpoints).validate("step-15")
    disk.mend()
    CheckpointManager(paths.checkpoints).validate("step-15")
    code, output = lab.submit(paths.root)
    assert code == 0, output
    assert lab.digest(paths.checkpoints / "step-60") == twin_digest
    assert losses(paths) == losses(twin)


def test_slow_disk_holds_nothing_up_but_the_commit(lab: Lab, twin: RunPaths, twin_digest: str, disk: Disk):
    """Training goes on beside a save that takes long; a kill amid it costs the steps since the one before."""
    paths = RunPaths(disk.place / "run")
    process = lab.start_submit(paths.root)
    wait_for_step(paths, 1)
    with disk.slowed([rank.pid for rank in ranks_of(paths)], SLOW_BYTES_PER_SECOND):
        wait_until(lambda: list(paths.checkpoints.glob("step-30.tmp-0")), "the second save has begun")
        kill_everything(paths)
    process.communicate(timeout=60)
    events = list(read_json_lines(paths.attempt(0).events("rank-0")))
    [saved] = [entry for entry in events if entry["event"] == "saved"]
    assert saved["checkpoint"] == "step-15"
    [info] = CheckpointManager(paths.checkpoints).list_checkpoints()
    assert saved["seconds"] >= 0.5 * info.bytes / SLOW_BYTES_PER_SECOND  # it was slow indeed
    code, output = lab.submit(paths.root)
    assert code == 0, output
    assert min(record["step"] for record in read_json_lines(paths.attempt(1).steps)) == 16
    assert lab.digest(paths.checkpoints / "step-60") == twin_digest
    assert losses(paths) == losses(twin)
