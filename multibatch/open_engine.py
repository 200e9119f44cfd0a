"""Opens what a caller names, an artifact or a model, and starts an engine over it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multibatch.artifact import Artifact
from multibatch.config import EngineConfig, cache_dir
from multibatch.engine import Engine
from multibatch.errors import ArtifactError, ConfigError
from multibatch.manifest import MANIFEST_NAME


def open_engine(
    model: str | Path, options: Mapping[str, Any], *, usual_batched_tokens: int | None = None
) -> tuple[Artifact, Engine]:
    """An engine over an artifact, or over a model that is compiled into the cache first.

    Args:
        model: an artifact's folder, or a Hugging Face model's folder or hub id.
        options: fields of `EngineConfig`; `max_model_len`, which is its max_seq_len by vLLM's name; `compile_options`, for a
            model: keyword arguments of `multibatch_compile.compile_model`.
        usual_batched_tokens: `EngineConfig.max_num_batched_tokens` where that is None and the artifact has more.

    Raises:
        ArtifactError: the folder does not open.
        ConfigError: an option outside what is allowed, or not known.
    """
    options = dict(options)
    max_model_len, compile_options = options.pop("max_model_len", None), options.pop("compile_options", None)
    unknown = set(options) - {field.name for field in dataclasses.fields(EngineConfig)}
    if unknown:
        raise ConfigError(f"unknown option {', '.join(sorted(unknown))}; see help(multibatch.LLM) for what there is")
    if max_model_len is not None:
        options["max_seq_len"] = max_model_len
    config = EngineConfig(**options)
    artifact = open_or_compile(model, compile_options or {})
    if config.max_num_batched_tokens is None and usual_batched_tokens is not None:
        most = min(usual_batched_tokens, artifact.manifest.max_prefill_tokens)
        config = dataclasses.replace(config, max_num_batched_tokens=most)
    return artifact, Engine(artifact, config)


def open_or_compile(model: str | Path, compile_options: Mapping[str, Any]) -> Artifact:
    """An artifact as it is; a model is compiled into the cache folder first, with progress on the terminal."""
    folder = Path(model)
    if (folder / MANIFEST_NAME).is_file() or (folder.is_dir() and not (folder / "config.json").is_file()):
        return Artifact.open(folder)
    try:
        compiler = importlib.import_module("multibatch_compile")
    except ImportError as error:
        raise ArtifactError(f"{model} is no artifact, and the compile step is not installed: {error}") from error
    name = compiler.cache_name(str(model), dict(compile_options))
    target = cache_dir() / "artifacts" / name
    with contextlib.suppress(ArtifactError):
        return Artifact.open(target)
    return compiler.compile_model(str(model), target, force=target.exists(), progress=True, **compile_options)  # type: ignore[no-any-return]
