"""Text to ids: the unigram model of a checkpoint's ``tokenizer.json``, or ``tokenizer.model``.

Other files of the checkpoint label it a LlamaTokenizer, which reads it as another kind and breaks
line ends, so they are not consulted.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from kimia_infer.models.step_audio_editx.layout import TEXT_NAMES
from kimia_infer.models.step_audio_editx.packing import AUDIO_TOKENS
from kimia_infer.utils.errors import CheckpointError, RequestError

TURN_BEGIN, TURN_END = "<|BOT|>", "<|EOT|>"

PUBLISHED_SIZE = 74_752
PUBLISHED_IDS = {"\n": 78, "assistant": 15_886}
PUBLISHED_FIRST_AUDIO = 65_536
"""What is known of the published tokenizer; the check finds one that was read as another kind."""


class TextTokenizer:
    """The tokenizer of a checkpoint directory.

    Attributes:
        turn_begin, turn_end: ids of the marks around a turn; the second one ends an answer.
        first_audio: id of audio token 0, which the other 5,119 follow.
        size: number of ids.

    Raises:
        CheckpointError: the file is missing or no unigram model with the audio tokens.
    """

    def __init__(self, directory: Path):
        paths = [directory / name for name in TEXT_NAMES]
        path = next((path for path in paths if path.is_file()), paths[0])
        if not path.is_file():
            raise CheckpointError(f"{path}: file missing")
        read = Tokenizer.from_file if path.suffix == ".json" else read_sentencepiece
        try:
            self._tokenizer = read(str(path))
        except Exception as error:  # the libraries raise nothing more specific
            raise CheckpointError(f"{path}: not a tokenizer ({error})") from error
        kind = json.loads(self._tokenizer.to_str())["model"]["type"]
        if kind != "Unigram":
            raise CheckpointError(f"{path}: expected a Unigram model, found {kind}")
        self._path = path
        self.size = self._tokenizer.get_vocab_size()
        self.turn_begin, self.turn_end = self._id(TURN_BEGIN), self._id(TURN_END)
        self.first_audio = self._id(audio_name(0))
        last = self._id(audio_name(AUDIO_TOKENS - 1))
        if last != self.first_audio + AUDIO_TOKENS - 1:
            raise CheckpointError(f"{path}: audio tokens do not follow each other")
        added = self._tokenizer.get_added_tokens_decoder().values()
        self._marks = re.compile("|".join(re.escape(each.content) for each in added))
        self._check()

    def _id(self, name: str) -> int:
        found = self._tokenizer.token_to_id(name)
        if found is None:
            raise CheckpointError(f"{self._path}: token {name} is missing")
        return found

    def _check(self) -> None:
        if self.encode(""):
            raise CheckpointError(f"{self._path}: adds tokens of its own to every text")
        if self.size != PUBLISHED_SIZE:
            return
        found = {text: self.encode(text)[-1] for text in PUBLISHED_IDS}
        if (found, self.first_audio) != (PUBLISHED_IDS, PUBLISHED_FIRST_AUDIO):
            raise CheckpointError(
                f"{self._path}: expected {PUBLISHED_IDS} and audio from {PUBLISHED_FIRST_AUDIO}, "
                f"found {found} and {self.first_audio}; use the published file"
            )

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, in which names of tokens such as ``<audio_5>`` are those tokens."""
        return self._tokenizer.encode(text, add_special_tokens=True).ids

    def require_plain(self, field: str, text: str) -> None:
        """Raise RequestError naming ``field`` if ``text`` holds the name of a token."""
        found = self._marks.search(text)
        if found is not None:
            raise RequestError(
                f"{field}: {found[0]} is a token of the model and no text; leave it out"
            )


def read_sentencepiece(path: str) -> Tokenizer:
    """The tokenizer of a model file of sentencepiece, as ``tokenizer.json`` would describe it.

    Pieces that are no text, and those that the trainer was told to keep whole, are found before
    anything else. A mark of a word's begin stands before the text alone.
    """
    from transformers.convert_slow_tokenizer import import_protobuf  # has the schema of the file

    schema: Any = import_protobuf()
    stored = schema.ModelProto.FromString(Path(path).read_bytes())
    if stored.trainer_spec.model_type != schema.TrainerSpec.UNIGRAM:
        raise ValueError("its model is no unigram one")
    vocabulary = [(piece.piece, piece.score) for piece in stored.pieces]
    spec = stored.trainer_spec
    tokenizer = Tokenizer(models.Unigram(vocabulary, spec.unk_id, spec.byte_fallback))
    if characters := stored.normalizer_spec.precompiled_charsmap:
        tokenizer.normalizer = normalizers.Precompiled(characters)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    kinds = schema.ModelProto.SentencePiece
    special = {kinds.UNKNOWN: True, kinds.CONTROL: True, kinds.USER_DEFINED: False}
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, special=special[piece.type], normalized=False)
            for piece in stored.pieces
            if piece.type in special
        ]
    )
    return tokenizer


def audio_name(token: int) -> str:
    """How audio token ``token`` is written in a prompt."""
    return f"<audio_{token}>"
