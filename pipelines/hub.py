"""The Hugging Face libraries: downloading a model, and silencing what they log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from transformers.utils import logging as transformers_logging

from erase_concept.errors import RequestError, first_line


@contextmanager
def silence_hub_logs() -> Iterator[None]:
    """Silence the progress bars and hints of diffusers and transformers, which say nothing a user needs."""
    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (level, shown) in zip(libraries, before, strict=True):
            library.set_verbosity(level)
            if shown:
                library.enable_progress_bar()


def download(name: str) -> Path:
    """Return the folder of a hub id's model in the hub's cache; raises RequestError that says what to do instead."""
    try:
        return Path(DiffusionPipeline.download(name, safety_checker=None, requires_safety_checker=False))
    except Exception as problem:  # among them those of the HTTP library, which is another one in each version
        cause = problem if isinstance(problem, HfHubHTTPError) else problem.__cause__ or problem
        closed = getattr(getattr(cause, "response", None), "status_code", None) in (401, 403)
        login = "log in with 'hf auth login' or set HF_TOKEN"
        if isinstance(cause, GatedRepoError):
            what = f"is gated: accept its terms at https://huggingface.co/{name}, and {login}"
        elif isinstance(cause, RepositoryNotFoundError) or closed:
            what = f"is not on the hub, or is closed to you there: {login}"
        elif isinstance(cause, OfflineModeIsEnabled):
            what = "is not in the hub's cache, and HF_HUB_OFFLINE forbids to download it"
        else:
            what = f"is not in the hub's cache and could not be downloaded: {first_line(cause)}"
        raise RequestError("model", name, what) from problem
