"""An embedding model as a person trains it: recall on held-out rows, exact resume, a folder that others read."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny_run
from tests.e2e_helpers import Lab, column
from tests.zygote import Zygote


def scrambled(count: int, seed: int) -> list[dict[str, Any]]:
    """Queries, no two alike, that are the words of their positive in another order; every third row has a negative."""
    rng, rows = random.Random(seed), dict[str, dict[str, Any]]()
    while len(rows) < count:
        words = rng.sample(tiny_run.WORDS, k=rng.randint(3, 6))
        query = " ".join(rng.sample(words, k=len(words)))
        rows[query] = {"query": query, "positive": " ".join(words)}
        if len(rows) % 3 == 0:
            rows[query]["negative"] = [" ".join(rng.sample(tiny_run.WORDS, k=4))]
    return list(rows.values())


@pytest.fixture(scope="module")
def lab(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Lab:
    folder = tmp_path_factory.mktemp("embedding")
    tiny_run.write_jsonl(folder / "eval.jsonl", scrambled(100, seed=1))
    return Lab(zygote, folder, tiny_model, tiny_run.write_jsonl(folder / "train.jsonl", scrambled(600, seed=0)))


def changes(lab: Lab, **more: Any) -> dict[str, Any]:
    """A recipe of 24 steps of four rows, about 36 queries, whose vectors are made of the last token's state."""
    return {
        "workflow": {"type": "embedding"},
        "model": {"head": {"type": "embedding", "pooling": "last", "dimensions": 16}},
        "data": {"eval": [{"type": "jsonl", "path": str(lab.folder / "eval.jsonl")}]},
        "schedule": {"type": "constant"},
        "global_batch_size": 4,
        "num_steps": 24,
        **more,
    }


@pytest.fixture(scope="module")
def trained(lab: Lab) -> Path:
    return lab.train("trained", **changes(lab))


def test_recall_on_held_out_rows_rises(trained: Path) -> None:
    losses, recall = column(trained, "loss"), column(trained, "eval_recall@1")
    assert sum(losses[-3:]) / 3 < losses[0] / 3
    assert recall[0] < 0.4 and recall[-1] > 0.6
    assert column(trained, "eval_loss")[-1] < column(trained, "eval_loss")[0] / 3
    for first, last in (column(trained, f"eval_{name}") for name in ("mrr", "ndcg@10", "recall@10")):
        assert last > first + 0.2
    assert min(column(trained, "negatives")) > 20  # of all four rows, not of the one that is computed at a time


def test_the_metrics_are_those_of_the_exported_model(trained: Path, lab: Lab) -> None:
    """Plain transformers and the folder's own tokenizer, one text at a time, ranked in plain Python."""
    from transformers import AutoModel, AutoTokenizer

    folder = trained / "model"
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModel.from_pretrained(folder).eval()
    weight = load_file(folder / "2_Dense" / "model.safetensors")["linear.weight"]

    def embed(text: str) -> torch.Tensor:
        with torch.no_grad():
            vector = weight @ model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1]
        return vector / vector.norm()

    rows = [json.loads(line) for line in (lab.folder / "eval.jsonl").read_text().splitlines()]
    texts = dict.fromkeys(text for row in rows for text in (row["positive"], *row.get("negative", ())))
    corpus = {text: embed(text) for text in texts}
    ranks = []
    for row in rows:
        query = embed(row["query"])
        own = float(query @ corpus[row["positive"]])
        ranks.append(sum(float(query @ vector) >= own for vector in corpus.values()))
    assert column(trained, "eval_recall@1")[-1] == pytest.approx(sum(rank == 1 for rank in ranks) / 100, abs=0.011)
    assert column(trained, "eval_mrr")[-1] == pytest.approx(sum(1 / rank for rank in ranks) / 100, abs=0.006)

    kinds = [module["type"].rpartition(".")[2] for module in json.loads((folder / "modules.json").read_text())]
    assert kinds == ["Transformer", "Pooling", "Dense", "Normalize"]
    assert json.loads((folder / "1_Pooling" / "config.json").read_text())["pooling_mode_lasttoken"] is True


def test_micro_batches_change_memory_alone(trained: Path, lab: Lab) -> None:
    whole = lab.train("whole", **changes(lab, micro_batch_size=4, num_steps=4))
    assert column(whole, "loss") == pytest.approx(column(trained, "loss")[:4], rel=1e-5)
    assert column(whole, "grad_norm") == pytest.approx(column(trained, "grad_norm")[:4], rel=1e-4)


@pytest.mark.long
def test_an_adapter_with_dropout_resumes_bit_for_bit_and_is_merged(lab: Lab) -> None:
    adapter = {"type": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.2}
    model = {"head": {"type": "embedding"}, "adapter": adapter}
    same = changes(lab, model=model, num_steps=8, optimizer={"type": "adamw", "learning_rate": 0.02})
    run_dir = lab.train("adapted", **same)
    lab.train("stopped", "stop_after=3", expect=75, **same)
    lab.resume("stopped")
    assert tiny_run.losses(lab.folder / "stopped") == tiny_run.losses(run_dir)
    files = [folder / "model" / "model.safetensors" for folder in (run_dir, lab.folder / "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not (run_dir / "model" / "adapter_config.json").exists()
    assert not any("lora" in name for name in load_file(files[0]))
    shutil.rmtree(run_dir / "model")
    code, output = lab.burnish("export", run_dir, "--to", run_dir / "model")
    assert code == 0 and "embeddings differ by at most" in output
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model": {"head": {"type": "lm"}}}, "the loss info_nce reads embeddings, which no head makes"),
        ({"workflow": {"type": "sft", "loss": {"type": "info_nce"}}}, "compares all documents of a step"),
        ({"workflow": {"type": "embedding", "loss": {"type": "nll"}}}, "has vectors for its loss, and nll reads"),
        ({"global_batch_size": 1, "data": {"packing": {"type": "none"}}}, "one unpacked row a step holds one query"),
    ],
    ids=["head", "workflow", "loss", "batch"],
)
def test_what_does_not_fit_is_refused_before_anything_is_spent(wrong: dict[str, Any], message: str, lab: Lab) -> None:
    run_dir = lab.train("refused", expect=2, **changes(lab) | wrong)
    _, output = lab.burnish("train", lab.folder / "refused.yaml")
    assert message in output and "cure: " in output and "refused.yaml:" in output
    assert not run_dir.exists()
