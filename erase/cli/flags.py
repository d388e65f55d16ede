"""The one place that turns the library's setting names into the command's flags."""

from __future__ import annotations

from erase_concept.errors import RequestError

# Settings whose flag is not their own name with dashes.
FLAGS = {
    "model": "MODEL",
    "run": "RUN",
    "images": "DIR",
    "file": "FILE",
    "delta": "DELTA",
    "report": "RUN",
    "exports": "--export",
    "reports": "--report",
    "what": "WHAT",
    "name": "NAME",
    "set": "--set",
    "ema": "--ema",
    "metric.reference": "--reference",
    "classifier": "CLASSIFIER",
    "data.source": "--data",
    "mask.kind": "--mask",
    "mask.scope": "--scope",
    "mask.sparsity": "--sparsity",
    "data.forget_images": "--forget-images",
    "data.retain_images": "--retain-images",
} | {
    name: f"--{name.replace('_', '-')}"
    for name in (
        *("concept", "anchor", "retain", "templates", "out", "method", "preset", "recipe", "memory", "seed", "scope"),
        *("forget", "retrain", "shadow_models"),
        *("prompts", "category", "limit", "seeds", "steps", "guidance", "scheduler", "guard", "batch_size"),
        *("base", "recheck", "sign", "public_key"),
        *("benchmark", "baseline", "judge", "metric", "fail_if"),
        *("methods", "concepts", "masks", "multipliers", "tune", "trials"),
        *("card", "format", "dtype", "rank", "lora_style", "push_to_hub", "public", "revert", "transfer"),
    )
}
# Flags that there were once, and how to say the same now.
REPLACED = {
    "--kind": "--mask",
    "--classifier": "--judge",
    "--strengths": "--multipliers",
    "--threshold": "--set judge.threshold",
    "--labels": "--set judge.labels",
    "--extractor": "--set metric.extractor",
    "--inception": "--set metric.inception",
    "--clip": "--set metric.clip",
}
# Parts whose settings are set by --set; the settings of a method are written without their part.
PARTS = {"settings": "", "mask": "mask.", "data": "data.", "judge": "judge.", "metric": "metric.", "guard": "guard."}


def flag(setting: str) -> str:
    """Return the flag by which a setting is given: "settings.lr" is "--set lr"; what has no flag stays as it is."""
    if setting in FLAGS:
        return FLAGS[setting]
    if setting in REPLACED:
        return REPLACED[setting]
    part, dot, name = setting.partition(".")
    return f"--set {PARTS[part]}{name}" if dot and part in PARTS else setting


def in_flags(problem: RequestError) -> str:
    """Return the error's line with the flag in the place of the setting."""
    named = flag(problem.setting)
    joined = "=" if named.startswith("--set ") else " "
    return f"{named}{joined}{problem.value}: {problem.allowed}"
