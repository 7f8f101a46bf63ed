"""A trained model on the hub: weights, config, and a card without any score typed in by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from diffbuf_lib.data.reader import reason
from diffbuf_lib.errors import ConfigError, DataError
from diffbuf_lib.evaluation.baselines import OURS
from diffbuf_lib.evaluation.page import PAGES, overview
from diffbuf_lib.evaluation.scores import label_of
from diffbuf_lib.model import DiffusionBufferModel, fingerprint
from diffbuf_lib.streaming import OnlineEnhancer


def write_model(
    model: DiffusionBufferModel, name: str, folder: Path, evaluation: Path | None = None
) -> Path:
    """Write the folder to publish on the hub under a name: weights, config and README.md.

    ConfigError for a name that the hub rejects, or an evaluation of another model; DataError
    for one that is not finished.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"model name {name}: {reason(error)}: give owner/name") from error
    scores, facts = "", dict[str, Any]()
    if evaluation is not None:
        scores, facts = _scores(model, evaluation)
    cfg = model.cfg
    data = ModelCardData(
        library_name="diffbuf", pipeline_tag="audio-to-audio", model_name=name, **facts,
        tags=["speech-enhancement", "diffusion", "streaming"],
    )  # fmt: skip
    text = PAGES.get_template("card.md.jinja").render(
        name=name, cfg=cfg, scores=scores,
        hop_ms=1000 * cfg.audio.stft.hop_length / cfg.audio.sample_rate,
        latency_ms=1000 * OnlineEnhancer(model).worst_latency_samples / cfg.audio.sample_rate,
        parameters=sum(p.numel() for p in model.parameters()),
    )  # fmt: skip
    model.save_pretrained(folder)
    (folder / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n\n{text}\n", encoding="utf-8")
    return folder


def send(folder: Path, name: str, *, private: bool = False) -> str:
    """Send a folder to the hub; return its address. ConfigError without account or network."""
    api = HfApi()
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="diffbuf push")
    except Exception as error:  # the hub's and its HTTP client's errors share no class
        fix = "log in with `hf auth login`, or use --dry_run to see what would be sent"
        why = reason(error)[:300]
        raise ConfigError(f"model {name} could not be sent: {why}: {fix}") from error
    return str(address)


def _scores(model: DiffusionBufferModel, evaluation: Path) -> tuple[str, dict[str, Any]]:
    """Return an evaluation's tables, and its means as the hub lists them."""
    try:
        arguments, found, timing = (
            json.loads((evaluation / f"{name}.json").read_text("utf-8"))
            for name in ("arguments", "summary", "timing")
        )
    except (OSError, ValueError) as error:
        what = f"{evaluation} holds no finished evaluation ({reason(error)})"
        raise DataError(f"{what}: make one with `diffbuf evaluate`") from error
    if fingerprint(model) not in arguments["model"]:
        what = f"{evaluation} is an evaluation of another model ({arguments['model']})"
        raise ConfigError(f"{what}: evaluate this one, {fingerprint(model)}")
    results = [
        EvalResult(
            task_type="audio-to-audio", dataset_type="own", dataset_name=arguments["data"],
            metric_type=column, metric_name=label_of(column), metric_value=mean["mean"],
        )
        for column, table in found["bands"]["all"]["columns"].items()
        if (mean := table["methods"][OURS]["mean"]) is not None
    ]  # fmt: skip
    return overview(found, timing), {"eval_results": results}
