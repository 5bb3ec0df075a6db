"""Containers and codecs that ffmpeg's own program writes, as files to be read."""

from __future__ import annotations

from typing import NamedTuple

PHONE = "-ar 8000 -ac 1"
WIDE = "-ar 16000 -ac 1"
STUDIO = "-ar 48000"
DRAFT = "-strict -2"


class Format(NamedTuple):
    """One container: the suffix of its files, its name, and ffmpeg's options for each codec."""

    suffix: str
    name: str
    codecs: dict[str, str]


FORMATS = [
    Format(
        "wav",
        "WAV",
        {
            **{f"pcm_{kind}": "" for kind in ("u8", "s16le", "s24le", "s32le", "s64le")},
            **{f"pcm_{kind}": "" for kind in ("f32le", "f64le", "alaw", "mulaw")},
            **{f"adpcm_{kind}": "" for kind in ("ms", "ima_wav", "yamaha")},
            "g726": PHONE,
            "g723_1": f"{PHONE} -b:a 6300",
            "libgsm_ms": PHONE,
            **{name: "" for name in ("mp2", "mp3", "ac3", "wmav2")},
        },
    ),
    Format("w64", "Wave64", {"pcm_s16le": "", "adpcm_ms": ""}),
    Format(
        "aiff",
        "AIFF",
        {"pcm_s8": "", "pcm_s16be": "", "pcm_s24be": "", "pcm_f32be": "", "adpcm_ima_qt": ""},
    ),
    Format("au", "AU", {"pcm_s16be": "", "pcm_mulaw": "", "adpcm_g722": WIDE}),
    Format(
        "caf",
        "CAF",
        {"pcm_s16be": "", "pcm_f32le": "", "alac": "", "adpcm_ima_qt": "", "libopus": STUDIO}
        | {"libgsm": PHONE},
    ),
    Format("mp3", "MP3", {"libmp3lame": ""}),
    Format("mp2", "MP2", {"mp2": ""}),
    Format("aac", "ADTS", {"aac": ""}),
    Format("flac", "FLAC", {"flac": ""}),
    Format("ogg", "Ogg", {"libvorbis": "", "libopus": STUDIO, "flac": "", "libspeex": WIDE}),
    Format("m4a", "MPEG-4 audio", {"aac": "", "alac": ""}),
    Format("mp4", "MPEG-4", {"aac": "", "mp3": "", "ac3": "", "eac3": "", "libopus": STUDIO}),
    Format("mov", "QuickTime", {"pcm_s16le": "", "pcm_s24le": "", "adpcm_ima_qt": "", "aac": ""}),
    Format("3gp", "3GP", {"aac": ""}),
    Format(
        "mka",
        "Matroska",
        {**{name: "" for name in ("aac", "ac3", "eac3", "flac", "mp3", "libvorbis", "pcm_s16le")}}
        | {"libopus": STUDIO, "alac": "", "wavpack": "", "tta": "", "dca": DRAFT, "truehd": DRAFT},
    ),
    Format("webm", "WebM", {"libopus": STUDIO, "libvorbis": ""}),
    Format(
        "ts",
        "MPEG-TS",
        {"mp2": "", "mp3": "", "aac": "", "ac3": "", "libopus": STUDIO}
        | {"s302m": f"{STUDIO} {DRAFT}"},
    ),
    Format("mpg", "MPEG-PS", {"mp2": ""}),
    Format("vob", "DVD", {"ac3": "", "pcm_dvd": STUDIO}),
    Format("avi", "AVI", {"mp3": "", "ac3": "", "pcm_s16le": "", "adpcm_ms": "", "wmav2": ""}),
    Format("wma", "ASF", {"wmav1": "", "wmav2": "", "mp3": ""}),
    Format(
        "flv",
        "Flash video",
        {"mp3": "", "aac": "", "adpcm_swf": "", "nellymoser": PHONE, "libspeex": WIDE},
    ),
    Format("rm", "RealMedia", {"ac3": "", "real_144": PHONE}),
    Format("swf", "Flash", {"mp3": ""}),
    Format("nut", "NUT", {"mp3": "", "libvorbis": "", "pcm_s16le": ""}),
    Format("wtv", "Windows TV", {"mp2": ""}),
    Format("ac3", "AC-3", {"ac3": ""}),
    Format("eac3", "E-AC-3", {"eac3": ""}),
    Format("dts", "DTS", {"dca": DRAFT}),
    Format("thd", "TrueHD", {"truehd": DRAFT}),
    Format("tta", "True Audio", {"tta": ""}),
    Format("wv", "WavPack", {"wavpack": ""}),
    Format("voc", "Creative Voice", {"pcm_u8": "-ac 1", "pcm_s16le": ""}),
    Format("sox", "SoX", {"pcm_s32le": ""}),
    Format("sf", "IRCAM", {"pcm_s16le": ""}),
    Format("adx", "CRI ADX", {"adpcm_adx": ""}),
    Format("mmf", "Yamaha SMAF", {"adpcm_yamaha": PHONE}),
    Format("g722", "G.722", {"adpcm_g722": WIDE}),
    Format("gsm", "GSM", {"libgsm": PHONE}),
    Format("sbc", "SBC", {"sbc": ""}),
    Format("aptx", "aptX", {"aptx": DRAFT}),
]

DIFFERENT = {
    "wav, adpcm_ima_wav": (5e-3, "FFmpeg 8 rounds IMA steps otherwise than FFmpeg 5"),
}
"""Pairs that ffmpeg's program of Debian decodes otherwise, by how much, and why."""


def label(container: Format, codec: str) -> str:
    return f"{container.suffix}, {codec}"


PAIRS = {label(form, codec): (form, codec) for form in FORMATS for codec in form.codecs}
