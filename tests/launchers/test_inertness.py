"""Some hundred hostile cases; ``python -m benchmarks.inertness`` draws as many as one wants."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.inertness import FRAGMENTS, Case, Shell, prove, require_header

CASES = 300


def everywhere(text: str) -> Case:
    """The same in each field, as far as it is not refused there."""
    line = "".join(c for c in text if c.isprintable()) or "x"
    name = "".join(c for c in line if c not in "/:%\\") or "x"
    return Case(directory=name, flags={"qos": line}, variable=text, srun_args=[line], pythonpath=text)


def test_hostile_fields_are_inert(tmp_path: Path):
    shell = Shell(tmp_path)
    prove(CASES, shell.check)
    assert shell.count >= CASES


def test_every_fragment_is_inert(tmp_path: Path):
    shell = Shell(tmp_path)
    for fragment in FRAGMENTS:
        shell.check(everywhere(fragment))


@pytest.mark.parametrize("fragment", ["$(>sang)", "; >sang;", "`>sang`", "\n>sang\n"])
def test_the_proof_finds_what_is_not_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fragment: str):
    monkeypatch.setattr("launchers.script.shlex.quote", lambda text: text)
    with pytest.raises(AssertionError):
        Shell(tmp_path).check(everywhere(fragment))


def test_a_flag_of_two_lines_is_found():
    with pytest.raises(AssertionError):
        require_header("#SBATCH --qos=a\n#SBATCH --wrap=b\n", {"qos": "a"})
