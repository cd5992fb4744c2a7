"""RecBole's SASRec on one CPU, as `bench/recommendation.py` runs it in a virtual environment of its own.

    python bench/_recbole.py FOLDER EPOCHS THREADS

FOLDER holds ml-100k/ml-100k.inter. One JSON object an epoch: seconds of training, NDCG@10 on valid and on test.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed

SETTINGS = {
    # What its documentation gives for leave-one-out, full ranking and next items.
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
    "train_neg_sample_args": None,
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "MAX_ITEM_LIST_LENGTH": 50,
    "metrics": ["NDCG"],
    "topk": [10],
    "valid_metric": "NDCG@10",
    "metric_decimal_place": 6,
    # SASRec's own defaults, said once more: 2 layers, 2 heads, 64 wide, 256 inside, dropout 0.5, Adam at 1e-3.
    "loss_type": "CE",
    "n_layers": 2,
    "n_heads": 2,
    "hidden_size": 64,
    "inner_size": 256,
    "learning_rate": 1e-3,
    "train_batch_size": 2048,
    "use_gpu": False,
    "show_progress": False,
    "state": "ERROR",
    "seed": 0,
}


def main() -> None:
    folder, epochs, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    sys.argv[1:] = []  # RecBole reads it too
    torch.set_num_threads(threads)
    config = Config(model="SASRec", dataset="ml-100k", config_dict={**SETTINGS, "data_path": folder})
    init_seed(0, False)
    dataset = create_dataset(config)
    train, valid, test = data_preparation(config, dataset)
    model = get_model("SASRec")(config, train.dataset)
    trainer = get_trainer(config["MODEL_TYPE"], "SASRec")(config, model)
    for epoch in range(epochs):
        started = time.process_time()
        trainer._train_epoch(train, epoch)
        seconds = time.process_time() - started
        scores = {
            name: float(trainer.evaluate(rows, load_best_model=False)["ndcg@10"])
            for name, rows in (("valid", valid), ("test", test))
        }
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(json.dumps({"epoch": epoch + 1, "seconds": seconds, "parameters": parameters, **scores}), flush=True)


if __name__ == "__main__":
    main()
