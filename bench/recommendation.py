"""Next items of MovieLens-100k: ours against ranking by popularity, and against RecBole's SASRec.

    python -m bench.recommendation [EPOCHS]         # 20; RecBole takes most of the time

All three see the same events and the same leave-last-out split, predict the same 97,171 training events an epoch from
up to 50 before each, and rank all 1,682 films for the last event of each of 943 people; films already seen stay in the
list, as RecBole has it. Ours and SASRec have the same width, depth and heads, and each is taken at its own best epoch
on the validation events. Times are CPU seconds of one thread. RecBole runs as published, in an environment of its own.
"""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from bench.report import report

RECIPE = Path("recipes/movielens.yaml")
TABLE = Path("data/movielens/ml-100k.inter")
CACHE = Path(".cache/recbole")
PACKAGES = ["recbole==1.2.1", "torch>=2.11,<2.14", "numpy<2", "pandas<3", "setuptools<81"]


def histories() -> tuple[str, list[list[list[str]]]]:
    """(header, rows of each user in order of time and line)."""
    with TABLE.open(encoding="utf-8") as file:
        header, *rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    users: dict[str, list[list[str]]] = {}
    for row in sorted(rows, key=lambda row: float(row[3])):
        users.setdefault(row[0], []).append(row)
    return "\t".join(header), list(users.values())


def popularity() -> float:
    """NDCG@10 on test of the films most often seen before the last two events of everybody."""
    _, users = histories()
    counts = Counter(row[1] for rows in users for row in rows[:-2])
    place = {item: rank for rank, (item, _) in enumerate(counts.most_common())}
    ranks = [place.get(rows[-1][1], len(place)) for rows in users]
    return sum(1 / math.log2(rank + 2) for rank in ranks if rank < 10) / len(ranks)


def ours(epochs: int) -> list[dict[str, Any]]:
    """One entry an epoch: seconds of training, and NDCG@10 on valid and on test."""
    from burnish.data.once import eval_blocks
    from burnish.data.stream import open_stream
    from burnish.losses.ranking import Ranking
    from burnish.mesh import open_mesh
    from burnish.model.fresh import for_tokenizer
    from burnish.model.load import load_model
    from burnish.policy.policy import Policy
    from burnish.recipe import load_recipe

    recipe = load_recipe(RECIPE, [f"num_epochs={epochs}"])
    tokenizer = recipe.data.tokenizer.open(None)
    renderer = recipe.data.renderer.open(tokenizer)
    (source,) = recipe.data.eval
    held_out = {}
    for part in ("valid", "test"):
        data = recipe.data.model_copy(update={"eval": [source.model_copy(update={"part": part})]})
        held_out[part] = list(eval_blocks(data, renderer))
    stream = open_stream(recipe.data, renderer, seed=recipe.seed, num_epochs=epochs)
    entries, seconds, step = [], 0.0, 0
    with open_mesh() as mesh:
        model = load_model(for_tokenizer(recipe.model, tokenizer), mesh, seed=recipe.seed)
        optimizer = recipe.optimizer.open(model.trainable_parameters())
        micro_batch_size, max_grad_norm = recipe.micro_batch_size, recipe.max_grad_norm
        policy = Policy(model, optimizer, mesh=mesh, micro_batch_size=micro_batch_size, max_grad_norm=max_grad_norm)
        torch.manual_seed(recipe.seed)
        parameters = sum(parameter.numel() for _, parameter in model.trainable_parameters())
        while True:
            started = time.process_time()
            progress = stream.progress() or 0.0
            blocks = stream.take(recipe.global_batch_size)
            if blocks:
                policy.forward_backward(blocks, recipe.workflow.losses()[0])
                policy.optim_step(recipe.optimizer.learning_rate * recipe.schedule.factor(step, progress, None))
                step += 1
            seconds += time.process_time() - started
            if (stream.progress() or 0.0) * epochs >= len(entries) + 1:
                scores = {part: policy.evaluate(blocks, Ranking())["ndcg@10"] for part, blocks in held_out.items()}
                means = {part: total / count for part, (total, count) in scores.items()}
                entries.append({"seconds": seconds, "parameters": parameters, **means})
                seconds = 0.0
            if not blocks:
                break
    stream.close()
    return entries


def recbole(epochs: int) -> list[dict[str, Any]]:
    """The same of RecBole's SASRec, in a process of its own."""
    python = CACHE / "venv" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(CACHE / "venv")], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    # Its timestamps are float32, in which events up to a minute apart are one: written in order, they stay in order.
    (CACHE / "ml-100k").mkdir(exist_ok=True)
    header, users = histories()
    lines = [header, *("\t".join(row) for rows in users for row in rows)]
    (CACHE / "ml-100k" / "ml-100k.inter").write_text("\n".join(lines) + "\n")
    script, threads = Path(__file__).with_name("_recbole.py"), str(torch.get_num_threads())
    command = [str(python.absolute()), str(script), str(CACHE.absolute()), str(epochs), threads]
    ran = subprocess.run(command, cwd=CACHE, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"RecBole failed:\n{ran.stderr[-2000:]}")
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    popular = popularity()
    runs = {"burnish": ours(epochs), "RecBole SASRec": recbole(epochs)}
    rows: list[dict[str, Any]] = [{"model": "popularity", "ndcg@10": popular, "over popularity": 1.0}]
    theirs = max(runs["RecBole SASRec"], key=lambda entry: entry["valid"])["test"]
    for name, entries in runs.items():
        best = max(entries, key=lambda entry: entry["valid"])
        rows.append(
            {
                "model": name,
                "parameters": best["parameters"],
                "epochs": len(entries),
                "best epoch": entries.index(best) + 1,
                "ndcg@10": best["test"],
                "over popularity": best["test"] / popular,
                "over RecBole": best["test"] / theirs,
                "seconds an epoch": sorted(entry["seconds"] for entry in entries)[len(entries) // 2],
            }
        )
    report("recommendation", rows)


if __name__ == "__main__":
    main()
