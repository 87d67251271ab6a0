"""Whole runs on tiny parts: what learns, what is saved, what is refused."""

from __future__ import annotations

from pathlib import Path

import model  # noqa: F401 (registers the model type)
from model.training.run import train


def test_a_run(make_recipe):
    r = train(make_recipe(1))
    print(r)
    r2 = train(make_recipe(2, checkpoint=r["checkpoint"], language_model_training="lora", balance_loss_weight=0.02))
    print(r2)
    print(*Path(r2["checkpoint"]).rglob("*"), sep="\n")
