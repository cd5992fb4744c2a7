"""`python scripts/metric_pictures.py [RECIPE ...]`: what to watch in a run, from `runs/<recipe>` into `docs/images/`.

Train the recipes first: `burnish train recipes/dpo.yaml`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib import rcParams
from matplotlib.figure import Figure

PANELS = {
    "dpo": [["loss"], ["rewards/margins"], ["rewards/accuracies"], ["logps/chosen", "logps/rejected"]],
    "kto": [["loss"], ["rewards/chosen", "rewards/rejected"], ["rewards/accuracies"], ["kl"]],
    "reward": [["loss"], ["rewards/accuracies"], ["rewards/margins"], ["rewards/chosen", "rewards/rejected"]],
    "process_reward": [["loss"], ["accuracy"]],
    "classify": [["loss"], ["accuracy"]],
    "distill": [["loss"], ["divergence"]],
    "search": [["loss"], ["accuracy"], ["similarities/positive", "similarities/negative"], ["recall@1", "recall@10"]],
    "movielens": [["loss"], ["ndcg@10"], ["recall@10"]],
}
"""For each recipe its panels; a metric is drawn as a line a step, and its `eval_` twin as points."""


def draw(name: str) -> Path:
    """The picture of one run."""
    lines = [json.loads(line) for line in (Path("runs") / name / "metrics.jsonl").read_text().splitlines()]
    rcParams.update({"svg.hashsalt": "burnish", "svg.fonttype": "none", "font.size": 8})
    figure = Figure(figsize=(2.4 * len(PANELS[name]), 1.9))
    axes = figure.subplots(1, len(PANELS[name]), squeeze=False)
    for axis, metrics in zip(axes[0], PANELS[name], strict=True):
        for metric in metrics:
            for key, style in ((metric, "-"), (f"eval_{metric}", "o--")):
                points = [(line["step"], line[key]) for line in lines if key in line]
                if points:
                    axis.plot(*zip(*points, strict=True), style, markersize=3, linewidth=1, label=key)
        axis.set(xlabel="step", title=metrics[0] if len(metrics) == 1 else "")
        axis.legend(fontsize=6)
    figure.tight_layout()
    path = Path("docs/images") / f"{name}.svg"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    return path


if __name__ == "__main__":
    for name in sys.argv[1:] or [name for name in PANELS if (Path("runs") / name / "metrics.jsonl").exists()]:
        print(draw(name))
