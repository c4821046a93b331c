"""One run, one name: repeated commands, new runs, dry runs."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

from encdec.files import RunPaths
from launchers.submit import main
from tests.conftest import MICRO, Lab, agent_of, wait_for_step


def test_same_command_says_complete_and_runs_nothing(lab: Lab, twin: RunPaths):
    before = sorted((twin.root).rglob("*"))
    code, output = lab.submit(twin.root)
    assert code == 0
    assert "complete (nothing left to do)" in output
    assert sorted((twin.root).rglob("*")) == before


def test_resume_never_makes_a_new_run(lab: Lab, twin: RunPaths):
    root = lab.root / "run"
    shutil.copytree(twin.root, root)
    code, output = lab.submit(root, "--resume", "never")
    assert code == 0, output
    fresh = RunPaths(lab.root / "run-2")
    assert json.loads(fresh.attempt(0).outcome.read_text())["cause"] == "complete"
    assert RunPaths(root).attempt_numbers() == [0]


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--phase", "validation", "--config", str(MICRO), "--cluster", "local", "--dry-run"]
    assert main(arguments) == 0
    plan = capsys.readouterr().out
    for word in ("validation", "FSDP2 FULL_SHARD", "tokens a step", "warm-up steps", "passes if", "directory"):
        assert word in plan
    assert "the clock" not in plan
    assert main([*arguments, "--set", "training.save_every=auto"]) == 0
    assert "more when the clock asks for them" in " ".join(capsys.readouterr().out.split())
    assert not list(tmp_path.iterdir())


def test_plan_says_which_of_steps_and_tokens_binds(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--phase", "sanity_check", "--config", str(MICRO), "--cluster", "local", "--dry-run"]
    main(arguments)
    assert "steps bind, tokens would allow" in " ".join(capsys.readouterr().out.split())
    main([*arguments, "--set", "training.total_tokens=4000"])
    assert "tokens bind, steps would allow 60 steps" in " ".join(capsys.readouterr().out.split())


def test_other_configuration_in_the_same_directory_is_refused(lab: Lab, twin: RunPaths):
    code, output = lab.submit(twin.root, "--set", "training.learning_rate=5e-3")
    assert code == 78
    assert "config.training.learning_rate: 0.01 there, 0.005 now" in output


def test_run_goes_on_in_another_place(lab: Lab, tmp_path: Path):
    """Ranks and the folder of packed text say where a run runs, not what it computes."""
    paths = RunPaths(lab.root / "run")
    process = lab.start_submit(paths.root, "--name", "mine")
    wait_for_step(paths, 5)
    agent_of(paths).send_signal(signal.SIGUSR2)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    elsewhere = ("--set", f"data.packed_dir={tmp_path / 'elsewhere'}", "--gpus-per-node", "1")
    code, output = lab.submit(paths.root, *elsewhere)
    assert code == 0, output
    assert "x 1 cpu rank(s)" in " ".join(output.split())
    assert [log.name for log in paths.attempt(1).rank_logs(0).glob("*.err")] == ["rank-0.restart-0.err"]
    assert any((tmp_path / "elsewhere").iterdir())
    assert "name: mine" in paths.run_yaml.read_text()


def test_second_submit_follows_the_running_attempt(lab: Lab):
    paths = RunPaths(lab.root / "run")
    first = lab.start_submit(paths.root)
    wait_for_step(paths, 5)
    code, output = lab.submit(paths.root)
    assert code == 0, output
    assert "running already" in output
    assert first.wait(timeout=60) == 0
    assert paths.attempt_numbers() == [0]


def test_run_directory_with_blanks_and_quotes(lab: Lab):
    paths = RunPaths(lab.root / 'my run\'s "dir"')
    code, output = lab.submit(paths.root, "--set", "training.num_train_steps=20")
    assert code in (0, 3), output
    assert paths.attempt(0).outcome.is_file()


def test_missed_bound_ends_with_code_3(lab: Lab):
    paths = RunPaths(lab.root / "run")
    code, output = lab.submit(
        paths.root, "--set", "phases.sanity_check.min_loss_decrease=50", "--set", "training.num_train_steps=20"
    )
    assert code == 3, output
    assert "loss_decrease" in output
    gate = json.loads((paths.gates / "sanity_check.json").read_text())
    assert gate["passed"] is False
    assert not next(item for item in gate["evidence"] if item["metric"] == "loss_decrease")["passed"]


def test_refusal_inside_a_rank_is_told_once_and_not_repeated(lab: Lab):
    """What only the ranks can find out: here, a vocabulary larger than the text can fill."""
    paths = RunPaths(lab.root / "run")
    code, output = lab.submit(paths.root, "--set", "model.train_tokenizer_vocab_size=400000")
    assert code == 78, output
    outcome = json.loads(paths.attempt(0).outcome.read_text())
    assert (outcome["cause"], outcome["restarts"]) == ("refused", 0)
    assert "vocabulary" in outcome["message"]
    assert "correct what the line above names" in " ".join(output.replace("│", " ").split())


def test_job_runs_the_snapshot_not_the_checkout(lab: Lab):
    paths = RunPaths(lab.root / "run")
    process = lab.start_submit(paths.root)
    wait_for_step(paths, 1)
    log = (paths.attempt(0).rank_logs(0) / "rank-0.restart-0.err").read_text()
    process.kill()
    assert f"code: {paths.code / 'encdec'}\n" in log
    git = json.loads((paths.code / "git.json").read_text())
    assert set(git) == {"commit", "uncommitted"}
    assert (paths.code / "encdec" / "train.py").is_file()
