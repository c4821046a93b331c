"""A whole run of a user who is not root, anywhere: submitted, warned, requeued, finished."""

from __future__ import annotations

import pwd
import shlex
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from encdec.files import RunPaths
from launchers.sandbox.cluster import Sandbox
from tests.conftest import REPOSITORY, Lab, wait_for_step
from tests.slurm.conftest import Cluster, Run, outcome

pytestmark = pytest.mark.slurm

USER = "nobody"
NEEDED = tuple(dict.fromkeys(Path(folder).resolve() for folder in (sys.base_prefix, sys.prefix, REPOSITORY)))
"""What a job reads that lies on this machine: Python, its packages, the checkout."""


def closed_way(folder: Path) -> Path | None:
    """The first folder on the way to ``folder`` that other users may not enter."""
    return next((above for above in reversed(folder.parents) if not above.stat().st_mode & stat.S_IXOTH), None)


def opening(needed: dict[Path, Path], staging: Path) -> str:
    """Shell lines that open the way to folders for every user, in the mount namespace where they run: over each closed
    folder comes an empty one, and beneath that what is needed again.

    Args:
        needed: folder -> the closed one on the way to it.
        staging: where the folders are kept meanwhile.
    """
    kept = {folder: staging / str(number) for number, folder in enumerate(needed)}
    lines = ["set -e; umask 022"]
    lines += [f"mkdir -p {place}; mount --bind {shlex.quote(str(folder))} {place}" for folder, place in kept.items()]
    lines += [f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(closed))}" for closed in set(needed.values())]
    for folder, place in kept.items():
        name = shlex.quote(str(folder))
        lines.append(f"mkdir -p {name}; mount --bind {place} {name}; umount {place}")
    return "\n".join(lines)


@pytest.fixture
def become(sandbox: Sandbox, workspace: Path) -> Iterator[tuple[str, ...]]:
    """Words before a command that make its process the user's, for whom the way to NEEDED is open, on the nodes too."""
    shut = [folder for folder in NEEDED if not folder.stat().st_mode & stat.S_IXOTH]
    if shut:
        pytest.skip(f"other users may not enter {shut[0]} itself: chmod o+rx it")
    needed = {folder: closed for folder in NEEDED if (closed := closed_way(folder))}
    script = opening(needed, workspace / "staging")
    nodes = sandbox.layout.blueprint().shape.names
    account = pwd.getpwnam(USER)
    drop = f"exec setpriv --reuid={account.pw_uid} --regid={account.pw_gid} --clear-groups"
    home = f"env --chdir={shlex.quote(str(REPOSITORY))} HOME={workspace}"
    opened: list[str] = []
    try:
        for node in nodes:
            subprocess.run(sandbox.inside(node, ["sh", "-c", script]), check=True)
            opened.append(node)
        yield ("unshare", "--mount", "sh", "-c", f'{script}\n{drop} {home} "$@"', "sh")
    finally:
        covers = [word for closed in set(needed.values()) for word in ("--recursive", "--lazy", str(closed))]
        for node in covers and opened:
            subprocess.run(sandbox.inside(node, ["umount", *covers]), check=True)


def test_whole_run_of_an_ordinary_user(
    lab: Lab, sandbox: Sandbox, workspace: Path, become: tuple[str, ...], eventually: Callable[..., None],
    twin: RunPaths, twin_digest: str,
):  # fmt: skip
    own = Lab(workspace, workspace / "packed", lab.started)
    run = Run(Cluster(own, sandbox, USER, become), eventually)
    wait_for_step(run.paths, 10)
    run.warn()
    run.lift_hold()
    run.ends_like(twin, twin_digest)
    assert [outcome(run.paths, attempt)["cause"] for attempt in (0, 1)] == ["signalled", "complete"]
    run.eventually(lambda: run.cluster.history(run.job) == ["REQUEUED", "COMPLETED"], 10)
    written = [run.paths.root, *run.paths.root.rglob("*"), *own.packed.rglob("*")]
    assert {path.lstat().st_uid for path in written} == {pwd.getpwnam(USER).pw_uid}
    assert not run.paths.root.stat().st_mode & stat.S_IRWXO  # so nobody else gets at anything in it
    stranger = subprocess.run(
        ["find", str(run.paths.root), "-type", "f"], user="daemon", capture_output=True, text=True, check=False
    )
    assert stranger.stdout == "" and "Permission denied" in stranger.stderr
