"""Loaded first by the forkserver, so that every rank starts with its imports done.

A cluster's warning signal reaches the helper processes too and would kill those without a handler: they ignore it.
Ranks start with it ignored and install their own handler at once.
"""

import signal

signal.signal(signal.SIGUSR2, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
