"""A forecast as lines for a person. Pure."""

from __future__ import annotations

from launchers.planning.feasibility import clock
from launchers.planning.forecast import Forecast
from launchers.planning.plan import Plan

PARTS = ("parameters", "gradients", "optimizer", "gathered", "activations", "logits", "process", "heap", "saving")
LEAST_GB = 0.0005
"""Below it a part is left out."""


def rows(plan: Plan) -> dict[str, str]:
    """The lines of a plan's forecast, by name; none where it has none."""
    if plan.forecast is None:
        return {}
    forecast = plan.forecast
    told = {
        "memory": memory(forecast),
        "compute": compute(forecast),
        "time": hours(plan, forecast),
        "saving": saving(forecast),
        "storage": storage(forecast),
        "productive": productive(forecast),
    }
    if forecast.start_estimate:
        told["would start"] = f"{forecast.start_estimate.replace('T', ' ')}, as Slurm sees it now"
    if plan.warnings:
        told["warnings"] = "\n".join(plan.warnings)
    return {name: text for name, text in told.items() if text}


def memory(forecast: Forecast) -> str:
    if forecast.memory_gb is None:
        return "the model's sizes are not known here"
    named = [(name, forecast.memory_gb.get(f"{name}_gb", 0.0)) for name in PARTS]
    parts = " + ".join(f"{name} {figures(amount)}" for name, amount in named if amount >= LEAST_GB)
    total = forecast.memory_gb["total_gb"]
    device = "" if forecast.device_memory_gb is None else f", of {figures(forecast.device_memory_gb)} GB"
    kind = f" ({forecast.gpu})" if forecast.gpu and device else ""
    fits = ""
    if forecast.device_memory_gb is not None:
        fits = ": fits" if total <= forecast.device_memory_gb else ": does NOT fit"
    return f"about {figures(total)} GB a rank{device}{kind}{fits} = {parts}"


def compute(forecast: Forecast) -> str:
    if forecast.flops_per_step is None or forecast.total_flops is None or forecast.parameters is None:
        return ""
    mfu = f", MFU {forecast.mfu:.0%}" if forecast.mfu is not None else ""
    speed = f"; {forecast.tokens_per_second:,.0f} tokens/s{mfu}" if forecast.tokens_per_second else ""
    model = f"{millions(forecast.parameters)} parameters"
    parts = {"for each token": forecast.active_parameters, "trained": forecast.trained_parameters}
    others = [f"{millions(n)} {what}" for what, n in parts.items() if n not in (None, forecast.parameters)]
    model += f" ({', '.join(others)})" if others else ""
    return f"{model}, {forecast.flops_per_step:.2e} FLOPs a step, {forecast.total_flops:.2e} in all{speed}"


def hours(plan: Plan, forecast: Forecast) -> str:
    if forecast.training_hours is None or forecast.wall_hours is None or forecast.step_seconds is None:
        return f"not known: {forecast.basis}"
    unit = "GPU-hours" if forecast.device == "cuda" else "rank-hours"
    jobs = ""
    if forecast.limit_hours is not None:
        jobs = f" in {forecast.attempts:,} job(s) of at most {clock(3600 * forecast.limit_hours)}"
    return (
        f"{clock(3600 * forecast.wall_hours)}{jobs}, {figures(forecast.gpu_hours or 0.0)} {unit}; "
        f"{clock(3600 * forecast.training_hours)} if nothing interrupts it; {forecast.step_seconds:.3g} s a step "
        f"({forecast.basis})"
    )


def how_long(plan: Plan) -> str:
    """The expected wall time of a plan, in short."""
    known = plan.forecast and plan.forecast.wall_hours
    return clock(3600 * known) if known else "?"


def saving(forecast: Forecast) -> str:
    if forecast.save_interval_seconds is None or forecast.blocking_seconds is None:
        return ""
    best = f"; the best interval is {clock(forecast.best_interval_seconds)}" if forecast.best_interval_seconds else ""
    return (
        f"every {clock(forecast.save_interval_seconds)}{best}; a save blocks {forecast.blocking_seconds:.2g} s and is "
        f"committed after {forecast.save_seconds:.2g} s"
    )


def storage(forecast: Forecast) -> str:
    need = forecast.storage
    if need is None:
        return ""
    return (
        f"{figures(need.checkpoint_gb)} GB a checkpoint, {need.checkpoints} at most and an average: "
        f"{figures(need.disk_gb)} GB in {need.inodes:,} files and folders; packed text {figures(need.packed_gb)} GB"
    )


def productive(forecast: Forecast) -> str:
    if forecast.ettr is None:
        return ""
    best = f", {forecast.best_ettr:.1%} at the best interval" if forecast.best_ettr is not None else ""
    mean = 3600 * forecast.mean_time_to_interrupt_hours
    often = "never" if mean == float("inf") else f"every {clock(mean)}"
    return (
        f"{forecast.ettr:.1%} of the time trains (expected ETTR{best}): interrupted {often} "
        f"({forecast.mean_time_from}), {clock(forecast.recovery_seconds)} to recover"
    )


def millions(count: int) -> str:
    """Parameters in words: 35,072, 1,036.5 M."""
    return f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count:,}"


def figures(amount: float) -> str:
    """Three figures: 0.0123, 1.23, 12.3, 1,230."""
    return f"{amount:,.0f}" if amount >= 100 else f"{amount:.3g}"
