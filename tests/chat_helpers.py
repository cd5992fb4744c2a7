"""Tokenizers and readable masks for tests of the chat renderer."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from burnish.data.renderers.chat import LiveChat
from burnish.types import Rendered, Row, Sample

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\n' }}
    {%- if m.role == 'assistant' %}
        {%- set content = m.content or '' %}
        {%- set thought = m.reasoning_content or '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip() %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and thought %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}
        {{- content }}
        {%- for call in m.tool_calls or [] %}
            {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}
        {%- endfor %}
    {%- else %}
        {{- m.content }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CORPUS = ["the cat sat on the mat and the dog ran to the assistant user system\n" * 4, "def f(x): return x\n\n" * 4]


def byte_level(template: str | None = CHATML, specials: Sequence[str] = SPECIALS, merges: int = 0, **kwargs: object):
    """Byte-level BPE. Without merges every ASCII character is a token, so masks can be read."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=len(alphabet) + merges, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([AddedToken(special, special=True, normalized=False) for special in specials])
    names = {"eos_token": specials[0], "bos_token": specials[0], **kwargs} if specials else kwargs
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = template
    return tokenizer


def shown(tokenizer: PreTrainedTokenizerFast, sample: Sample) -> str:
    """The text of a sample with [[ ]] around each run of trained tokens.

    >>> # "<|im_start|>assistant\\n[[Hi<|im_end|>]]\\n"
    """
    out, inside = [], False
    for token_id, trained in zip(sample.token_ids.tolist(), sample.loss_mask.tolist(), strict=True):
        if trained != inside:
            out.append("[[" if trained else "]]")
            inside = trained
        out.append(tokenizer.decode([token_id]))
    return "".join(out) + ("]]" if inside else "")


def row(*messages: dict, **record: object) -> Row:
    return Row({"messages": list(messages), **record}, "data/train.jsonl:7")


def user(content: object) -> dict:
    return {"role": "user", "content": content}


def assistant(content: object = "", **message: object) -> dict:
    return {"role": "assistant", "content": content, **message}


def render_one(live: LiveChat, one: Row) -> Rendered:
    (rendered,) = live.render([one])
    if rendered.group is not None:
        assert rendered.fates.total() == len(rendered.group)
        (sample,) = rendered.group.samples
        assert rendered.fates["trained"] == sample.loss_mask.sum()
    return rendered


def mask_of(live: LiveChat, tokenizer: PreTrainedTokenizerFast, one: Row) -> str:
    rendered = render_one(live, one)
    assert rendered.refusal is None, rendered.refusal
    assert rendered.group is not None
    return shown(tokenizer, rendered.group.samples[0])


def refusal_of(live: LiveChat, one: Row) -> str:
    rendered = render_one(live, one)
    assert rendered.group is None
    assert rendered.refusal is not None
    return str(rendered.refusal)
