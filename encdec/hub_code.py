"""The model's own source files in its folder, so that `trust_remote_code=True` loads it where this package is not.

transformers imports such files as siblings: what they import of each other must be relative, one level deep. Here they
import from `encdec`, and are rewritten on their way (`encdec.attention.plan` becomes `.attention_plan`); where they
came from the hub they are relative already, and are copied as they are. They need torch and transformers. The tokenizer
needs no code: its files are those of Qwen2's.
"""

from __future__ import annotations

import re
from pathlib import Path

AUTO_MAP = {
    "AutoConfig": "configuration_qwen3_encdec.Qwen3EncoderDecoderConfig",
    "AutoModelForSeq2SeqLM": "modeling_qwen3_encdec.Qwen3ForSeq2SeqLM",
}
"""For config.json: which class of which file an Auto class loads."""
MODULES = ("modeling_qwen3_encdec", "configuration_qwen3_encdec")
OWN_IMPORT = re.compile(r"^(\s*from )(?:encdec\.|\.)([\w.]+)(?= import )", re.MULTILINE)


def write_code(folder: Path) -> list[Path]:
    """Write the source files of model and configuration, and of all that they import of this package.

    Args:
        folder: exists; files of these names are replaced.

    Returns:
        The files written.

    Raises:
        OSError: it cannot be written.
    """
    written = []
    for name, text in sources().items():
        path = folder / f"{name}.py"
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def sources() -> dict[str, str]:
    """Name in a flat folder -> source text with relative imports, of the model's modules and all that they import.

    transformers keeps a configuration from the hub in a folder of its own, without the model: then it is that alone.
    """
    here, found = Path(__file__).parent, dict[str, str]()
    left = [name for name in MODULES if (here / f"{name}.py").exists()]
    while left:
        name = left.pop()
        if flat(name) in found:
            continue
        text = Path(here, *name.split(".")).with_suffix(".py").read_text(encoding="utf-8")
        found[flat(name)] = OWN_IMPORT.sub(lambda match: f"{match[1]}.{flat(match[2])}", text)
        left += [match[2] for match in OWN_IMPORT.finditer(text)]
    return dict(sorted(found.items()))


def flat(module: str) -> str:
    """The name of a module where there are no packages."""
    return module.replace(".", "_")
