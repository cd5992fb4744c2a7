"""What tests fork from has imported this: nearly all that a small run imports, 2 s of a core a process beside torch.

Imported by the process that is forked, so that every fork has it. Must run no torch operator.
"""

from __future__ import annotations

import importlib

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

MODULES = (
    "peft",
    "tokenizers",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers.integrations.tensor_parallel",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "burnish.cli",
    "burnish.commands.train",
    "burnish.data.one_sided",
    "burnish.data.packing.best_fit",
    "burnish.data.renderers.chat",
    "burnish.data.rendering.sandbox",
    "burnish.data.rendering.tokens",
    "burnish.data.sources.jsonl",
    "burnish.data.stream",
    "burnish.data.tokenizers.pretrained",
    "burnish.launch.local",
    "burnish.launch.rank",
    "burnish.launch.second",
    "burnish.launch.texts",
    "burnish.losses.nll",
    "burnish.mesh",
    "burnish.model.export",
    "burnish.model.heads.lm",
    "burnish.model.leak",
    "burnish.model.load",
    "burnish.policy.answers",
    "burnish.policy.checkpoint",
    "burnish.policy.frozen",
    "burnish.policy.optimizers.adamw",
    "burnish.policy.policy",
    "burnish.policy.throughput",
    "burnish.recipe",
    "burnish.schedules.cosine",
    "burnish.workflows.sft",
)

for _name in MODULES:
    importlib.import_module(_name)
get_checkpoint_conversion_mapping("llama")  # 700 regular expressions, compiled once
