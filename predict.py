"""The Cog predictor: sound and text in, a transcript and speech out.

Cog's build reads this file without running it. Inputs are therefore written as plain
literals; kimia_infer/service/interface.py refuses what the build would misread.
"""

from __future__ import annotations

import os

from cog import BaseModel, BaseRunner, Input, Path

from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.request import parse_options
from kimia_infer.audio.load import AudioError
from kimia_infer.service.files import OutputFiles
from kimia_infer.service.interface import read_interface
from kimia_infer.service.request import check_inputs, name_files, split_inputs
from kimia_infer.weights.resolve import weights_from_environment

INTERFACE = read_interface(__file__, "Predictor")


class Output(BaseModel):
    audio: Path | None
    text: str


class Predictor(BaseRunner):
    def setup(self, weights: Path | str | None = None) -> None:
        """Load the weights that KIMI_AUDIO_WEIGHTS names, else those that Cog passes."""
        self.model = KimiAudio(
            weights_from_environment(weights),
            device=os.environ.get("KIMI_AUDIO_DEVICE") or None,
            dtype=os.environ.get("KIMI_AUDIO_DTYPE") or None,
            head_rows=os.environ.get("KIMI_AUDIO_HEAD_ROWS") or "track",
        )
        self.outputs = OutputFiles()

    def run(
        self,
        audio: Path | None = Input(
            default=None,
            description="Sound of the user's turn: speech, music, noise; any common format",
            accept="audio/*",
        ),
        text: str = Input(
            default="",
            description="Text of the user's turn, before the sound: an instruction or a question",
            max_length=50000,
        ),
        history: str = Input(
            default="",
            description="JSON list of earlier messages; audio as its index in history_audio",
            max_length=200000,
        ),
        history_audio: list[Path] = Input(
            default=[],
            description="Sounds that the messages of history refer to",
            accept="audio/*",
        ),
        output_type: str = Input(
            default="both",
            description="Answer with text only, or with both text and speech",
            choices=["text", "both"],
        ),
        audio_temperature: float = Input(
            default=0.8,
            description="Randomness of the speech; 0 always takes the likeliest code",
            ge=0.0,
            le=2.0,
        ),
        audio_top_k: int = Input(
            default=10,
            description="Speech codes to choose from at each step; 0 for all",
            ge=0,
            le=1000,
        ),
        text_temperature: float = Input(
            default=0.0,
            description="Randomness of the text; 0 always takes the likeliest token",
            ge=0.0,
            le=2.0,
        ),
        text_top_k: int = Input(
            default=5,
            description="Text tokens to choose from at each step; 0 for all",
            ge=0,
            le=1000,
        ),
        audio_repetition_penalty: float = Input(
            default=1.0,
            description="Makes recent speech codes less likely; 1 for no penalty",
            ge=1.0,
            le=2.0,
        ),
        audio_repetition_window_size: int = Input(
            default=64,
            description="Speech codes that count as recent",
            ge=1,
            le=1500,
        ),
        text_repetition_penalty: float = Input(
            default=1.0,
            description="Makes recent text tokens less likely; 1 for no penalty",
            ge=1.0,
            le=2.0,
        ),
        text_repetition_window_size: int = Input(
            default=16,
            description="Text tokens that count as recent",
            ge=1,
            le=7500,
        ),
        max_new_tokens: int = Input(
            default=-1,
            description="Most steps to generate, 12.5 for a second of speech; -1 for no limit",
            ge=-1,
            le=7500,
        ),
        seed: int | None = Input(
            default=None,
            description="Repeats an answer; left out, one is drawn and returned as a metric",
            ge=0,
            le=4294967295,
        ),
    ) -> Output:
        """Answer one turn of a chat."""
        self.outputs.clear()
        inputs = check_inputs(INTERFACE, locals())
        chat, options = split_inputs(inputs)
        try:
            completion = self.model.complete(chat, parse_options(**options))
        except AudioError as error:
            raise AudioError(name_files(str(error), inputs)) from error
        for name, value in completion.metrics.items():
            self.record_metric(name, value)
        return Output(audio=self.outputs.write(completion.wav), text=completion.text)
