"""Training of the speech tokenizer: codes from which the text can be recognized.

The encoder learns with a recognizer above its codes, which is not kept. Gradients pass the code
book unchanged (straight through), which itself follows the encoder as running means.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import WhisperFeatureExtractor

from kimia_infer.audio.files import SAMPLE_RATE
from kimia_infer.data.conversations import DataError
from kimia_infer.models.kimi_audio.checkpoint import SPEECH_TOKENIZER_FOLDER
from kimia_infer.models.kimi_audio.components import speech_tokenizer_component
from kimia_infer.models.kimi_audio.config import FRAMES_PER_CODE, POSITIONS, SpeechTokenizerConfig
from kimia_infer.models.kimi_audio.encoders import (
    CODE_SAMPLES,
    SpeechTokenizer,
    feature_extractor,
    segment_codes,
)
from kimia_infer.training.network import Losses
from kimia_infer.training.tasks.codec import (
    CodecNetwork,
    Data,
    load_trainable,
    mixed_precision,
    train_component,
    write_component,
)
from kimia_infer.training.tasks.config import TokenizerTrainingConfig
from kimia_infer.training.tasks.recognizer import (
    MELS_PER_FRAME,
    SILENCE,
    Recognizer,
    Units,
    check_speakable,
    ctc,
    units_of,
)
from kimia_infer.training.tasks.recordings import Example, Examples, Recording
from kimia_infer.training.trainer import TrainingResult
from kimia_infer.weights.component import read_json

MELS = 128  # published configuration
FRAME_RATE = 50  # of the encoder, per second
MEL_PER_CODE = 8  # spectrogram frames: two per frame of the encoder, pooled by four


def train_tokenizer(settings: TokenizerTrainingConfig, resume: bool = False) -> TrainingResult:
    """:func:`train_component`; the result is in ``output/final/glm-4-voice-tokenizer``."""
    initial = settings.initial and Path(settings.initial)
    source = initial / "config.json" if initial else Path("size")
    values = read_json(source) if initial else new_config(settings)
    config = SpeechTokenizerConfig.from_json(values, source)

    def build(data: Data, folder: Path | None, device: torch.device) -> TokenizerNetwork:
        if folder is not None:
            tokenizer = load_trainable(speech_tokenizer_component(folder), device)
        else:
            tokenizer = new_tokenizer(config).to(device)
        network = TokenizerNetwork(tokenizer, values, settings, units_of(data))
        if initial:
            network.code_book.keep_table()
        return network

    extractor = feature_extractor(initial or Path(), config.encoder.num_mel_bins)
    read = partial(read_spoken, settings=settings, extractor=extractor)
    return train_component(settings, resume, SPEECH_TOKENIZER_FOLDER, read, build, needs_text=True)


def read_spoken(
    recording: Recording, settings: TokenizerTrainingConfig, extractor: WhisperFeatureExtractor
) -> Example:
    """``mel`` fp32 [mels, frames], its ``mask``, the ``count`` of its codes, and ``text``.

    Where phones are learned, also ``phones``, the name of the one in each frame.
    """
    wave = recording.load(max_seconds=settings.max_seconds)
    features = extractor(
        [wave],
        sampling_rate=SAMPLE_RATE,
        padding="longest",
        pad_to_multiple_of=CODE_SAMPLES,
        return_attention_mask=True,
        return_tensors="pt",
    )
    count = segment_codes(len(wave))
    text = recording.text or ""
    check_speakable(text, count, bool(settings.character_weight), bool(settings.word_weight))
    example = {
        "mel": features.input_features[0],
        "mask": features.attention_mask[0],
        "count": count,
        "text": text,
        "seconds": len(wave) / SAMPLE_RATE,
    }
    if settings.phone_weight:
        example["phones"] = frame_phones(recording, FRAMES_PER_CODE * count)
    return example


def frame_phones(recording: Recording, frames: int) -> list[str]:
    """The phone in the middle of every frame of 20 ms. Raises DataError if none are known."""
    if recording.phones is None:
        raise DataError("phones: missing; give pairs of a name and a second, or phone_weight=0")
    names, seconds = zip((SILENCE, -math.inf), *recording.phones, strict=True)
    middles = (torch.arange(frames) + 0.5) / FRAME_RATE
    places = torch.searchsorted(torch.tensor(seconds), middles, right=True) - 1
    return [names[place] for place in places.tolist()]


class TokenizerNetwork(CodecNetwork):
    """Recordings to losses, through the codes once ``quantize_from`` is reached."""

    def __init__(
        self,
        tokenizer: SpeechTokenizer,
        values: dict,
        settings: TokenizerTrainingConfig,
        units: Units,
    ):
        super().__init__()
        self.tokenizer = tokenizer
        self.values, self.settings, self.units = values, settings, units
        encoder = tokenizer.config.encoder
        self.recognizer = Recognizer(
            encoder.d_model,
            settings.upper_layers,
            len(units.characters) + 1 if settings.character_weight else 0,
            len(units.words) + 1 if settings.word_weight else 0,
            encoder.num_mel_bins if settings.mel_weight else 0,
            len(units.phones) if settings.phone_weight else 0,
        )
        tokenizer.codebook.requires_grad_(False)
        self.code_book = RunningCodeBook(
            tokenizer.codebook, settings.code_decay, settings.dead_below
        )

    def forward(self, batch: Examples) -> Losses:
        """Spectrograms [batch, mels, frames], masks and numbers of codes to losses."""
        mel = pad_sequence([item["mel"].T for item in batch.items], batch_first=True).mT
        mask = pad_sequence([item["mask"] for item in batch.items], batch_first=True)
        counts = torch.tensor([item["count"] for item in batch.items], device=mel.device)
        with mixed_precision(self.settings, mel.device):
            vectors = self.tokenizer(mel, mask)
            vectors, commitment = self.quantized(vectors, counts)
            frames = self.recognizer(vectors, counts)
            return self._losses(batch, frames, counts, mel) | {"commitment": commitment}

    def quantized(self, vectors: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors, or the codes in their places, and the weighted distance [batch]."""
        codes = self.tokenizer.quantize(vectors.detach().float())
        valid = torch.arange(vectors.shape[1], device=vectors.device) < counts[:, None]
        if self.training:
            self.code_book.collect(vectors[valid], codes[valid])
            if self.progress < self.settings.quantize_from:
                return vectors, torch.zeros(len(vectors), device=vectors.device)
        nearest = self.tokenizer.codebook(codes)
        distance = (vectors.float() - nearest).square().mean(2) * valid
        commitment = self.settings.commitment * distance.sum(1) / counts
        return vectors + (nearest - vectors).detach(), commitment

    def _losses(self, batch: Examples, frames: Tensor, counts: Tensor, mel: Tensor) -> Losses:
        recognizer, units, settings = self.recognizer, self.units, self.settings
        names = ("characters", "words", "phones", "mel")
        losses = dict.fromkeys(names, torch.zeros(len(mel), device=mel.device))
        texts = [item["text"] for item in batch.items]
        if recognizer.characters is not None:
            wanted = [units.character_ids(text) for text in texts]
            loss = ctc(recognizer.characters(frames), FRAMES_PER_CODE * counts, wanted)
            losses["characters"] = settings.character_weight * loss
        if recognizer.words is not None:
            wanted = [units.word_ids(text) for text in texts]
            means = frames.unflatten(1, (-1, FRAMES_PER_CODE)).mean(2)
            losses["words"] = settings.word_weight * ctc(recognizer.words(means), counts, wanted)
        if recognizer.phones is not None:
            wanted = [units.phone_ids(item["phones"]) for item in batch.items]
            wanted = pad_sequence(wanted, batch_first=True, padding_value=-1).to(frames.device)
            scores = recognizer.phones(frames).float().mT
            errors = F.cross_entropy(scores, wanted, ignore_index=-1, reduction="none")
            losses["phones"] = settings.phone_weight * (errors.sum(1) / (wanted >= 0).sum(1))
        if recognizer.mel is not None:
            found = recognizer.mel(frames).unflatten(2, (MELS_PER_FRAME, -1)).flatten(1, 2).mT
            valid = torch.arange(mel.shape[2], device=mel.device) < MEL_PER_CODE * counts[:, None]
            errors = (found.float() - mel).abs().mean(1) * valid
            losses["mel"] = settings.mel_weight * errors.sum(1) / (MEL_PER_CODE * counts)
        return losses

    def blocks(self) -> Iterator[nn.Module]:
        yield from self.tokenizer.layers

    def kept(self) -> dict[str, Tensor]:
        return {
            "codebook": self.tokenizer.codebook.weight.data,
            "ema_count": self.code_book.counts,
            "ema_weight": self.code_book.sums,
        }

    def same_run(self) -> dict[str, Tensor]:
        return {"units": self.units.mark}

    def after_step(self) -> None:
        self.code_book.update()

    def write(self, folder: Path) -> None:
        tensors = {name: p.detach() for name, p in self.tokenizer.named_parameters()}
        tensors |= {"ema_count": self.code_book.counts, "ema_weight": self.code_book.sums}
        write_component(folder / SPEECH_TOKENIZER_FOLDER, "config.json", self.values, tensors)


def new_config(settings: TokenizerTrainingConfig) -> dict:
    """The published structure of ``config.json``."""
    size = settings.size
    return {
        "activation_function": "gelu",
        "architectures": ["WhisperVQEncoder"],
        "d_model": size.width,
        "encoder_attention_heads": size.heads,
        "encoder_causal_attention": False,
        "encoder_causal_convolution": True,
        "encoder_ffn_dim": 4 * size.width,
        "encoder_layers": size.layers,
        "max_source_positions": POSITIONS,
        "model_type": "whisper",
        "num_mel_bins": MELS,
        "pooling_kernel_size": FRAMES_PER_CODE,
        "pooling_position": size.layers,
        "pooling_type": "avg",
        "quantize_causal_block_size": size.block_frames,
        "quantize_causal_encoder": False,
        "quantize_encoder_only": True,
        "quantize_position": size.layers,
        "quantize_vocab_size": size.codes,
        "scale_embedding": False,
        "torch_dtype": "float32",
    }


def new_tokenizer(config: SpeechTokenizerConfig) -> SpeechTokenizer:
    """Untrained: positions begin as faint sinusoids, so that codes hardly depend on them."""
    tokenizer = SpeechTokenizer(config)
    count, width = tokenizer.embed_positions.weight.shape
    half = torch.arange((width + 1) // 2)
    frequencies = torch.exp(-math.log(10_000) * half / max(len(half) - 1, 1))
    angles = torch.arange(count)[:, None] * frequencies
    with torch.no_grad():
        waves = torch.cat([angles.sin(), angles.cos()], 1)[:, :width]
        tokenizer.embed_positions.weight.copy_(0.1 * waves)
    return tokenizer


class RunningCodeBook:
    """Moves the rows of ``table`` to the means of the vectors that choose them.

    As published, ``counts`` [codes] is how often each is chosen per step, on average, and
    ``sums`` [codes, dim] the sum of those vectors. Codes chosen less often than ``dead_below``
    times the average are replaced by random vectors of the last step.
    """

    def __init__(self, table: nn.Embedding, decay: float, dead_below: float):
        self.table, self.decay, self.dead_below = table, decay, dead_below
        self.counts = torch.zeros(table.num_embeddings, device=table.weight.device)
        self.sums = torch.zeros_like(table.weight)
        self._chosen: list[Tensor] = []
        self._vectors: list[Tensor] = []

    def keep_table(self) -> None:
        """Start from the table as it is, instead of with the first vectors."""
        self.counts.fill_(1.0)
        self.sums.copy_(self.table.weight)

    def collect(self, vectors: Tensor, codes: Tensor) -> None:
        """Remember that ``vectors`` [n, dim] chose ``codes`` int64 [n]."""
        self._vectors.append(vectors.detach().float())
        self._chosen.append(codes)

    @torch.no_grad()
    def update(self) -> int:
        """Move the table by what was collected; the number of codes that were replaced."""
        vectors, chosen = torch.cat(self._vectors), torch.cat(self._chosen)
        self._vectors, self._chosen = [], []
        begins = not bool(self.counts.any())
        share = 1.0 - self.decay
        self.counts.lerp_(torch.bincount(chosen, minlength=len(self.counts)).float(), share)
        self.sums.lerp_(torch.zeros_like(self.sums).index_add_(0, chosen, vectors), share)
        average = self.counts.mean()
        places = ((self.counts < self.dead_below * average) | begins).nonzero()[:, 0]
        picked = torch.randint(len(vectors), (len(places),)).to(vectors.device)
        self.counts[places] = average
        self.sums[places] = vectors[picked] * average
        used = self.counts > 0
        self.table.weight[used] = self.sums[used] / self.counts[used, None]
        return len(places)
