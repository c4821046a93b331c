"""Reads what trackers have written, as their own readers would."""

from __future__ import annotations

import json
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from encdec.training.tracking.wandb_files import read_records, row_of


def wandb_files(folder: Path) -> list[Path]:
    """Of all attempts, oldest first."""
    return sorted(folder.rglob("*.wandb"), key=lambda path: path.stat().st_ctime)


def wandb_ids(folder: Path) -> list[str]:
    """The run's id in each file."""
    return [
        next(record.run.run_id for record in read_records(file) if record.WhichOneof("record_type") == "run")
        for file in wandb_files(folder)
    ]


def wandb_curve(folder: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) in the order in which the files of all attempts, uploaded one after the other, tell them."""
    points = []
    for file in wandb_files(folder):
        for record in read_records(file):
            row = row_of(record) or {}
            if name in row:
                points.append((int(row["_step"]), json.loads(row[name])))
    return points


def wandb_alerts(folder: Path) -> list[tuple[str, str]]:
    """Title and text of each."""
    records = [record for file in wandb_files(folder) for record in read_records(file)]
    return [(r.alert.title, r.alert.text) for r in records if r.WhichOneof("record_type") == "alert"]


def tensorboard_curve(folder: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) as TensorBoard shows them."""
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in reader.Scalars(name)]


def tensorboard_texts(folder: Path, name: str) -> list[tuple[int, str]]:
    reader = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in reader.Tensors(name)]
