"""Remove a concept from a Stable Diffusion model, and prove that it is gone and everything else is still there."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from erase_concept.version import __version__

# diffusers imports it where it is installed; it warns of things that are not used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# Public names and where they live. They are imported when first used, so that importing the package loads no torch.
_NAMES = {
    "Classifier": "pipelines.classifiers.classifier",
    "CompareRequest": "eval.compare.comparison",
    "Comparison": "eval.compare.comparison",
    "Concept": "prompts.concept",
    "Diffusion": "pipelines.model",
    "EraseError": "errors",
    "EvalRequest": "eval.request",
    "Mask": "masks.mask",
    "PromptSet": "prompts.promptset",
    "Report": "eval.report.report",
    "RequestError": "errors",
    "Run": "run",
    "compare": "eval.compare.compare",
    "erase": "run",
    "evaluate": "eval.evaluate",
    "evaluate_classifier": "eval.classification.evaluate",
    "export": "exports",
    "find_concept": "prompts.find",
    "iter_compare": "eval.compare.compare",
    "iter_erase": "run",
    "iter_evaluate": "eval.evaluate",
    "iter_sample": "pipelines.sample",
    "iter_unlearn": "classification.run",
    "load": "pipelines.load",
    "mask": "masks.make",
    "recipe_for": "recipe",
    "sample": "pipelines.sample",
    "train_classifier": "classification.run",
    "unlearn": "classification.run",
    "verify": "eval.verify.verify",
    "write_report": "eval.report.write",
}
__all__ = [*_NAMES, "__version__"]  # noqa: PLE0604 - the names are strings, of a table that __getattr__ reads too

if TYPE_CHECKING:
    from erase_concept.classification.run import iter_unlearn, train_classifier, unlearn
    from erase_concept.errors import EraseError, RequestError
    from erase_concept.eval.classification.evaluate import evaluate_classifier
    from erase_concept.eval.compare.compare import compare, iter_compare
    from erase_concept.eval.compare.comparison import CompareRequest, Comparison
    from erase_concept.eval.evaluate import evaluate, iter_evaluate
    from erase_concept.eval.report.report import Report
    from erase_concept.eval.report.write import write_report
    from erase_concept.eval.request import EvalRequest
    from erase_concept.eval.verify.verify import verify
    from erase_concept.exports import export
    from erase_concept.masks.make import mask
    from erase_concept.masks.mask import Mask
    from erase_concept.pipelines.classifiers.classifier import Classifier
    from erase_concept.pipelines.load import load
    from erase_concept.pipelines.model import Diffusion
    from erase_concept.pipelines.sample import iter_sample, sample
    from erase_concept.prompts.concept import Concept
    from erase_concept.prompts.find import find_concept
    from erase_concept.prompts.promptset import PromptSet
    from erase_concept.recipe import recipe_for
    from erase_concept.run import Run, erase, iter_erase


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'erase_concept' has no attribute {name!r}")
    return getattr(importlib.import_module(f"erase_concept.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
