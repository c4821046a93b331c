"""The model's own source files in its folder, so that `trust_remote_code=True` loads it where this package is not.

transformers imports such files as siblings: what they import of each other must be relative, one level deep. Here they
import from `encdec`, and on their way are rewritten and laid flat, `encdec/attention/plan.py` as `attention_plan.py`;
where they came from the hub they are so already, and are copied as they are. They need torch and transformers. The
tokenizer needs no code: its files are those of Qwen2's.
"""

from __future__ import annotations

import re
from pathlib import Path

from encdec.errors import EncdecError

AUTO_MAP = {
    "AutoConfig": "configuration_qwen3_encdec.Qwen3EncoderDecoderConfig",
    "AutoModelForSeq2SeqLM": "modeling_qwen3_encdec.Qwen3ForSeq2SeqLM",
}
"""For config.json: which class of which file an Auto class loads."""
MODULES = ("modeling_qwen3_encdec", "configuration_qwen3_encdec")
OWN_IMPORT = re.compile(r"^(\s*)(?:from (?:encdec\.|\.)([\w.]+)(?= import )|(?:from|import) (encdec)\b)", re.MULTILINE)


def write_code(folder: Path) -> list[Path]:
    """Write the source files of model and configuration, and of all that they import of this package.

    Args:
        folder: exists; files of these names are replaced.

    Returns:
        The files written.

    Raises:
        EncdecError: one of them imports this package in a way that a flat folder cannot follow.
        OSError: it cannot be written.
    """
    written = []
    for name, text in sources().items():
        path = folder / f"{name}.py"
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def sources() -> dict[str, str]:
    """Name of a file, without .py -> its text with relative imports: the model's modules and all that they import.

    transformers keeps a configuration from the hub in a folder of its own, without the model: then it is that alone.

    Raises:
        EncdecError: as `write_code`.
    """
    here, found = Path(__file__).parent, dict[str, str]()
    left = [name for name in MODULES if _path(here, name).is_file()]
    while left:
        name = left.pop()
        if _flat(name) in found:
            continue
        text = _path(here, name).read_text(encoding="utf-8")
        for match in OWN_IMPORT.finditer(text):
            if match[3] or not _path(here, match[2]).is_file():
                raise EncdecError(
                    "What the model's code imports of this package must be names of a module, from encdec.x.y import z",
                    found=f"{match[0].strip()} in {name}",
                    remedy="Name the module in which they are defined",
                )
            left.append(match[2])
        found[_flat(name)] = OWN_IMPORT.sub(lambda match: f"{match[1]}from .{_flat(match[2])}", text)
    return dict(sorted(found.items()))


def _path(here: Path, module: str) -> Path:
    return here.joinpath(*module.split(".")).with_suffix(".py")


def _flat(module: str) -> str:
    return module.replace(".", "_")
