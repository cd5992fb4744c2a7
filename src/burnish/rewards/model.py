"""A trained reward model: the folder of a reward run scores completions."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge
from pydantic import Field

from burnish.errors import ModelError
from burnish.rewards.base import Reward

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


class Model(Reward):
    """What a sequence classifier of one output says of prompt and completion, rendered as training rendered them."""

    type: Literal["model"] = "model"
    path: str
    """A run folder, the folder of an export (an adapter's too), or a hub id."""
    batch_size: Annotated[int, Ge(1)] = 16
    """Conversations scored at once."""
    chat_template_kwargs: dict[str, Any] = {}
    """As in `data.renderer` of the run that trained it."""
    today: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] = "2025-01-01"
    """As in `data.renderer`: the date for templates that write today's."""

    def open(self) -> ModelReward:
        """Loads classifier and tokenizer, onto the GPU if there is one.

        Raises:
            ModelError: nothing is there, or it is no classifier of one output.
        """
        import torch
        from transformers import AutoTokenizer

        classifier, folder = _classifier(self.path)
        if classifier.config.num_labels != 1:
            raise ModelError(
                f"it has {classifier.config.num_labels} outputs, and a reward is one number",
                where=self.path,
                cure="train it with `model.head: {type: scalar}`",
            )
        if getattr(classifier.config, "grades_steps", False):
            raise ModelError(
                "it grades steps, and was never trained at the end of an answer, where a reward is read",
                where=self.path,
                cure="train on whole answers: `workflow: {type: reward, loss: {type: bradley_terry}}`",
            )
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        return ModelReward(self, classifier.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer)


class ModelReward:
    """A reward model in memory; see `LiveReward` for how it is asked."""

    def __init__(self, config: Model, classifier: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config, self.classifier, self.tokenizer = config, classifier, tokenizer
        # "" is [bos, eos], [eos], [bos] or []: our exports end a text, other classifiers' tokenizers mostly do not.
        empty: Any = tokenizer("").input_ids
        is_begun = empty[:1] == [tokenizer.bos_token_id] and (
            len(empty) > 1 or tokenizer.bos_token_id != tokenizer.eos_token_id
        )
        self._bos = empty[:1] if is_begun else []

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]) -> list[float]:
        """One reward for each completion; `tools` and `chat_template_kwargs` are read of the columns."""
        import torch

        template = {name: columns[name] for name in ("tools", "chat_template_kwargs") if name in columns}
        rows = [{name: values[i] for name, values in template.items()} for i in range(len(prompts))]
        ids = [self.token_ids(*each) for each in zip(prompts, completions, rows, strict=True)]
        rewards = torch.empty(len(ids))
        by_length = sorted(range(len(ids)), key=lambda index: len(ids[index]))  # little padding in a batch
        for start in range(0, len(ids), self.config.batch_size):
            batch = by_length[start : start + self.config.batch_size]
            rewards[batch] = self._scores([ids[index] for index in batch])
        return rewards.tolist()

    def token_ids(self, prompt: Any, completion: Any, row: dict[str, Any]) -> list[int]:
        """What training makes of the two: messages through the chat template; strings one after the other, between the
        tokens that begin and end a text."""
        if isinstance(completion, str):
            inner = self.tokenizer(prompt + completion, add_special_tokens=False).input_ids
            return [*self._bos, *inner, self.tokenizer.eos_token_id]  # pyright: ignore[reportReturnType, reportGeneralTypeIssues]
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        text = self.tokenizer.apply_chat_template(
            [*before, *completion],
            tools=row.get("tools"),
            tokenize=False,
            strftime_now=datetime.fromisoformat(self.config.today).strftime,
            **self.config.chat_template_kwargs | (row.get("chat_template_kwargs") or {}),
        )
        return self.tokenizer(text, add_special_tokens=False).input_ids  # pyright: ignore[reportReturnType, reportArgumentType]

    def _scores(self, ids: list[list[int]]) -> Tensor:
        import torch

        pad: Any = self.tokenizer.pad_token_id
        longest = max(map(len, ids))
        batch = torch.tensor([row + [pad] * (longest - len(row)) for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
        device = self.classifier.device
        with torch.no_grad():
            said = self.classifier(input_ids=batch.to(device), attention_mask=mask.to(device), use_cache=False)
        return said.logits[:, 0].float().cpu()


def _classifier(path: str) -> tuple[Any, str]:
    """(the classifier, the folder or hub id that holds its tokenizer)."""
    import json

    from transformers import AutoConfig

    from burnish.model.config import ModelConfig
    from burnish.model.export_scores import open_classifier
    from burnish.model.load import locate

    folder = Path(path).expanduser()
    if (folder / "recipe.json").exists():
        folder = folder / "model"
    name = str(folder) if folder.is_dir() else path
    config: Any = AutoConfig.from_pretrained(**locate(ModelConfig(path=name)))
    adapter, base = folder / "adapter_config.json", None
    if adapter.exists():
        written = json.loads(adapter.read_text())
        base = locate(ModelConfig(path=written["base_model_name_or_path"], revision=written.get("revision") or "main"))
        kind = written["task_type"]
    else:
        kind = (config.architectures or ["?"])[0]
    if kind != "SEQ_CLS" and not kind.endswith("ForSequenceClassification"):
        raise ModelError(
            f"a {kind} is not a reward model",
            where=path,
            cure="name the folder of a run of `workflow: {type: reward}`, or of any sequence classifier",
        )
    # transformers' SDPA path leaves out the soft cap of Gemma 2.
    attention = "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None
    return open_classifier(name, dtype=config.dtype, base=base, attention=attention), name
