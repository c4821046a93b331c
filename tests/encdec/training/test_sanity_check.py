"""The sanity check before a run's first step: rank 0 makes it, all ranks take part."""

from __future__ import annotations

import sys
from pathlib import Path

from encdec.files import RunPaths
from tests.conftest import Lab, losses

LATE = """
import sys
import time
from pathlib import Path
from encdec import distributed, train
from encdec.files import RunPaths
from encdec.training import rank

build = rank.begin_model
report = RunPaths(Path(sys.argv[sys.argv.index("--output_dir") + 1])).sanity_report

def build_late(*arguments, **options):
    while distributed.rank() and not report.exists():
        time.sleep(0.01)
    return build(*arguments, **options)

rank.begin_model = build_late
train.leave(train.main())
"""
"""encdec.train, all of whose ranks but the first build their model once the first has written its report."""


def test_rank_that_comes_after_the_report_misses_no_collective(lab: Lab, tmp_path: Path, twin: RunPaths):
    (tmp_path / "late.py").write_text(LATE)
    paths = RunPaths(tmp_path / "run")
    torchrun = ("env", f"PYTHONPATH={tmp_path}", str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", "2")
    arguments = ("--phase", "sanity_check", "--output_dir", str(paths.root), *lab.arguments())
    code, output = lab.run("late", *arguments, launcher=torchrun)
    assert code == 0, output
    assert paths.sanity_report.exists()
    assert losses(paths) == losses(twin)
