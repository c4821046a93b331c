"""Loaded once by the forkserver, so that every rank, and every restarted one, starts with its imports done.

The signals that ask to save are ignored here and in every rank, until it has something to save and listens.
"""

import gc
import signal
from pathlib import Path

signal.signal(signal.SIGUSR2, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)

gc.disable()  # what is imported stays: looking for garbage among it costs a tenth of the time
import transformers.utils.import_utils as lazy_imports  # noqa: E402


def read_models_once() -> None:
    """transformers reads the sources of all its models twice, 0.7 s each time: its cache takes a folder and the
    ``__init__.py`` in it, which mean the same to it, for two things.
    """
    read = getattr(lazy_imports, "create_import_structure_from_path", None)
    if read is not None:
        lazy_imports.create_import_structure_from_path = lambda path: read(
            Path(path).parent if Path(path).name == "__init__.py" else Path(path)
        )


read_models_once()
import submitit.core.submission  # noqa: E402, F401 - a forked rank imports its parent's main module

import encdec.train  # noqa: E402, F401

gc.freeze()  # and keeps the pages that forks share from being touched by their collectors
gc.enable()
