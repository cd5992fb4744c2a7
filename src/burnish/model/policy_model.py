"""The model under training: a Hugging Face backbone and head, run over packed blocks.

`PolicyModel` takes the two children of any `AutoModelForCausalLM` under the names they have there (`model` and
`lm_head`, or `gpt_neox` and `lm_head`), so every parameter keeps its Hugging Face name. Its forward pass runs the
backbone and then the projection; both happen inside one module, which makes it the place to shard: the head is gathered
when the projection reads it. It must not know recipes, losses or optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import register_dataclass

from burnish.errors import ModelError
from burnish.model import head_chunks
from burnish.model.divergence import Reference
from burnish.model.project import PROJECTED, project
from burnish.model.shards import Whole, reader
from burnish.model.vocabulary import head_weight_with_rows, rows_owner, with_new_rows
from burnish.model.vocabulary_shard import WHOLE
from burnish.types import Block, Ranking, TokenOutputs, previous_token

if TYPE_CHECKING:
    from burnish.mesh import Mesh
    from burnish.model.attention import Decoding
    from burnish.model.config import Adapter
    from burnish.model.context_parallel import ContextParallel
    from burnish.model.heads.base import Head
    from burnish.types import NewTokens

# FSDP finds the tensors that a module returns by walking its output; without this it would see one opaque object and
# never learn when the backward pass reaches the root.
register_dataclass(TokenOutputs)


class PolicyModel(nn.Module):
    """Backbone, head and projection of one causal language model.

    Args:
        causal_lm: what `AutoModelForCausalLM` returned. Its modules are shared, not copied.
        projection_chunk: tokens projected to the vocabulary at once.
        pad_vocab_to: rows of the head (and of a tied embedding) are padded with zeros to a multiple of this.

    Raises:
        ModelError: it is not a backbone followed by one linear head.
    """

    def __init__(self, causal_lm: Any, *, projection_chunk: int = 256, pad_vocab_to: int = 1) -> None:
        super().__init__()
        self.base_name, self.head_name = _children(causal_lm)
        self.add_module(self.base_name, getattr(causal_lm, self.base_name))
        self.add_module(self.head_name, getattr(causal_lm, self.head_name))
        self.hf_config = causal_lm.config
        # In a tuple, because it is not a child: its parameters are those of the two children. Saving goes through it.
        self._causal_lm = (causal_lm,)
        text_config = causal_lm.config.get_text_config()
        self.softcap: float | None = getattr(text_config, "final_logit_softcapping", None)
        self.logit_scale = _logit_scale(text_config)
        self.temperature = 1.0
        """Logits are divided by it: that of the rollouts it learns from."""
        self.projection_chunk = projection_chunk
        self.adapter: Adapter | None = None
        """What was applied to it, if anything was."""
        self.new_tokens: NewTokens | None = None
        """What its vocabulary has beside the tokens of the model it was read from, if anything."""
        self.heads: dict[str, Head] = {}
        """The children that are heads beside the language model's, by name; see `heads.attach`."""
        self.makes_tokens = True
        """Whether losses may ask of the language model's head; False: what is left of it is for probes."""
        self.mesh: Mesh | None = None
        """The ranks that it is cut over, once it is."""
        self.context: ContextParallel | None = None
        """Which tokens of a row this rank runs, where ranks share them."""
        self.tp_dims: dict[str, int] = {}
        """Which dim of a parameter tensor parallel cuts, by each of its names; absent ones are whole on each."""
        self.tp_partial: set[str] = set()
        """Whole ones of which each rank has a share of the gradient; see `tensor_parallel.finish_gradients`."""
        self.vocabulary_shard = WHOLE
        """Which rows of the head are on this rank."""
        self.vocab_size = self.head.weight.shape[0]
        """Rows of the head that stand for tokens; those after them are padding."""
        self._pad_vocabulary(pad_vocab_to)
        head = {id(parameter) for parameter in self.head.parameters()}
        names = {name for name, p in self.named_parameters(remove_duplicate=False) if id(p) in head}
        self.padded = frozenset(name.rpartition(".")[0] for name in names)
        """Names of the modules whose weights have those rows: the head, and an embedding tied to it."""

    @classmethod
    def from_hf(
        cls, causal_lm: Any, *, attention: str = "auto", projection_chunk: int = 256, pad_vocab_to: int = 1
    ) -> PolicyModel:
        """The policy over a transformers model that is already in memory, attending within documents only.

        Args:
            attention: kernel under the operator, see `attention.document_attention`.

        Raises:
            ModelError: the model cannot take an attention function from outside.
        """
        from burnish.model.attention import register

        if not causal_lm._can_set_attn_implementation():
            raise ModelError(
                f"{type(causal_lm).__name__} does not take an attention function from outside",
                cure="use a model of transformers that supports its attention interface",
            )
        register()
        causal_lm.set_attn_implementation("burnish" if attention == "auto" else f"burnish_{attention}")
        return cls(causal_lm, projection_chunk=projection_chunk, pad_vocab_to=pad_vocab_to)

    @property
    def causal_lm(self) -> Any:
        """The transformers model these modules came from: same parameters, and the one that can generate and save."""
        return self._causal_lm[0]

    @property
    def backbone(self) -> nn.Module:
        """Token ids to hidden states; `model` in most families."""
        return self._modules[self.base_name]  # pyright: ignore[reportReturnType]

    @property
    def head(self) -> Any:
        """Hidden states to logits: a linear layer, `lm_head` in most families."""
        return self._modules[self.head_name]

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer layers, in order: what is checkpointed, compiled and sharded one by one."""
        return decoder_layers(self.causal_lm)

    @property
    def is_tied(self) -> bool:
        """The head computes with the embedding's weight; a low-rank adapter on either gives them different ones."""
        embedding = self.causal_lm.get_input_embeddings()
        adapted = hasattr(self.head, "base_layer") or hasattr(embedding, "base_layer")
        return self.head.weight is embedding.weight and not adapted

    def head_weight(self) -> Tensor:
        """The weight [V, H] that the head computes with, an adapter on it included; a gradient flows to what trains.
        Under tensor parallel it is this rank's rows of it. Inside `forward` only, where the model is sharded."""
        from burnish.model.adapters.weights import adapted_weight

        owner = rows_owner(self)
        if owner is not None:
            return head_weight_with_rows(self.head, owner, self.vocabulary_shard.first)
        adapted = hasattr(self.head, "base_layer") and not self.head.disable_adapters
        return adapted_weight(self.head) if adapted else self.head.weight

    def forward(
        self,
        block: Block,
        *,
        needs: frozenset[str],
        reads: Tensor,
        coefficients: Tensor | None = None,
        topk_ids: Tensor | None = None,
        candidates: Tensor | None = None,
        ranking: Ranking | None = None,
        reference: Reference | None = None,
    ) -> TokenOutputs:
        """What a loss needs of every token it reads.

        Args:
            block: packed rows of T tokens.
            needs: names of `TokenOutputs` fields.
            reads: bool [T].
            coefficients: float32 [T], with `weighted_nll` only.
            topk_ids: int64 [T, K], with `topk_logprobs` only.
            candidates: int64 [K], with `candidate_logits` only.
            ranking: with `ranks` only.
            reference: with `full_kl` only.
        """
        hidden_TH, outputs = self.hidden_states(block), TokenOutputs()
        if needs & PROJECTED:
            outputs = project(
                hidden_TH,
                self.head_weight(),
                block.token_ids,
                reads,
                needs & PROJECTED,
                bias=self.head.bias,
                coefficients_T=coefficients,
                topk_ids_TK=topk_ids,
                candidates_K=candidates,
                ranking=ranking,
                block=block,
                reference=reference,
                softcap=self.softcap,
                logit_scale=self.logit_scale,
                temperature=self.temperature,
                vocab_size=self.vocab_size,
                chunk=self.projection_chunk,
                shard=self.vocabulary_shard,
                previous_T=previous_token(block),
                first=0 if self.context is None else self.context.span(block.num_tokens)[0],
            )
        if self.context is not None:
            outputs = self.context.sum_outputs(outputs)
        for name, head in self.heads.items():
            made = self.get_submodule(name)(hidden_TH, block, reads) if head.makes in needs else None
            if made is not None and head.makes == "scores":
                outputs.scores[name] = made
            elif made is not None:
                outputs.embeddings = made
        return outputs

    def hidden_states(self, block: Block) -> Tensor:
        """The backbone's last hidden states, [T, H], in the dtype of the weights; under context parallel those of this
        rank's tokens."""
        tokens, further = slice(None), {}
        documents = block.documents.cpu()  # every layer reads it on the host: one wait here instead of one a layer
        if self.context is not None:
            tokens, further = slice(*self.context.span(block.num_tokens)), {"context_parallel": self.context}
            documents = self.context.clip(documents, block.num_tokens)
        return self.backbone(
            input_ids=block.token_ids[tokens].unsqueeze(0),
            position_ids=block.position_ids[tokens].unsqueeze(0),
            documents=documents,
            use_cache=False,
            **further,
        ).last_hidden_state.squeeze(0)

    def logits(self, block: Block) -> Tensor:
        """All logits [T, V], by transformers' own forward around these modules: for proofs on short blocks."""
        self.head_weight()  # writes the trained rows of new tokens into the matrix that transformers' forward reads
        outputs = self.causal_lm(
            input_ids=block.token_ids.unsqueeze(0),
            position_ids=block.position_ids.unsqueeze(0),
            documents=block.documents,
            use_cache=False,
        )
        return outputs.logits[0, :, : self.vocab_size].clone()  # FSDP warns of views

    def next_logits(self, token_ids: Tensor, position_ids: Tensor, rows: Tensor, decoding: Decoding) -> Tensor:
        """Float32 logits [n, V] of what follows the tokens `rows`, int64 [n], of a row: for sampling.

        Args:
            token_ids: int64 [T], the next tokens of sequences that `decoding` keeps.
            position_ids: int64 [T], of each in its sequence.
        """
        hidden_TH = self.backbone(
            input_ids=token_ids.unsqueeze(0),
            position_ids=position_ids.unsqueeze(0),
            decoding=decoding,
            use_cache=False,
        ).last_hidden_state.squeeze(0)
        head = head_chunks.Head(self.vocab_size, self.softcap, self.logit_scale, 1.0, len(rows), self.vocabulary_shard)
        hidden_nH = hidden_TH[rows]
        return head.logits(hidden_nH, self.head_weight(), self.head.bias, head.buffer(hidden_nH, 1)[0])[0]

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of everything the optimizer moves, in the model's order; a tied weight once."""
        return [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]

    def hf_tensors(self, *, merge: bool) -> Iterator[tuple[str, Tensor]]:
        """The full model under Hugging Face names: adapters folded in (`merge`) or left out, padding rows cut off, and
        without the heads beside the language model's: those are `head_tensors`. Every rank takes part, one tensor at a
        time."""
        for name, tensor in self.whole_tensors(merge=merge).items():
            yield name, tensor.make()

    def whole_tensors(self, *, merge: bool) -> dict[str, Whole]:
        """What `hf_tensors` yields, yet to be gathered."""
        from burnish.model.adapters.weights import weights_without_adapter

        found = {}
        for name, tensor in with_new_rows(self, weights_without_adapter(self, merge=merge)):
            if name.partition(".")[0] in self.heads:
                continue
            rows = tensor.shape[:1]
            if name.rpartition(".")[0] in self.padded and rows > (self.vocab_size,):
                make = partial(_first_rows, tensor.make, self.vocab_size)
                tensor = tensor._replace(make=make, shape=(self.vocab_size, *tensor.shape[1:]))
            found[name] = tensor
        return found

    def head_parameters(self) -> dict[str, Tensor]:
        """The parameters of the heads beside the language model's, by name (`score.weight`)."""
        state = self.state_dict(keep_vars=True)
        return {name: tensor for name, tensor in state.items() if name.partition(".")[0] in self.heads}

    def head_tensors(self) -> dict[str, Tensor]:
        """The same, whole: every rank takes part."""
        read = reader(self)
        return {name: read(tensor) for name, tensor in self.head_parameters().items()}

    def _pad_vocabulary(self, multiple: int) -> None:
        rows = -self.vocab_size % multiple
        if not rows:
            return
        tied, embedding = self.is_tied, self.causal_lm.get_input_embeddings()
        for name, parameter in self.head.named_parameters():
            zeros = parameter.new_zeros(rows, *parameter.shape[1:])
            setattr(self.head, name, nn.Parameter(torch.cat([parameter.detach(), zeros]), parameter.requires_grad))
        self.head.out_features += rows
        if tied:
            embedding.weight = self.head.weight
            embedding.num_embeddings += rows


def _first_rows(make: Callable[[], Tensor], count: int) -> Tensor:
    return make()[:count]


def _children(causal_lm: Any) -> tuple[str, str]:
    """Names of the backbone and of the head among a causal LM's children."""
    head = causal_lm.get_output_embeddings()
    names = {id(module): name for name, module in causal_lm.named_children()}
    base_name = causal_lm.base_model_prefix
    if not isinstance(head, nn.Linear) or id(head) not in names or base_name not in names.values():
        raise ModelError(
            f"{type(causal_lm).__name__} is not a backbone followed by one linear head",
            cure="use a decoder-only language model",
        )
    return base_name, names[id(head)]


def _logit_scale(config: Any) -> float:
    """Cohere multiplies its logits, Granite divides them. `verify_head` refuses a family with other customs."""
    return (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)


@torch.no_grad()
def verify_head(policy_model: PolicyModel) -> None:
    """Compares our log-probabilities of eight tokens with those of the transformers model around the same modules.

    Some families scale, cap or mix their logits under configuration keys of their own (HyperCLOVA multiplies where
    Granite divides, Falcon-H1 has `lm_head_multiplier`): training them at another temperature would go unnoticed.

    Raises:
        ModelError: they differ.
    """
    weight = policy_model.head.weight
    ids = torch.linspace(0, min(policy_model.vocab_size, weight.shape[0]) - 1, 8, device=weight.device).long()
    block = one_document(ids)
    expected = policy_model.logits(block)[:-1].float().log_softmax(-1).gather(1, block.token_ids[1:, None]).squeeze(1)
    ours = policy_model(block, needs=frozenset({"logprobs"}), reads=block.loss_mask).logprobs[1:]
    difference = ((ours - expected).abs().max() / expected.abs().max()).item()
    if not difference <= (1e-3 if weight.dtype == torch.float32 else 5e-2):
        raise ModelError(
            f"{type(policy_model.causal_lm).__name__} does something to its logits that Burnish does not know: "
            f"log-probabilities differ by {difference:.1g} of the largest",
            cure="train a family whose logits are a linear head, optionally scaled and soft-capped",
        )


def decoder_layers(causal_lm: Any) -> nn.ModuleList:
    """The transformer layers of a transformers model, in order.

    Raises:
        ModelError: it has no list of as many modules as its configuration has layers.
    """
    depth = causal_lm.config.get_text_config().num_hidden_layers
    for module in causal_lm.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ModelError(f"{type(causal_lm).__name__} has no list of {depth} layers")


def one_document(token_ids: Tensor) -> Block:
    """A row of one document, int64 [T], without padding; every token but the first trains."""
    index, length = torch.arange(len(token_ids), device=token_ids.device), len(token_ids)
    return Block(
        token_ids=token_ids,
        loss_mask=index > 0,
        position_ids=index,
        document_ids=torch.zeros_like(index),
        documents=torch.tensor([[0, length, 0, 0]], dtype=torch.int32, device=token_ids.device),
        group_ids=torch.zeros_like(index[:1]),
        sample_ids=("probe",),
    )
