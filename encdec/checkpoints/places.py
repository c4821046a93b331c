"""Where a mirror lies: a folder, or anything that fsspec has a file system for.

A folder can be renamed, so a checkpoint is copied under a temporary name first. An object store cannot: there the
manifest is written last and deleted first, and a folder without a manifest is no checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from encdec import files
from encdec.checkpoints.manifest import MANIFEST, STEP_FOLDER
from encdec.errors import ConfigError, EncdecError, MirrorError
from encdec.training.rules import require_no_password

UNFINISHED = ".tmp-mirror"


class Place:
    """A folder of checkpoints by path or URL: the few things a mirror does there.

    Args:
        target: a path, or an fsspec URL such as ``s3://bucket/runs/a`` (its package must be installed).

    Raises:
        ConfigError: no such file system, or a password in the URL.
    """

    def __init__(self, target: str | Path) -> None:
        self.name = str(target)
        require_no_password("The address of a mirror", self.name)
        try:
            kind = fsspec.get_filesystem_class(fsspec.core.split_protocol(self.name)[0] or "file")
        except (ImportError, ValueError) as error:
            raise ConfigError(
                "A mirror must be a path, or a URL that fsspec knows",
                found=f"{self.name} ({' '.join(str(error).split())})",
                remedy="Correct it, or install the package that it names",
            ) from None
        self.root: str = kind._strip_protocol(self.name).rstrip("/")
        self.renames = issubclass(kind, LocalFileSystem)

    @functools.cached_property
    def fs(self) -> Any:
        """The file system; some connect when they are made, so not before it is needed."""
        return fsspec.core.url_to_fs(self.name)[0]

    @contextlib.contextmanager
    def reached(self) -> Iterator[None]:
        """Around whatever touches the place.

        Raises:
            MirrorError: it does not answer, or refuses.
        """
        try:
            yield
        except EncdecError:
            raise
        except Exception as error:  # not all file systems of fsspec keep to OSError
            raise MirrorError(
                f"The mirror {self.name} must answer and take what it is given",
                found=f"{type(error).__name__}: {' '.join(str(error).split())}",
                remedy="Mend that and copy again; what is there already is not copied twice",
            ) from error

    def steps(self) -> list[int]:
        """Steps of the folders that may hold a checkpoint, ascending."""
        return sorted(int(match.group(1)) for match in map(STEP_FOLDER.fullmatch, self.names()) if match)

    def names(self) -> list[str]:
        """Names of all folders there."""
        self.fs.invalidate_cache()
        try:
            entries: list[dict[str, Any]] = self.fs.ls(self.root, detail=True)
        except FileNotFoundError:
            return []
        return [entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry["type"] == "directory"]

    def path(self, step: int, name: str = "") -> str:
        """Of a committed checkpoint, or of a file in it."""
        return f"{self.root}/step-{step}" + (f"/{name}" if name else "")

    def working_path(self, step: int, name: str = "") -> str:
        """Of a checkpoint while it is being copied there, or of a file in it."""
        return f"{self.root}/step-{step}{UNFINISHED if self.renames else ''}" + (f"/{name}" if name else "")

    def manifest_text(self, step: int) -> str | None:
        """Of a committed checkpoint; None where there is none, which is no checkpoint then."""
        try:
            return self.fs.cat_file(self.path(step, MANIFEST)).decode("utf-8", errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def begin(self, step: int) -> None:
        """Before files of a step are written: what was committed under its name stays whole, or is none any more."""
        if self.renames:
            files.make_private(Path(self.root))
            files.make_private(Path(self.working_path(step)))
        else:
            self.uncommit(step)

    def sizes(self, folder: str) -> dict[str, int]:
        """Every file under ``folder``: path relative to it -> bytes."""
        self.fs.invalidate_cache()
        found = self.fs.find(folder, detail=True)
        return {name[len(folder) + 1 :]: int(info["size"]) for name, info in found.items()}

    def commit(self, step: int, manifest_text: str) -> None:
        """Make the files written so far a checkpoint."""
        self.fs.pipe_file(self.working_path(step, MANIFEST), manifest_text.encode())
        if not self.renames:
            return
        work, final = Path(self.working_path(step)), Path(self.path(step))
        for path in (work, *work.rglob("*")):
            path.chmod(0o700 if path.is_dir() else 0o600)
        files.fsync_tree(work)
        replaced = self._set_aside(final) if os.path.lexists(final) else None
        os.rename(work, final)
        files.fsync_directory(work.parent)
        if replaced:
            self.fs.rm(str(replaced), recursive=True)

    def uncommit(self, step: int) -> None:
        """Take the manifest away, so that what is left is no checkpoint."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path(step, MANIFEST))

    def delete(self, step: int) -> None:
        """Remove a checkpoint; killed meanwhile, it leaves none."""
        if self.renames:
            self.fs.rm(str(self._set_aside(Path(self.path(step)))), recursive=True)
            return
        self.uncommit(step)
        self.fs.rm(self.path(step), recursive=True)

    @staticmethod
    def _set_aside(folder: Path) -> Path:
        aside = folder.with_name(f"{folder.name}.tmp-deleted-{os.getpid()}")
        os.rename(folder, aside)
        return aside

    def delete_unfinished(self, before: int) -> None:
        """Remove what copies of steps before ``before`` left when they were cut off."""
        for name in self.names():
            step = STEP_FOLDER.match(name)
            if not step or int(step.group(1)) >= before:
                continue
            if ".tmp-" in name or (not self.renames and not self.fs.exists(f"{self.root}/{name}/{MANIFEST}")):
                self.fs.rm(f"{self.root}/{name}", recursive=True)
