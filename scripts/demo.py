"""`make demo`: a real model fine-tuned on real conversations, and the proof that it learnt, in minutes on two cores."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import quickstart_data
import quickstart_model

MODEL = Path(".cache/models/SmolLM2-135M-Instruct")
DATA = Path(".cache/quickstart")
RECIPE = Path("recipes/quickstart.yaml")
RUN = Path("runs/quickstart")
QUESTIONS = ("What does `functools.partial` do in Python?", "What does `shutil.copytree` do in Python?")
BURNISH = [sys.executable, "-m", "burnish"]


def main() -> None:
    """Prepares, trains, asks, plots; prints where the time went."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--started", type=float, default=time.time(), help="when the command began, seconds since 1970")
    started = parser.parse_args().started
    seconds = {"installation": time.time() - started}

    with timed(seconds, "model", f"model      {MODEL}"):
        print(f"    {quickstart_model.prepare(MODEL)}")
    with timed(seconds, "data", f"data       {DATA}"):
        train, held_out = quickstart_data.prepare(DATA)
        print(f"    {train} conversations to train on, {held_out} held out")
    with timed(seconds, "answers before", "answers of the model as it is"):
        before = [answer(MODEL, question) for question in QUESTIONS]
    with timed(seconds, "training", f"training   burnish train {RECIPE}"):
        code = subprocess.run([*BURNISH, "train", str(RECIPE)]).returncode
        if code:
            sys.exit(code)
    with timed(seconds, "answers after", "answers of the tuned model"):
        after = [answer(RUN, question) for question in QUESTIONS]
    metrics = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    with timed(seconds, "plot", "loss plot"):
        plot(metrics, RUN / "loss.png")
    report(metrics, before, after, seconds)


@contextmanager
def timed(seconds: dict[str, float], name: str, title: str) -> Iterator[None]:
    """Announces a stage and keeps how long it took."""
    print(f"==> {title}", flush=True)
    started = time.time()
    yield
    seconds[name] = time.time() - started


def answer(model: Path, question: str) -> str:
    """The greedy answer of at most 64 tokens."""
    command = [*BURNISH, "generate", str(model), question, "--max-new-tokens", "64"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def plot(metrics: list[dict[str, float]], path: Path) -> None:
    """Training loss by step, held-out loss as points."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    steps = [line for line in metrics if "loss" in line]
    held_out = [line for line in metrics if "eval_loss" in line]
    for lines, name, style, label in (
        (steps, "loss", "-", "training rows"),
        (held_out, "eval_loss", "o-", "held-out rows"),
    ):
        axes.plot([line["step"] for line in lines], [line[name] for line in lines], style, label=label)
    axes.set(xlabel="step", ylabel="negative log-likelihood, nats a token", title=str(RECIPE))
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def report(metrics: list[dict[str, float]], before: list[str], after: list[str], seconds: dict[str, float]) -> None:
    """What a person came for."""
    held_out = [line["eval_loss"] for line in metrics if "eval_loss" in line]
    for question, old, new in zip(QUESTIONS, before, after, strict=True):
        print(f"\n--- {question}\nbefore: {old}\nafter:  {new}")
    print(f"\nheld-out loss   {held_out[0]:.3f} before, {held_out[-1]:.3f} after, nats a token")
    print("time            " + ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items()))
    print(f"                {sum(seconds.values()):.0f} s in all")
    print(f"loss plot       {RUN / 'loss.png'}")
    print(f"exported model  {RUN / 'model'}")
    print(
        "\nNext:\n"
        f"  .venv/bin/burnish generate {RUN} 'What does `json.dumps` do in Python?'\n"
        f"  .venv/bin/burnish data {RECIPE} -n 3                  see what is trained, token by token\n"
        f"  .venv/bin/burnish check {RECIPE}                      everything that can be known before spending\n"
        f"  .venv/bin/burnish train {RECIPE} num_steps=100 run_dir=runs/longer\n"
        f"  .venv/bin/burnish export {RUN} --merge --to my-model  one plain Hugging Face folder"
    )


if __name__ == "__main__":
    main()
