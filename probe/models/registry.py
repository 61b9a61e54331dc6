# SPDX-License-Identifier: MIT
"""The catalogue of predictors, by name. The first is the default."""

from __future__ import annotations

from probe.errors import UsageError
from probe.models import kvm, vendor
from probe.models.prediction import Model

MODELS: tuple[Model, ...] = (vendor.MODEL, *kvm.MODELS)
DEFAULT = MODELS[0]


def names() -> tuple[str, ...]:
    """Return the names of all models, in the order of the catalogue."""
    return tuple(model.name for model in MODELS)


def get(name: str) -> Model:
    """Return the model of this name; raise UsageError, which lists the names, if there is none."""
    for model in MODELS:
        if model.name == name:
            return model
    raise UsageError(f"no model is called {name!r}", f"one of: {', '.join(names())}")
