"""Pre-training: recordings with their texts, segment by segment, in the seven tasks of the report.

The report is that of Kimi-Audio (https://arxiv.org/abs/2504.18425, section 4.1). A segment is heard
(speech codes with Whisper features), spoken (speech codes alone) or written; a task is a pattern of
these. Only what is spoken or written is learned, and of mappings only the second of each pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kimia_infer.data.conversations import Conversation, ConversationFile, DataError
from kimia_infer.models.kimi_audio.prompt import EncodedMessage, Message, Prompt, PromptBuilder
from kimia_infer.training.config import MixConfig
from kimia_infer.training.dataset import usable, with_line
from kimia_infer.training.samples import SampleBuilder

GIVEN, LEARNED = "user", "assistant"
"""Roles of messages of a piece; a document has no turns."""


class Form(NamedTuple):
    """How a segment stands in a sequence: as the message type ``kind``, with its text or not."""

    role: str
    kind: str
    written: bool


HEARD = Form(GIVEN, "audio", False)
SPOKEN = Form(LEARNED, "audio-text", False)
WRITTEN = Form(LEARNED, "text", True)
GIVEN_TEXT = Form(GIVEN, "text", True)
BOTH = Form(LEARNED, "audio-text", True)

PATTERNS: Mapping[str, tuple[tuple[Form, ...], ...]] = {
    "audio": ((SPOKEN,),),
    "text": ((WRITTEN,),),
    "transcription": ((HEARD, WRITTEN),),
    "speech": ((GIVEN_TEXT, SPOKEN),),
    "audio_to_audio": ((HEARD,), (SPOKEN,)),
    "audio_to_text": ((HEARD,), (WRITTEN,)),
    "audio_to_both": ((HEARD,), (BOTH,)),
}
"""The forms of segments in turn, by task: the first segment has those of the first tuple, and so
on, from the beginning again."""


class Piece(NamedTuple):
    """Segments ``first`` to ``end`` of the document in ``line``, for ``task``."""

    line: int
    task: str
    first: int
    end: int


@dataclass(frozen=True)
class DocumentBuilder(SampleBuilder):
    """Builds samples of pieces of documents, which have no turns: nothing says who speaks."""

    def _prompt(self, conversation: Conversation, computed: Mapping[int, Sequence[int]]) -> Prompt:
        messages = self._encoded(conversation, computed)
        builder = PromptBuilder(self.special, self.config.token_offset, self.config.audio_delay)
        return sequence(messages, builder)

    def positions(self, conversation: Conversation) -> int:
        """How long the sample of a piece is, whose codes are all there."""
        return len(self._prompt(conversation, {}))


def sequence(messages: Sequence[EncodedMessage], builder: PromptBuilder) -> Prompt:
    """Both tracks of a piece, with what is learned of them.

    A heard or spoken segment stands between the tokens that begin and end media, a written one
    ends with the token that ends texts. Where a segment is spoken and written, its codes begin
    ``audio_delay`` positions after its text, as in generated answers, and the shorter track is
    filled with blanks, which are not learned.
    """
    tokens, blank, offset = builder.tokens, builder.tokens.text_blank, builder.token_offset
    found = Prompt()
    for index, message in enumerate(messages):
        learned = message.role == LEARNED
        text = [*message.text_ids, tokens.text_eos]
        codes = [offset + code for code in message.codes]
        if message.message_type == "text":
            for text_id in text:
                found.add(blank, text_id, text_loss=learned)
        elif not message.text_ids:
            heard = message.message_type == "audio"
            found.add(tokens.media_begin, blank)
            for code in codes:
                found.add(code, blank, continuous=heard, audio_loss=learned)
            found.add(tokens.media_end, blank, audio_loss=learned)
            if heard:
                found.feature_messages.append(index)
        else:
            audio = [blank] * builder.audio_delay + [*codes, tokens.media_end]
            for place in range(max(len(audio), len(text))):
                spoken, written = place < len(audio), place < len(text)
                found.add(
                    audio[place] if spoken else blank,
                    text[place] if written else blank,
                    audio_loss=learned and spoken and place >= builder.audio_delay,
                    text_loss=learned and written,
                )
    return found


class DocumentFile:
    """The pieces of the documents of a file, each as a conversation of one task.

    Every document is cut into pieces of whole segments that fit ``longest`` positions, once for
    each task of ``mix``, and they come as often as the task weighs. Pieces of a task that needs
    two segments are left out where there is one.

    Raises:
        DataError: a line is no document, or a segment of it has no speech codes of this model; or,
            with ``skip``, which logs a warning for such lines, this is true of all.
    """

    def __init__(
        self, file: ConversationFile, mix: MixConfig, builder: DocumentBuilder, skip: bool
    ):
        self.path = file.path
        self._file = file
        self._pieces: list[Piece] = []

        def add(line: int) -> None:
            found = with_line(lambda document: _pieces(line, document, mix, builder), file, line)
            self._pieces += found

        usable(range(len(file)), add, file.path.name, "line", skip)

    def __len__(self) -> int:
        return len(self._pieces)

    def where(self, index: int) -> str:
        """File, line and task, with which error messages begin."""
        piece = self._pieces[index]
        return f"{self._file.where(piece.line)} ({piece.task})"

    def __getitem__(self, index: int) -> Conversation:
        piece = self._pieces[index]
        return arranged(self._file[piece.line], piece)


def _pieces(
    line: int, document: Conversation, mix: MixConfig, builder: DocumentBuilder
) -> list[Piece]:
    """The pieces of a document for all tasks, as often as each weighs."""
    _check(document)
    return [
        piece
        for task, weight in mix.weights().items()
        for piece in _cut(line, document, task, builder)
        for _ in range(weight)
    ]


def _check(document: Conversation) -> None:
    for index, message in enumerate(document.messages):
        if message.message_type != "audio-text":
            raise DataError(
                f"conversation[{index}]: expected a segment of type 'audio-text', as "
                "make-data writes documents; or set pretrain=false"
            )
        if index not in document.audio_ids:
            raise DataError(
                f"conversation[{index}].audio_tokens: missing; extract the codes of this "
                "file first, with extract-codes"
            )


def _cut(line: int, document: Conversation, task: str, builder: DocumentBuilder) -> Iterator[Piece]:
    """The pieces of a document for a task, in order."""
    least = len(PATTERNS[task])
    first, used = 0, 0
    for place in range(len(document.messages)):
        alone = Piece(line, task, place, place + 1)
        needed = builder.positions(arranged(document, alone, first))
        if place > first and used + needed > builder.max_length:
            if place - first >= least:
                yield Piece(line, task, first, place)
            first, used = place, 0
            needed = builder.positions(arranged(document, alone, first))
        used += needed
    if len(document.messages) - first >= least:
        yield Piece(line, task, first, len(document.messages))


def arranged(document: Conversation, piece: Piece, start: int | None = None) -> Conversation:
    """The segments of a piece in the forms of its task, which count from segment ``start``."""
    start = piece.first if start is None else start
    pattern = PATTERNS[piece.task]
    messages, audio_ids = [], {}
    for place in range(piece.first, piece.end):
        segment = document.messages[place]
        for form in pattern[(place - start) % len(pattern)]:
            if form.kind != "text":
                audio_ids[len(messages)] = document.audio_ids[place]
            audio = None if form.kind == "text" else segment.audio
            text = segment.text if form.written else None
            messages.append(Message(form.role, form.kind, text, audio))
    return Conversation(piece.task, messages, audio_ids)
