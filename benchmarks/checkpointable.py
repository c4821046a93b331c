"""What a careful user of submitit writes around the same rank program: a Checkpointable that resubmits itself.

The ranks are the tasks of the job, in process. A warned program saves, as it does under our launcher; after that
submitit's own handler runs: checkpoint(), a new pickle, ``scontrol requeue``. The module is small, because every task
imports it.
"""

from __future__ import annotations

import signal

from submitit.helpers import Checkpointable, TorchDistributedEnvironment

from encdec.errors import ExitCode


class Training(Checkpointable):
    """One attempt at ``encdec.train`` with these arguments, as one rank."""

    def __init__(self, *arguments: str) -> None:
        self.arguments = arguments

    def __call__(self) -> int:
        resubmit = signal.getsignal(signal.SIGUSR2)  # submitit's; the program is about to lay its own over it
        signal.pthread_sigmask(
            signal.SIG_BLOCK, {signal.SIGTERM}
        )  # submitit heeds none: a cancelled job must not return
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        from encdec.train import main

        code = main(list(self.arguments))
        if code == ExitCode.CONTINUE_ME and callable(resubmit):
            resubmit(signal.SIGUSR2, None)
        return code
