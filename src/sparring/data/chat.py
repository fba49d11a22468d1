"""The only user of a chat template: messages -> the tokens of the prompt, and those of the response that continues it.

A template is read once, through a probe, for what it prints around an answer. A row is then rendered twice, as the
prompt and as the whole, and tokenized in two parts: a response's tokens follow exactly those that a model reads before
it answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jinja2

from sparring.records import Response, Tokens, tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
Message = Mapping[str, Any]
Content = str | Sequence[Message]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END_MARK = "<|im_end|>"
QUESTION, ANSWER = "Question-7d1f", "Answer-3c9e"  # the probe: no white space to strip, nothing that templates look for


class BadRow(ValueError):
    """A row that cannot be trained on; ``reason`` is short and stable, so that rows can be counted by it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Chat:
    """A tokenizer with its chat template: prompts and responses as token ids.

    ``pad_id`` fills batches (the tokenizer's pad token, else its eos: nothing is added to the vocabulary). ``end_id``
    ends every trained response: the template's end of turn, or eos where it prints none. ``end_ids`` end a generated
    one. ``warnings`` names the rules that the template breaks, once each. A template from ``chat_template_path``
    becomes the tokenizer's, so that it is saved with the model. Raises ValueError where there is no template, no eos,
    or a template that cannot render a question and its answer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        apply_chat_template: bool = True,
        chat_template_path: str | None = None,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        if chat_template_path and not apply_chat_template:
            given = f"chat_template_path is {chat_template_path!r}"
            raise ValueError(f"{given}, but apply_chat_template is false: drop one of the two")
        self.tokenizer = tokenizer
        self.apply_chat_template = apply_chat_template
        self.warnings: list[str] = []
        eos, pad = _known(tokenizer.eos_token_id), _known(tokenizer.pad_token_id)
        if not (pad or eos):
            raise ValueError("the tokenizer has no pad and no eos token: set eos_token in its tokenizer_config.json")
        self.pad_id: int = (pad or eos)[0]
        added = {str(token): token.special for token in tokenizer.added_tokens_decoder.values()}
        special = {*tokenizer.all_special_tokens, *(text for text, is_special in added.items() if is_special)}
        marks = special | {text for text in added if text.strip()}  # Gemma's added tokens include runs of white space
        self._bos: list[int] = []  # what the tokenizer itself puts before plain text
        if list(tokenizer("a")["input_ids"][:1]) == _known(tokenizer.bos_token_id):
            self._bos = _known(tokenizer.bos_token_id)
        # What stands before an answer, between it and its end of turn, and from its end of turn on.
        self._before, self._closing, self._after = "\n", "", ""
        ends = eos
        if apply_chat_template:
            if chat_template_path:
                tokenizer.chat_template = self._read(chat_template_path, marks)
            if not tokenizer.chat_template:
                raise ValueError(
                    "the tokenizer has no chat template: give one with --chat_template_path chatml (or file.jinja), "
                    "or train on plain text with --apply_chat_template false"
                )
            ends = self._probe(marks) or eos
        if not ends:
            raise ValueError("there is no end of turn: set eos_token in the tokenizer's tokenizer_config.json")
        self.end_id: int = ends[0]
        self.end_ids = frozenset({self.end_id, *eos, *eos_token_ids})
        spaced = " " + ANSWER  # SentencePiece models decode it without the space
        self._exact = self.decode(self._continue([spaced])[0]) == spaced
        self._special = _any_of({*special, str(tokenizer.convert_ids_to_tokens(self.end_id))})

    def prompt(self, content: Content) -> tuple[str, Tokens]:
        """The text and the tokens of what the model reads before it answers ``content``.

        A text is one user message; without a template it is read as it stands, after BOS where the tokenizer itself
        adds one. Raises BadRow for an empty prompt, text that spells a special token, messages that the template
        refuses.
        """
        return _good(self.prompts([content])[0])

    def response(self, content: Content, answer: Content) -> Response:
        """``answer`` as tokens that continue exactly ``content``'s prompt, end of turn included.

        What the template prints after its end of turn is no part of it. Raises BadRow as :meth:`prompt` does, and for
        an answer that is empty or more than a text or one assistant message.
        """
        return _good(self.responses([(content, self.prompt(content)[0], answer)])[0])

    def prompts(self, contents: Sequence[Content]) -> list[tuple[str, Tokens] | BadRow]:
        """:meth:`prompt` for many, tokenized together; a bad row is returned in its place."""
        texts = [self._asked(content) for content in contents]
        ids = iter(self._ids([text for text in texts if isinstance(text, str)]))
        bos = [] if self.apply_chat_template else self._bos  # a template prints its own
        return [(text, tokens(bos + next(ids))) if isinstance(text, str) else text for text in texts]

    def responses(self, rows: Sequence[tuple[Content, str, Content]]) -> list[Response | BadRow]:
        """:meth:`response` for many (content, its prompt's text, answer), likewise."""
        texts = [self._answered(*row) for row in rows]
        ids = iter(self._continue([text for text in texts if isinstance(text, str)]))

        def made(text: str) -> Response:
            written = next(ids)
            plain = self._special.sub("", text) if self._exact else self.decode(written)  # as a generated one's is
            return Response(plain, tokens([*written, self.end_id]), "human")

        return [made(text) if isinstance(text, str) else text for text in texts]

    def continuation(self, text: str) -> list[int]:
        """The tokens of a text that follows a prompt, with no end of turn."""
        return self._continue([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids`` without special tokens and ends of turn."""
        kept = [i for i in ids if i not in self.end_ids]
        return str(self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _asked(self, content: Content) -> str | BadRow:
        """The rendered prompt."""
        messages = self._messages("user", content)
        if not messages or not _text(messages[-1]).strip():
            return BadRow("empty prompt")
        if self._smuggles(messages):
            return BadRow("special token in the text")
        return self._render(messages, add_generation_prompt=True)

    def _answered(self, content: Content, prompt: str, answer: Content) -> str | BadRow:
        """What is written after ``prompt``, up to the end of turn."""
        messages = self._messages("assistant", answer)
        if not messages or messages[-1].get("role") != "assistant":
            return BadRow("no assistant turn")
        if len(messages) > 1:
            return BadRow("more than one turn in the response")
        if not _text(messages[0]).strip():
            return BadRow("empty response")
        if self._smuggles(messages):
            return BadRow("special token in the text")
        if not self.apply_chat_template:
            return _text(messages[0])
        whole = self._render([*self._messages("user", content), *messages])
        if isinstance(whole, BadRow):
            return whole
        if whole.startswith(prompt) and whole.endswith(self._after):
            rest = whole[len(prompt) : len(whole) - len(self._after)] + self._closing
            return rest if rest.strip() else BadRow("empty response")
        self._warn(
            "the chat template prints a prompt in another way once it is answered",
            ": responses are put after the prompt as it is printed for generation. Look at a few rows, or give another "
            "template with --chat_template_path",
        )
        return _text(messages[0]) + self._closing

    def _continue(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of texts that follow a prompt."""
        found: dict[int, list[int]] = {}
        # They are tokenized behind what stands before an answer: alone, SentencePiece models put a space before them.
        # Where a text's beginning merges with that, something else stands there: the prompt's tokens stay what they are.
        for before in (self._before, "\n", "0", ""):
            left = [n for n in range(len(texts)) if n not in found]
            start = self._ids([before])[0]
            for n, ids in zip(left, self._ids([before + texts[n] for n in left]), strict=True):
                if ids[: len(start)] == start:
                    found[n] = ids[len(start) :]
        return [found[n] for n in range(len(texts))]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # Rendered text holds its BOS already: the tokenizer adds none.
        options: dict[str, Any] = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        found: list[list[int]] = self.tokenizer(texts, **options)["input_ids"] if texts else []
        return found

    def _messages(self, role: str, content: Content) -> list[Message]:
        if isinstance(content, str):
            return [{"role": role, "content": content}]
        if not self.apply_chat_template:
            raise ValueError("a list of messages needs a chat template: give texts, or set --apply_chat_template true")
        return list(content)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str | BadRow:
        if not self.apply_chat_template:
            return "".join(map(_text, messages))
        conversation: Any = [dict(message) for message in messages]
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        try:
            return str(self.tokenizer.apply_chat_template(conversation, **options))
        except (jinja2.TemplateError, TypeError) as problem:  # TypeError: it adds up what a message does not have
            self._warn("the chat template refuses rows", f": {problem}")
            return BadRow("refused by the chat template")

    def _probe(self, marks: set[str]) -> list[int]:
        """Reads what the template prints around an answer; its end of turn, or nothing."""
        question, answer = self._messages("user", QUESTION), self._messages("assistant", ANSWER)
        prompt, whole = self._render(question, add_generation_prompt=True), self._render([*question, *answer])
        remedy = "give another one with --chat_template_path (chatml is built in)"
        if isinstance(prompt, BadRow) or isinstance(whole, BadRow):
            raise ValueError(f"{self.warnings[0]}, even one question and one answer: {remedy}")
        if QUESTION not in prompt or ANSWER not in whole:
            raise ValueError(f"the chat template does not print what the messages say: {remedy}")
        self._before, self._after = prompt.rpartition(QUESTION)[2], whole.rpartition(ANSWER)[2]
        end = _any_of(marks).search(self._after)
        if end:
            self._closing = self._after[: end.start()]
        else:
            mere = f"ends a turn with {self._after!r}, which is no token"
            rule = mere if self._after.strip() else "prints no end of turn"
            self._warn(f"the chat template {rule}", f": responses end with the eos token {self.tokenizer.eos_token!r}")
        bos = self.tokenizer.bos_token
        if self._bos and isinstance(bos, str) and not prompt.startswith(bos):
            self._warn(f"the chat template prints no {bos}", ", which the tokenizer adds to plain text")
        opening = whole[len(prompt) :].partition(ANSWER)[0] if whole.startswith(prompt) else ""
        if opening.strip():
            self._warn(
                f"the chat template prints {opening!r} before an answer, but not at the end of a prompt",
                ": given responses begin with it, and the model learns to write it",
            )
        return _known(self.tokenizer.convert_tokens_to_ids(end[0])) if end else []

    def _read(self, path: str, marks: set[str]) -> str:
        if path == "chatml":
            # Where <|im_end|> is mere text, the turn ends with eos, so that generation stops at one token.
            ended = CHATML if END_MARK in marks else CHATML.replace(END_MARK, "{{ eos_token }}")
            return "{{ bos_token }}" * len(self._bos) + ended
        if not Path(path).is_file():
            raise ValueError(f"no chat template at {path}: give a Jinja file, or chatml for the built-in one")
        return Path(path).read_text(encoding="utf-8")

    def _smuggles(self, messages: Sequence[Message]) -> bool:
        """Whether anything in the messages spells a special token, which the tokenizer would take for the real one."""
        values = (value if isinstance(value, str) else repr(value) for turn in messages for value in turn.values())
        return any(map(self._special.search, values))

    def _warn(self, rule: str, about: str) -> None:
        if not any(words.startswith(rule) for words in self.warnings):
            self.warnings.append(rule + about)


def _text(message: Message) -> str:
    return str(message.get("content") or "")


def _known(token_id: Any) -> list[int]:
    return [token_id] if isinstance(token_id, int) else []


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    # The longest first; without any, a pattern that matches nothing.
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def _good(found: T | BadRow) -> T:
    if isinstance(found, BadRow):
        raise found
    return found
