"""What a run needs of storage: room for its text and checkpoints, and a sound checkpoint to go on from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from encdec.files import RunPaths
from encdec.training.model_sizes import model_size
from encdec.training.run_config import RunConfig
from launchers.planning.footprint import average_bytes, most_checkpoints, most_files, packed_bytes
from launchers.preflight.check import Check, amount


def check_place(paths: RunPaths) -> Check:
    """Whether the run directory lies there and can be written, or can be made; asked by looking, not by writing."""
    first = next(place for place in (paths.root, *paths.root.parents) if place.exists() or place.is_symlink())
    if not first.is_dir():
        return Check("directory", "fail", f"{first} is no folder", "Choose another --run-dir")
    if not os.access(first, os.W_OK | os.X_OK):
        return Check("directory", "fail", f"{first} may not be written", "Open it, or choose another --run-dir")
    return Check("directory", "ok", str(paths.root) if first == paths.root else f"{paths.root}, made in {first}")


def check_room(run: RunConfig, paths: RunPaths) -> list[Check]:
    """Free bytes and inodes where the run directory lies or will lie, against all checkpoints at their most.

    A quota that the file system does not count as free space is not seen.
    """
    place = _existing(paths.root)
    room, count = os.statvfs(place), most_checkpoints(run)
    checks = [_check_bytes(run, paths, place, room.f_bavail * room.f_frsize, count)]
    files = most_files(run)
    if room.f_files:  # file systems that make inodes as they go report 0
        said = f"{files:,} files and folders at most, {room.f_favail:,} inodes free"
        enough = files <= room.f_favail
        checks.append(
            Check("inodes", "ok", said)
            if enough
            else Check("inodes", "fail", said, "Delete small files there, or choose another --run-dir")
        )
    return [*checks, *_check_packed(run)]


def _check_packed(run: RunConfig) -> list[Check]:
    """Text from a hub is packed whole before training; how much it has is not known here, what is read of it is."""
    data = run.config.data
    size = model_size(run.config.model)
    if data.dataset_name == "python-stdlib" or Path(data.dataset_name).exists() or size is None:
        return []
    place = _existing(Path(data.packed_dir))
    room = os.statvfs(place)
    free, tokens = room.f_bavail * room.f_frsize, run.num_train_steps * run.tokens_per_step
    needed = packed_bytes(run, size)
    said = f"{tokens:,} tokens that this run reads take {amount(needed)} once packed, {amount(free)} free in {place}"
    if needed <= free:
        return [Check("packed text", "ok", said)]
    remedy = "Free space there, set data.packed_dir, or bound the text with data.max_examples: it is then read again"
    return [Check("packed text", "warn", f"{said}, if it is not packed yet", remedy)]


def _existing(path: Path) -> Path:
    """``path``, or the folder above it in which it will be made."""
    return next(place for place in (path, *path.parents) if place.is_dir())


def _check_bytes(run: RunConfig, paths: RunPaths, place: Path, free: int, count: int) -> Check:
    size = model_size(run.config.model)
    if size is None:
        return Check(
            "disk", "warn", f"{amount(free)} free in {place}; what a checkpoint takes is not known here",
            f"Have room for {count} of them",
        )  # fmt: skip
    each = size.checkpoint_bytes(run.config.training.optimizer)
    average = average_bytes(run, size)
    there = sum(file.stat().st_size for file in paths.checkpoints.rglob("*") if file.is_file())
    needed = max(0, count * each + average - there)
    said = (
        f"{amount(needed)} more at most ({count} checkpoints of {amount(each)} and an average), "
        f"{amount(free)} free in {place}"
    )
    if needed <= free:
        return Check("disk", "ok", said)
    return Check(
        "disk",
        "fail",
        said,
        "Free space, choose another --run-dir, or lower training.save_total_limit and average_last",
    )


def check_resume(run: RunConfig, paths: RunPaths, resume: Path | None) -> Check:
    """The checkpoint that the run goes on from: its manifest can be read, and its files are as large as that says."""
    if resume is not None:
        problem = damage(resume)
        if problem:
            return Check(
                "resume", "fail", f"{resume}: {problem}", "Give another checkpoint: encdec.checkpoints list RUN"
            )
        return Check("resume", "ok", _described(resume, run))
    steps = sorted(
        (path for path in paths.checkpoints.glob("step-*") if path.name.removeprefix("step-").isdecimal()),
        key=lambda path: int(path.name.removeprefix("step-")), reverse=True,
    )  # fmt: skip
    if not steps:
        return Check("resume", "ok", "no checkpoint yet: the run begins anew")
    bad: list[str] = []
    for path in steps:
        problem = damage(path)
        if problem is None:
            if bad:
                said = f"{'; '.join(bad)}; {_described(path, run)}"
                return Check(
                    "resume", "warn", said, "Restore what is newer from a mirror, or let the run compute it again"
                )
            return Check("resume", "ok", _described(path, run))
        bad.append(f"{path.name}: {problem}")
    return Check("resume", "fail", "; ".join(bad), "Restore one from a mirror, or make a new run with --resume never")


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's manifest, or with the sizes of its files; None if nothing is.

    Contents are compared by python -m encdec.checkpoints verify, and at the start of the run.
    """
    try:
        manifest = _manifest(folder)
        records = [(str(record["path"]), int(record["bytes"])) for record in manifest["files"]]
    except OSError as error:
        return f"no readable manifest ({error.strerror})"
    except (ValueError, KeyError, TypeError):
        return "its manifest is damaged"
    for name, size in records:
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} bytes instead of {size:,}"
    return None


def _manifest(folder: Path) -> dict[str, Any]:
    """Plain values; the package that writes them loads torch."""
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def _described(folder: Path, run: RunConfig) -> str:
    manifest = _manifest(folder)
    size = sum(record["bytes"] for record in manifest["files"])
    own = manifest.get("run_identity") in ("", run.identity)
    return (
        f"goes on from {folder.name}, {amount(size)}, of {manifest.get('world_size')} ranks"
        f"{'' if own else ' and another configuration'}; all sizes match"
    )
