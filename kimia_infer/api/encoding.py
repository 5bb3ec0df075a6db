"""Chats to prompts: their audio is loaded, then encoded together with their texts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kimia_infer.api.parameters import Parameters
from kimia_infer.api.response import Stopwatch, named
from kimia_infer.audio.files import (
    SAMPLE_RATE,
    AudioError,
    AudioTooLong,
    Check,
    Note,
    load_audio,
)
from kimia_infer.engine.generation import DecodeInput, OutputType
from kimia_infer.models.kimi_audio.prompt import EncodedMessage, Message, Prompt, PromptBuilder
from kimia_infer.models.kimi_audio.speech_tokenizer import SpeechCodes
from kimia_infer.models.kimi_audio.text_tokenizer import TextTokenizer
from kimia_infer.models.kimi_audio.whisper import WhisperFeatures, code_count

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chat:
    """A chat with its audio, float32 [samples] at 16 kHz by message, and the ids of its texts."""

    messages: Sequence[Message]
    waves: Mapping[int, np.ndarray]
    text_ids: Sequence[list[int]]
    output_type: OutputType

    @property
    def unknown_codes(self) -> dict[int, list[int]]:
        """As many codes as each sound will have."""
        return {i: [0] * code_count(len(wave)) for i, wave in self.waves.items()}


@dataclass(frozen=True)
class ChatEncoder:
    """Encodes chats with the tokenizers and encoders of a checkpoint."""

    text_tokenizer: TextTokenizer
    speech_codes: SpeechCodes
    whisper_features: WhisperFeatures
    prompt_builder: PromptBuilder
    device: torch.device

    def load(
        self,
        messages: Sequence[Message],
        options: Parameters,
        clock: Stopwatch,
        note: Note = log.warning,
        check: Check | None = None,
    ) -> dict[int, np.ndarray]:
        """The audio of a chat by message, float32 [samples] at 16 kHz.

        Audio that alone would exceed the budget is refused without decoding the rest. ``note`` and
        ``check`` are those of ``load_audio``; notes begin with the name of the message.
        """
        waves = {}
        with clock.timed("load_audio"):
            for index, message in enumerate(messages):
                if message.audio is None:
                    continue
                where = f"chats[{index}].content: "
                noted = named(where, note)
                try:
                    waves[index] = load_audio(
                        message.audio, options.max_audio_seconds, note=noted, check=check
                    )
                except AudioTooLong as error:
                    raise AudioTooLong(f"{where}{error} ({options.budget_explained})") from error
                except AudioError as error:
                    raise AudioError(f"{where}{error}") from error
        return waves

    def prepare(
        self,
        messages: Sequence[Message],
        waves: Mapping[int, np.ndarray],
        options: Parameters,
        clock: Stopwatch,
    ) -> tuple[Chat, int]:
        """The chat to encode, and the length of its prompt, which is known before.

        A prompt that leaves no budget is refused.
        """
        with clock.timed("prompt"):
            text_ids = [self.text_tokenizer.encode(m.text or "") for m in messages]
            chat = Chat(messages, waves, text_ids, options.output_type)
            codes = chat.unknown_codes
            length = len(self._layout(chat, codes))
            options.step_limit(length)
        clock.metrics |= {
            "input_audio_seconds": sum(len(wave) for wave in waves.values()) / SAMPLE_RATE,
            "prompt_tokens": length,
            "prompt_audio_tokens": sum(map(len, codes.values())),
        }
        return chat, length

    def decode_input(self, prompt: Prompt, features: Tensor | None) -> DecodeInput:
        """A prompt as the language model reads it."""
        return DecodeInput(
            torch.tensor([prompt.audio_ids]).to(self.device),
            torch.tensor([prompt.text_ids]).to(self.device),
            torch.tensor([prompt.is_continuous]).to(self.device),
            features,
        )

    def encode(self, chats: Sequence[Chat]) -> list[DecodeInput]:
        """The prompts of chats, on the device of the language model."""
        return [self.decode_input(*encoded) for encoded in self.encode_all(chats)]

    @torch.inference_mode()
    def encode_all(self, chats: Sequence[Chat]) -> list[tuple[Prompt, Tensor | None]]:
        """The prompts of chats, and the Whisper features [positions, dim] they refer to.

        All sounds are encoded together. Features are launched first and stay on the device while
        the host waits for the codes.
        """
        heard = [self._layout(chat, chat.unknown_codes).feature_messages for chat in chats]
        features = self.whisper_features.encode_all(
            [chat.waves[i] for chat, parts in zip(chats, heard, strict=True) for i in parts]
        )
        codes = iter(self.speech_codes.encode_all([w for c in chats for w in c.waves.values()]))
        encoded, first = [], 0
        for chat, parts in zip(chats, heard, strict=True):
            own, first = features[first : first + len(parts)], first + len(parts)
            prompt = self._layout(chat, {i: next(codes).tolist() for i in chat.waves})
            encoded.append((prompt, torch.cat(own) if own else None))
        return encoded

    def _layout(self, chat: Chat, codes: Mapping[int, Sequence[int]]) -> Prompt:
        encoded = [
            EncodedMessage(m.role, m.message_type, chat.text_ids[i], codes.get(i, ()))
            for i, m in enumerate(chat.messages)
        ]
        return self.prompt_builder.build(encoded, chat.output_type)
