"""The Cog predictor of Step-Audio-EditX: a recording in, the new speech out.

Cog's build reads this file without running it, as it does predict.py, which has the rules.
"""

from __future__ import annotations

from cog import BaseModel, Input, Path, concurrent

from kimia_infer.api.events import Completion
from kimia_infer.serving.cog.base import wav_uri
from kimia_infer.serving.cog.editing import EditXRunner


class Inputs:
    task = Input(
        default="clone",
        description="Say text in the voice of audio (clone), or the kind of edit that audio gets",
        choices=["clone", "emotion", "style", "speed", "denoise", "vad", "paralinguistic"],
    )
    audio = Input(
        default=None,
        description="A recording of 0.5 to 30 s of one person, at 16 kHz or more",
        accept="audio/*",
    )
    text = Input(
        default="",
        description="What to say, or for paralinguistic the transcript with tags like [Laughter]",
        max_length=4096,
    )
    option = Input(
        default="",
        description="Of an edit: the emotion (happy), style (whisper) or speed (faster)",
        max_length=100,
    )
    transcript = Input(
        default="",
        description="What is said in audio; not needed for denoise and vad",
        max_length=2000,
    )
    seed = Input(
        default=None,
        description="Makes an answer repeatable; if unset, one is drawn and returned as a metric",
        ge=0,
        le=4294967295,
    )


class Output(BaseModel):
    """The new speech, a data URI, which is what Cog makes of a file inside an object.

    ``text`` is what is said in it; ``notes`` list what is unusual about it.
    """

    audio: Path
    text: str
    notes: list[str]


class EditXPredictor(EditXRunner):
    @concurrent(max=8)
    async def run(
        self,
        task: str = Inputs.task,
        audio: Path | None = Inputs.audio,
        text: str = Inputs.text,
        option: str = Inputs.option,
        transcript: str = Inputs.transcript,
        seed: int | None = Inputs.seed,
    ) -> Output:
        """Say a text in the voice of a recording, or change how the recording is spoken."""
        answer = self.complete(locals())
        assert isinstance(answer, Completion)
        uri = wav_uri(answer.wav, answer.sample_rate)
        return Output(audio=uri, text=answer.text, notes=answer.notes)
