"""From a tiny model upward, each size earned by gates: ``python -m encdec.pipeline --help``. Importing it imports no
torch; the names below are imported from their modules when they are first asked for.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "config": (
        "GateConfig", "ModelOverrides", "PipelineConfig", "PipelineTrainingConfig", "apply_scale_defaults",
        "create_quick_test_config", "create_scale_test_config",
    ),
    "evaluators": ("EVALUATORS", "Evaluation", "NotMeasured", "register_evaluator"),
    "results": ("ScaleResult", "print_results"),
    "runner": ("PipelineRunner",),
    "scales": ("SCALES", "ModelScale", "get_model_config", "print_scale_comparison"),
    "seed_suites": ("write_seed_suite",),
    "validator": ("PipelineValidator",),
}  # fmt: skip
_HOME = {name: module for module, names in _HOMES.items() for name in names}
_GATES = ("GATES", "GateLevel", "GateReport", "Measurement", "ValidationGate")
__all__ = [*_HOME, *_GATES]


def __getattr__(name: str) -> Any:
    if name in _GATES:
        return getattr(import_module("encdec.gates"), name)
    if name not in _HOME:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
