"""Bundle a trained model with its card: weights, config, training curve, measured scores.

    python -m docs.make_card RUN REAL_WORLD TEST RECORDINGS --speech_hours 4

after `make demo-model` (RUN), `python -m benchmarks.real_world` and, for each of the two last
folders, `diffbuf evaluate`. None of our scores is typed by hand.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.real_world import by_level, by_snr, joined, of_pairs
from diffbuf_lib import DiffusionBufferModel, figures, load_config
from diffbuf_lib.evaluation.page import cell
from diffbuf_lib.evaluation.scores import label_of
from diffbuf_lib.pretrained import DEFAULT, FOLDER
from diffbuf_lib.training.folder import apply_weights, load_weights, read_history
from recipes.demo.progress import smooth

TEMPLATE = Path(__file__).parent / "model_card.md.jinja"
CONFIG = Path(__file__).parents[1] / "configs" / "demo_model.yaml"
STAGES = ("first", "second", "third", "fourth")  # by turns of Y alone and with own estimates


def main() -> None:
    """Write the bundled model's folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="results folder of diffbuf demo-model")
    parser.add_argument("real", type=Path, help="results of python -m benchmarks.real_world")
    parser.add_argument("test", type=Path, help="results of diffbuf evaluate on test")
    parser.add_argument("recordings", type=Path, help="the same on test_recordings")
    parser.add_argument("--weights", type=Path, help="to bundle; default: the last stage's best")
    parser.add_argument("--speech_hours", required=True, help="of its training speech, in words")
    arguments = parser.parse_args()
    folder = FOLDER / DEFAULT.removeprefix("diffbuf/")
    folder.mkdir(exist_ok=True)
    model = DiffusionBufferModel(load_config(CONFIG))  # without what only its training needs
    names = [name for name in STAGES if (arguments.run / name).is_dir()]
    weights = arguments.weights or arguments.run / names[-1] / "model"
    apply_weights(model, load_weights(weights), weights)
    model.save_pretrained(folder)
    stages = {n: list(read_history(arguments.run / n / "history.jsonl")) for n in names}
    draw_curve(stages, folder / "training.png")
    steps = [sum("loss" in line for line in history) for history in stages.values()]
    timing = load(arguments.test, "timing")
    card = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    text = card.from_string(TEMPLATE.read_text()).render(
        name=DEFAULT,
        parameters=timing["parameters"],
        timing=timing["methods"]["diffbuf"],
        steps=[sum(steps[0::2]), sum(steps[1::2])],
        hours=sum(line.get("seconds", 0) for lines in stages.values() for line in lines) / 3600,
        sets={
            "test": tables(load(arguments.test, "summary")),
            "recordings": tables(load(arguments.recordings, "summary")),
        },
        speech_hours=arguments.speech_hours,
        real=real_world(arguments.real),
    )
    (folder / "README.md").write_text(text + "\n")


def real_world(folder: Path) -> dict[str, str]:
    """Return the tables of `benchmarks.real_world`, as it prints them."""

    def every(kind: str) -> dict[str, Any]:
        others = {path.name: path / kind for path in sorted(folder.glob("also/*"))}
        return joined(folder / kind, others)

    drones, pairs = by_snr(every("by_snr")), of_pairs(every("pairs"), {})
    return {"drones": drones, "levels": by_level(folder), "pairs": pairs}


def load(folder: Path, name: str) -> dict[str, Any]:
    """Read one of an evaluation's JSON files."""
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return found


def draw_curve(stages: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw the loss of the stages, one after the other."""
    series, before = [], 0
    for stage, history in stages.items():
        steps = [line for line in history if "loss" in line]
        loss = smooth([line["loss"] for line in steps], 100)
        series.append((f"{stage} stage", [before + line["step"] for line in steps], loss))
        before += len(steps)
    figure = Figure(figsize=(7.5, 3), dpi=figures.DPI, layout="constrained")
    axes = figure.subplots()
    for name, x, y in series:
        axes.plot(x, y, label=name, linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss, mean of 100 steps")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    Image.fromarray(figures.to_pixels(figure)).quantize(64).save(path, optimize=True)


def tables(summary: dict[str, Any]) -> dict[str, str]:
    """Return Markdown tables of one evaluation: all clips, and by input SNR."""
    bands, methods = summary["bands"], summary["methods"]
    columns = bands["all"]["columns"]
    rows = [["", *map(label_of, columns)]]
    for method in methods:
        found = [columns[column]["methods"][method]["mean"] for column in columns]
        rows.append([method, *map(cell, found)])
    result = {"all": markdown(rows), "clips": str(summary["clips"])}
    means = columns["si_sdr"]["methods"]
    rival = max(methods[1:-1], key=lambda method: float(means[method]["mean"]["mean"]))
    for column in ("si_sdr", "estoi"):
        head = f"lead of {methods[-1]} over {rival}, paired"
        rows = [[f"{label_of(column)} at an input SNR of", *methods, head]]
        for name, band in bands.items():
            if name != "all":
                found = band["columns"][column]["methods"]
                lead = cell(found[rival]["lead"], signed=True)
                rows.append([name, *(cell(found[method]["mean"]) for method in methods), lead])
        result[column] = markdown(rows)
    return result


def markdown(rows: list[list[str]]) -> str:
    """Return rows of cells as a Markdown table, the first row as its head."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


if __name__ == "__main__":
    main()
