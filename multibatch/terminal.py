"""What the commands print with."""

from __future__ import annotations

import logging
import warnings

from rich.console import Console

OUT = Console()
ERR = Console(stderr=True)


def quiet() -> None:
    """Keeps transformers and the hub from printing what the commands say themselves."""
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    # Offline it would tell of every attempt, twice; the error at the end says it once.
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", category=FutureWarning)
