"""Messages to what the language model reads: the prompt and the features it refers to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kimia_infer.api.events import Stopwatch
from kimia_infer.api.parameters import Parameters
from kimia_infer.audio.files import SAMPLE_RATE, AudioError, AudioTooLong, load_audio
from kimia_infer.models.kimi_audio.prompt import EncodedMessage, Message, Prompt, PromptBuilder
from kimia_infer.models.kimi_audio.speech_tokenizer import SpeechCodes
from kimia_infer.models.kimi_audio.text_tokenizer import TextTokenizer
from kimia_infer.models.kimi_audio.whisper import WhisperFeatures, code_count


@dataclass(frozen=True)
class ChatEncoder:
    """Encodes chats with the tokenizers and encoders of a checkpoint."""

    text_tokenizer: TextTokenizer
    speech_codes: SpeechCodes
    whisper_features: WhisperFeatures
    prompt_builder: PromptBuilder

    def load(
        self, messages: Sequence[Message], options: Parameters, clock: Stopwatch
    ) -> dict[int, np.ndarray]:
        """The sounds of a chat by message, float32 [samples] at 16 kHz.

        A sound that alone would fill the budget is refused without being decoded further.
        """
        waves = {}
        with clock.timed("load_audio"):
            for index, message in enumerate(messages):
                if message.audio is None:
                    continue
                try:
                    waves[index] = load_audio(message.audio, options.max_audio_seconds)
                except AudioTooLong as error:
                    reason = f"chats[{index}].content: {error} ({options.budget_explained})"
                    raise AudioTooLong(reason) from error
                except AudioError as error:
                    raise AudioError(f"chats[{index}].content: {error}") from error
        return waves

    def encode(
        self,
        messages: Sequence[Message],
        waves: Mapping[int, np.ndarray],
        options: Parameters,
        clock: Stopwatch,
    ) -> tuple[Prompt, Tensor | None]:
        """The prompt and the Whisper features [positions, dim] it refers to.

        A prompt that leaves no budget is refused before any encoder runs.
        """
        with clock.timed("prompt"):
            text_ids = [self.text_tokenizer.encode(m.text or "") for m in messages]
            unknown = {i: [0] * code_count(len(wave)) for i, wave in waves.items()}
            draft = self._layout(messages, text_ids, unknown, options)
            options.step_limit(len(draft))
        with clock.timed("encoders"):
            features, codes = self.encode_waves(waves, draft.feature_messages)
        with clock.timed("prompt"):
            prompt = self._layout(messages, text_ids, codes, options)
        seconds = sum(len(wave) for wave in waves.values()) / SAMPLE_RATE
        clock.metrics |= {"input_audio_seconds": seconds, "prompt_tokens": len(prompt)}
        return prompt, features

    @torch.inference_mode()
    def encode_waves(
        self, waves: Mapping[int, np.ndarray], featured: Sequence[int]
    ) -> tuple[Tensor | None, dict[int, list[int]]]:
        """Whisper features of the ``featured`` waves, joined, and the speech codes of all.

        Features are started first and stay on the device, while the host waits for the codes.
        """
        features = [self.whisper_features.encode(waves[index]) for index in featured]
        codes = {i: self.speech_codes.encode(wave).tolist() for i, wave in waves.items()}
        return torch.cat(features) if features else None, codes

    def _layout(
        self,
        messages: Sequence[Message],
        text_ids: Sequence[list[int]],
        codes: Mapping[int, list[int]],
        options: Parameters,
    ) -> Prompt:
        encoded = [
            EncodedMessage(m.role, m.message_type, text_ids[i], codes.get(i, ()))
            for i, m in enumerate(messages)
        ]
        return self.prompt_builder.build(encoded, options.output_type)
