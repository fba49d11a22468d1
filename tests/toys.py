"""Small tokenizers with the chat templates that people's models have. Not a test."""

import copy
import functools
from typing import Any, Literal

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sparring.data.chat import CHATML

SENTENCES = [
    "How many clips did Natalia sell altogether in April and May?",
    "Natalia sold 48/2 = 24 clips in May. She sold 48+24 = 72 clips altogether.\n#### 72",
    "user asks, assistant answers:\n\nthe answer is 4.\n\n\nWhat is two and two? It is four.",
]

LLAMA3 = (
    "{% for m in messages %}{% set text = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim %}"
    "{{ (bos_token if loop.first else '') + text + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(last_query=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last_query = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content = m.content %}"
    "{% if m.role == 'assistant' %}{% set thought = m.reasoning_content or '' %}{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last_query %}"
    "{% set content = '<think>\n' + thought + '\n</think>\n\n' + content %}{% endif %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The prompt ends in one newline and the answer begins with another: together they are one token.
MERGING = QWEN3.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}")
# The prompt opens a thought that the answered conversation does not hold.
REWRITING = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}{% else %}"
    "{{ '<|assistant|>' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
# Special tokens of the template's own within the response, as gpt-oss has them.
HARMONY = (
    "{% for m in messages %}{{ '<|start|>' + m.role + ('<|channel|>final' if m.role == 'assistant' else '') }}"
    "{{ '<|message|>' + m.content + ('<|return|>' if loop.last and m.role == 'assistant' else '<|end|>') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
OPEN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# Template, BOS, end of text, the other special tokens.
TEMPLATES: dict[str, tuple[str | None, str | None, str, list[str]]] = {
    "chatml": (CHATML, None, "<|im_end|>", ["<|im_start|>"]),
    "llama3": (
        LLAMA3,
        "<|begin_of_text|>",
        "<|end_of_text|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "zephyr": (ZEPHYR, None, "</s>", []),
    "mistral": (MISTRAL, "<s>", "</s>", []),
    "gemma": (GEMMA, "<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
    "qwen3": (QWEN3, None, "<|endoftext|>", ["<|im_start|>", "<|im_end|>"]),
    "merging": (MERGING, None, "<|endoftext|>", ["<|im_start|>", "<|im_end|>"]),
    "rewriting": (REWRITING, None, "</s>", ["<|user|>", "<|assistant|>"]),
    "harmony": (HARMONY, None, "<|return|>", ["<|start|>", "<|channel|>", "<|message|>", "<|end|>"]),
    "open": (OPEN, None, "</s>", []),
    "none": (None, "<s>", "</s>", []),
}


def toy_tokenizer(
    template: str = "chatml",
    *,
    kind: Literal["bytes", "metaspace"] = "bytes",
    vocab_size: int = 400,
    **changes: Any,
) -> PreTrainedTokenizerFast:
    """A BPE tokenizer of a few hundred tokens with one of TEMPLATES; ``changes`` go to the tokenizer (``eos_token=None``).

    ``metaspace`` is SentencePiece's way, as Llama 2 and Mistral have it: a text's first word gets a space. A tokenizer
    with a BOS puts it before plain text.
    """
    chat_template, bos, eos, others = TEMPLATES[template]
    backend = copy.deepcopy(
        _trained(kind, vocab_size, tuple(dict.fromkeys(["<unk>", *filter(None, [bos, eos]), *others])))
    )
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    options: dict[str, Any] = {"eos_token": eos, "bos_token": bos, "unk_token": "<unk>", "chat_template": chat_template}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **(options | changes))


@functools.cache
def _trained(kind: str, vocab_size: int, special: tuple[str, ...]) -> Tokenizer:
    alphabet: list[str]
    if kind == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        backend = Tokenizer(models.BPE(unk_token="<unk>"))
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        backend.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = [chr(code) for code in range(32, 127)] + ["\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(SENTENCES * 4, trainer)
    return backend
