"""undertow: stress-tests of sparse-autoencoder interventions on language models.

The names below are imported when first used, so that `import undertow` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from undertow.audit import run_audit
    from undertow.config import RunConfig, resolve
    from undertow.defences.clamp import Clamp, Clamps
    from undertow.errors import UndertowError
    from undertow.models.language_model import LanguageModel
    from undertow.models.load import load_model
    from undertow.runlog import read_run
    from undertow.saes.load import load_sae
    from undertow.saes.sae import SAE
    from undertow.sites import Site

__version__ = "0.1.0"

_HOMES = {
    "run_audit": "audit", "RunConfig": "config", "resolve": "config", "Clamp": "defences.clamp", "Clamps": "defences.clamp",
    "UndertowError": "errors", "LanguageModel": "models.language_model", "load_model": "models.load",
    "read_run": "runlog", "load_sae": "saes.load", "SAE": "saes.sae", "Site": "sites",
}  # fmt: skip

__all__ = [
    "SAE", "Clamp", "Clamps", "LanguageModel", "RunConfig", "Site", "UndertowError", "load_model", "load_sae",
    "read_run", "resolve", "run_audit",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"undertow.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'undertow' has no attribute {name!r}")
