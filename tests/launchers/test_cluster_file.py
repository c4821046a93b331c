"""Files of clusters: found by name or path, strict, without secrets, and no part of a run's identity."""

from __future__ import annotations

from pathlib import Path

import pytest

from encdec.errors import ConfigError
from encdec.redaction import looks_secret
from launchers import cluster_file
from launchers.arguments import parse_submit
from launchers.cluster_file import ClusterFile, read_cluster_file
from tests.conftest import REPOSITORY


def test_found_by_name_beside_the_package_and_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert read_cluster_file("sandbox").partition == "main"
    (tmp_path / "configs/clusters").mkdir(parents=True)
    (tmp_path / "configs/clusters/sandbox.yaml").write_text("partition: mine")
    assert read_cluster_file("sandbox").partition == "mine"
    assert read_cluster_file(str(REPOSITORY / "configs/clusters/sandbox.yaml")).partition == "main"


def test_files_that_we_ship_can_be_read():
    for path in (REPOSITORY / "configs" / "clusters").glob("*.yaml"):
        assert read_cluster_file(str(path)).flags["partition"]
    assert read_cluster_file("auto") == ClusterFile()


REFUSED = {
    "unknown key": ("partion: gpu", "every key must be known", "partion", "Write partition"),
    "time that YAML made a number": ("time: 4:00:00", "time", "14400 of type int", "quotes"),
    "time that is none": ("time: soon", "days-hours", "'soon'", "Correct time"),
    "no memory unit": ("mem: 500", "mem", "500 of type int", "quotes"),
    "flag of our own": ("sbatch_flags: {output: x}", "the launcher itself decides --output", "sbatch_flags", "Correct"),
    "flag with a key": ("sbatch_flags: {qos: x}", "qos has a key of its own", "sbatch_flags", "Correct"),
    "two lines in a flag": ('qos: "a\\n#SBATCH --wrap=x"', "qos", "pattern", "Correct qos"),
    "GPUs without their number": ("gpu_flag: gres=gpu:8", "gpu_flag", "'gres=gpu:8'", "Correct gpu_flag"),
    "name that is no variable": ("environment: {a-b: x}", "environment.a-b", "pattern", "Correct"),
    "not a mapping": ("- partition", "must be a mapping", "list", "Start it"),
    "token": ("environment: {HF_TOKEN: abc}", "holds no secrets", "HF_TOKEN", "Export HF_TOKEN"),
    "key in a line": ("setup: ['export WANDB_API_KEY=abc']", "holds no secrets", "WANDB_API_KEY", "~/.netrc"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_rule_value_and_remedy(case: str, tmp_path: Path):
    text, *words = REFUSED[case]
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_cluster_file(str(tmp_path / "c.yaml"))
    assert [word for word in words if word not in str(refused.value)] == []
    assert "abc" not in str(refused.value)


def test_names_of_secrets():
    assert all(
        map(looks_secret, ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "db_password", "OPENAI_APIKEY"))
    )
    assert not any(map(looks_secret, ("TOKENIZERS_PARALLELISM", "HF_TOKEN_PATH", "NCCL_DEBUG", "KEYBOARD", "MONKEY")))


def test_secret_that_is_read_elsewhere_is_none(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("setup: ['export HF_TOKEN=$(cat ~/.hf)', 'export HF_TOKEN']")
    assert len(read_cluster_file(str(tmp_path / "c.yaml")).setup) == 2


def test_name_that_nothing_has_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"found 'sandbx', and no .*clusters/sandbx.yaml.* Did you mean sandbox"):
        read_cluster_file("sandbx")
    with pytest.raises(ConfigError, match="Did you mean slurm"):
        read_cluster_file("slrum")


def test_interface_is_for_both_libraries_and_a_variable_goes_before_it():
    read = ClusterFile(network_interface="ib0", environment={"NCCL_SOCKET_IFNAME": "ib1", "NCCL_DEBUG": 1})
    assert read.variables == {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib1", "NCCL_DEBUG": "1"}


def test_flags_keep_the_file_that_was_asked_for():
    assert parse_submit(["--phase", "medium", "--cluster", "sandbox", "--time", "5"]).cluster == "sandbox"
    assert cluster_file.BUILT_IN_CLUSTERS == ("auto", "slurm", "local")
