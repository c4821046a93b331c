"""python -m launchers.submit --phase PHASE: plan, package and run one phase, here or on a cluster."""

from __future__ import annotations

import sys
from argparse import Namespace

from encdec.errors import EncdecError
from encdec.files import RunPaths
from encdec.training.execution import TrainingPhase
from encdec.training.run_config import require_same_run, resolve_run
from launchers import show
from launchers.arguments import parse_submit
from launchers.cluster import choose_cluster, require_devices, require_text
from launchers.interrupts import INTERRUPTED
from launchers.plan import make_plan
from launchers.run_directory import (
    choose_directory,
    make_run_directory,
    own_code,
    require_accelerate_config,
    usable,
)
from launchers.start import run_phase


def main(argv: list[str] | None = None) -> int:
    """Returns an exit code of encdec.errors.ExitCode, or 130 after Ctrl-C."""
    show.make_printable()
    try:
        return submit(parse_submit(argv))
    except EncdecError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; nothing has been started", file=sys.stderr)
        return INTERRUPTED


def submit(arguments: Namespace) -> int:
    """Everything that can be refused is refused before anything is written."""
    run = resolve_run(
        TrainingPhase(arguments.phase),
        config_file=arguments.config,
        settings=arguments.set,
        nodes=arguments.nodes,
        ranks_per_node=arguments.gpus_per_node,
        name=arguments.name,
    )
    cluster, why = choose_cluster(arguments.cluster, run)
    if cluster == "local":
        require_devices(run)
    require_text(run)
    paths = RunPaths(choose_directory(arguments.run_dir, run.name, new=arguments.resume == "never"))
    plan = make_plan(run, run_dir=str(paths.root), cluster=cluster, why_cluster=why)
    with usable(paths):
        exists = paths.root.exists() and any(paths.root.iterdir())
        if arguments.launcher == "accelerate":
            require_accelerate_config(paths.code if exists else own_code())
        fresh = not exists and not arguments.dry_run and make_run_directory(paths, run, plan)
        if exists or not (fresh or arguments.dry_run):
            require_same_run(paths, run)
        show.plan(plan, continues=exists)
        return 0 if arguments.dry_run else run_phase(paths, run, plan, arguments, fresh=fresh)


if __name__ == "__main__":
    sys.exit(main())
