"""A conversation to a training sample: both tracks, labels, loss masks and spectrograms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import WhisperFeatureExtractor

from kimia_infer.audio.files import AudioError, load_audio
from kimia_infer.data.conversations import Conversation, DataError, audio_field
from kimia_infer.models.kimi_audio.components import speech_tokenizer_component
from kimia_infer.models.kimi_audio.config import LanguageModelConfig
from kimia_infer.models.kimi_audio.encoders import (
    SpeechCodes,
    code_count,
    segment_codes,
    split_segments,
    whisper_spectrograms,
)
from kimia_infer.models.kimi_audio.prompt import EncodedMessage, Message, Prompt, PromptBuilder
from kimia_infer.models.kimi_audio.text_tokenizer import SpecialTokens
from kimia_infer.utils.errors import RequestError
from kimia_infer.utils.files import no_file

Wave = np.ndarray


class LazySpeechCodes:
    """Computes codes on the CPU; the speech tokenizer is loaded when it is first needed."""

    def __init__(self, directory: Path):
        self.directory = directory

    @cached_property
    def _codes(self) -> SpeechCodes:
        component = speech_tokenizer_component(self.directory)
        module = component.load(torch.device("cpu"), torch.float32)
        return SpeechCodes(module, self.directory)

    def __call__(self, wave: Wave) -> Tensor:
        """Codes int64 [codes] of a 16 kHz waveform [samples]."""
        return self._codes.encode(wave)


@dataclass(frozen=True)
class Sample:
    """What one conversation trains.

    Ids, labels (int64) and masks (bool) are [length]. ``mel`` holds the log-mel spectrograms
    of all segments of its audio in order, each float32 [mels, frames], and ``segment_codes`` the
    number of feature vectors of each; without audio there is none.
    Stored features, float32 [positions, dim], take its place.
    """

    audio_ids: Tensor
    text_ids: Tensor
    is_continuous: Tensor
    audio_labels: Tensor
    text_labels: Tensor
    audio_loss_mask: Tensor
    text_loss_mask: Tensor
    mel: list[Tensor]
    segment_codes: list[int]
    features: Tensor | None = None

    def __len__(self) -> int:
        return len(self.audio_ids)


@dataclass(frozen=True)
class SampleBuilder:
    """Builds samples of at most ``max_length`` positions with the tokenizers of a checkpoint.

    Args:
        audio_root: what relative audio paths begin at.
        encode_speech: computes codes, as :meth:`SpeechCodes.encode`, for messages without.
        spoken_answers: whether an assistant's messages of type audio-text are learned.
        read_features: reads stored Whisper features of an audio file; without it spectrograms
            are made.
    """

    encode_text: Callable[[str], list[int]]
    special: SpecialTokens
    config: LanguageModelConfig
    extractor: WhisperFeatureExtractor
    audio_root: Path
    max_length: int
    encode_speech: Callable[[Wave], Tensor]
    spoken_answers: bool = False
    read_features: Callable[[Path], Tensor] | None = None

    def build(self, conversation: Conversation) -> Sample:
        """The sample that ``conversation`` trains.

        Raises:
            DataError: see :meth:`check`; or codes and audio differ in length.
        """
        stored = self.read_features is not None
        waves, computed = {}, {}
        for index, message in enumerate(conversation.messages):
            ids = conversation.audio_ids.get(index)
            heard = message.message_type == "audio" and not stored
            if message.audio is None or (ids is not None and not heard):
                continue
            wave = waves[index] = self._wave(index, message)
            expected = code_count(len(wave))
            if ids is None:
                computed[index] = self.encode_speech(wave).tolist()
            elif len(ids) != expected:
                raise DataError(
                    f"conversation[{index}].audio_tokens: {len(ids)} codes, but the audio gives "
                    f"{expected}; extract the codes of this file again"
                )
        prompt = self._prompt(conversation, computed)
        feature_messages = [] if stored else prompt.feature_messages
        segments = [s for index in feature_messages for s in split_segments(waves[index])]
        pad = self.special.pad
        # Labels are shifted left by one, as in the published code; the last position never counts.
        return Sample(
            audio_ids=torch.tensor(prompt.audio_ids),
            text_ids=torch.tensor(prompt.text_ids),
            is_continuous=torch.tensor(prompt.is_continuous),
            audio_labels=torch.tensor([*prompt.audio_ids[1:], pad]),
            text_labels=torch.tensor([*prompt.text_ids[1:], pad]),
            audio_loss_mask=torch.tensor([*prompt.audio_loss_mask[1:], False]),
            text_loss_mask=torch.tensor([*prompt.text_loss_mask[1:], False]),
            mel=whisper_spectrograms(self.extractor, segments),
            segment_codes=[segment_codes(len(segment)) for segment in segments],
            features=self._stored_features(conversation, prompt) if stored else None,
        )

    def recordings(self, conversation: Conversation) -> list[Path]:
        """The audio files whose Whisper features the sample of ``conversation`` has."""
        audio = [m.audio for m in conversation.messages if m.message_type == "audio"]
        return [self.audio_root / str(path) for path in audio]

    def _stored_features(self, conversation: Conversation, prompt: Prompt) -> Tensor | None:
        assert self.read_features is not None
        stored = [self.read_features(path) for path in self.recordings(conversation)]
        rows, places = sum(map(len, stored)), sum(prompt.is_continuous)
        if rows != places:
            raise DataError(
                f"conversation: {places} speech codes, but the audio gave {rows} Whisper "
                "features; extract the codes again"
            )
        return torch.cat(stored) if stored else None

    def check(self, conversation: Conversation) -> Prompt:
        """Whether a sample can be built, without its features; the prompt it will have.

        Audio files with codes have to exist, others are decoded. Codes that are not computed yet
        are 0 in it.

        Raises:
            DataError: an audio file is missing or unreadable, codes are out of range or
                missing, the sample is too long, or nothing in it is learned.
        """
        codes = {}
        for index, message in enumerate(conversation.messages):
            if message.audio is None:
                continue
            if index in conversation.audio_ids:
                self._path(index, message)
            else:
                codes[index] = [0] * code_count(len(self._wave(index, message)))
        prompt = self._prompt(conversation, codes)
        if not any(prompt.audio_loss_mask) and not any(prompt.text_loss_mask):
            raise DataError(
                "conversation: nothing in it is learned; an assistant has to answer in a message "
                "of type 'text' or 'audio', or, with spoken_answers, 'audio-text'"
            )
        if len(prompt) > self.max_length:
            raise DataError(
                f"conversation: {len(prompt)} positions, more than max_length {self.max_length}"
            )
        return prompt

    def _encoded(
        self, conversation: Conversation, computed: Mapping[int, Sequence[int]]
    ) -> list[EncodedMessage]:
        """The messages with their tokens; ``computed`` has codes that the line does not have."""
        offset = self.config.token_offset
        codes = dict(computed)
        for index, ids in conversation.audio_ids.items():
            for token in ids:
                if not offset <= token < self.config.vocab_size:
                    raise DataError(
                        f"conversation[{index}].audio_tokens: {token} is not the id of a speech "
                        f"code ({offset} to {self.config.vocab_size - 1}); extract the codes with "
                        "the checkpoint that is trained"
                    )
            codes[index] = [token - offset for token in ids]
        return [
            EncodedMessage(
                message.role,
                message.message_type,
                self.encode_text(message.text or ""),
                codes.get(index, ()),
            )
            for index, message in enumerate(conversation.messages)
        ]

    def _prompt(self, conversation: Conversation, computed: Mapping[int, Sequence[int]]) -> Prompt:
        messages = self._encoded(conversation, computed)
        builder = PromptBuilder(self.special, self.config.token_offset, self.config.audio_delay)
        try:
            prompt = builder.build(messages, conversation.output_type, add_assistant_start=False)
        except RequestError as error:
            raise DataError(str(error).replace("chats", "conversation", 1)) from error
        if self.spoken_answers:
            learn_spoken_answers(prompt, messages, builder)
        return prompt

    def _path(self, index: int, message: Message) -> Path:
        path = self.audio_root / str(message.audio)
        if not path.is_file():
            where = audio_field(index, message.message_type)
            raise DataError(f"{where}: {no_file(path)} (relative paths begin at audio_root)")
        return path

    def _wave(self, index: int, message: Message) -> Wave:
        try:
            return load_audio(self._path(index, message))
        except AudioError as error:
            raise DataError(f"{audio_field(index, message.message_type)}: {error}") from error


def learn_spoken_answers(
    prompt: Prompt, messages: Sequence[EncodedMessage], builder: PromptBuilder
) -> None:
    """Mark the answers of ``prompt``, which ``builder`` made from ``messages``; end their texts.

    What the token loop decides by itself is not learned: the blanks before the speech and those
    after the text.

    Raises:
        DataError: an answer is not the end of its turn, or its text leaves no room for the end.
    """
    for index, message in enumerate(messages):
        if message.role != "assistant" or message.message_type != "audio-text":
            continue
        if index + 1 < len(messages) and messages[index + 1].role == message.role:
            raise DataError(f"conversation[{index}]: a spoken answer has to end its turn")
        until_here = builder.build(messages[: index + 1], "both", add_assistant_start=False)
        close = len(until_here) - 1  # the end of the turn
        speech = close - len(message.codes)
        start = speech - builder.audio_delay
        end = start + len(message.text_ids)
        if end == close:
            raise DataError(
                f"conversation[{index}].content[1]: {len(message.text_ids)} text tokens and "
                f"their end do not fit beside {len(message.codes)} speech codes; shorten it"
            )
        prompt.text_ids[end] = builder.tokens.text_eos
        prompt.text_loss_mask[start : end + 1] = [True] * (end + 1 - start)
        prompt.audio_loss_mask[speech : close + 1] = [True] * (close + 1 - speech)
