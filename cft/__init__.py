"""Concept-Guided Fine-Tuning: repair a vision transformer through its own relevance map.

The names below come from their rooms when they are first used, so that `import cft` costs nothing.
"""
from typing import TYPE_CHECKING

__all__ = ["RECIPES", "ConceptSet", "Folder", "MaskStore", "audit", "build_masks", "discover", "evaluate_folder", "fine_tune",
           "load_grounder", "load_model", "relevance", "repair", "save_model", "scan", "validate"]

if TYPE_CHECKING:
    from cft.apps.repair import repair
    from cft.concepts.filters import ConceptSet, discover
    from cft.concepts.grounding import load_grounder
    from cft.concepts.masks import build_masks
    from cft.concepts.store import MaskStore
    from cft.concepts.validation import validate
    from cft.data.folders import Folder, scan
    from cft.data.models import load_model, save_model
    from cft.evaluate.audit import audit
    from cft.evaluate.passes import evaluate_folder
    from cft.explain.maps import relevance
    from cft.files import VERSION as __version__
    from cft.train.loop import fine_tune
    from cft.train.objectives import RECIPES


def __getattr__(name: str) -> object:
    match name:
        case "repair":
            from cft.apps import repair as room
        case "ConceptSet" | "discover":
            from cft.concepts import filters as room
        case "load_grounder":
            from cft.concepts import grounding as room
        case "build_masks":
            from cft.concepts import masks as room
        case "MaskStore":
            from cft.concepts import store as room
        case "validate":
            from cft.concepts import validation as room
        case "Folder" | "scan":
            from cft.data import folders as room
        case "load_model" | "save_model":
            from cft.data import models as room
        case "audit":
            from cft.evaluate import audit as room
        case "evaluate_folder":
            from cft.evaluate import passes as room
        case "relevance":
            from cft.explain import maps as room
        case "fine_tune":
            from cft.train import loop as room
        case "__version__":
            from cft.files import VERSION

            return VERSION
        case "RECIPES":
            from cft.train import objectives as room
        case _:
            raise AttributeError(f"module 'cft' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(room, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
