"""Loaded once by the forkserver, so that every rank, and every restarted one, starts with its imports done.

The signals that ask to save are ignored here and in every rank, until it has something to save and listens.
"""

import gc
import signal

signal.signal(signal.SIGUSR2, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)

gc.disable()  # what is imported stays: looking for garbage among it costs a tenth of the time
import submitit.core.submission  # noqa: E402, F401 - a forked rank imports its parent's main module

import encdec.training.rank  # noqa: E402, F401

gc.freeze()  # and keeps the pages that forks share from being touched by their collectors
gc.enable()
