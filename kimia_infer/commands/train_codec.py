"""Train a component of the codec: give the model another voice, or other codes.

    kimi-audio train-codec tokenizer data=spoken.jsonl output=runs/tokenizer
    kimi-audio train-codec vocoder data=recordings output=runs/vocoder
    kimi-audio train-codec detokenizer data=recordings model=weights/mini output=runs/detokenizer
    kimi-audio train-codec vocoder voice.yaml --resume

Settings come from a YAML file, name=value arguments, or both; arguments win. OUTPUT/final holds the
component in the published layout; `kimi-audio export` puts it into a checkpoint to serve.
A detokenizer belongs to the codes of its tokenizer: train the tokenizer first.
"""

from __future__ import annotations

from argparse import Namespace

from kimia_infer.commands.parser import Parser
from kimia_infer.commands.settings import add_settings, check_settings, describe, read, report

COMPONENTS = {
    "detokenizer": ("DetokenizerTrainingConfig", "speech codes to mel spectrograms, of one voice"),
    "vocoder": ("VocoderTrainingConfig", "mel spectrograms to waveforms"),
    "tokenizer": ("TokenizerTrainingConfig", "audio to speech codes"),
}


def add_arguments(parser: Parser) -> None:
    components = parser.add_subparsers(
        dest="component", required=True, metavar="COMPONENT", title="components, each with --help"
    )
    for name, (settings, text) in COMPONENTS.items():
        component = components.add_parser(name, help=text, description=f"Train: {text}.")
        add_settings(component, describe("kimia_infer.training.tasks.config", settings))


check = check_settings


def run(arguments: Namespace) -> int:
    from kimia_infer.training.tasks import config

    settings = read(getattr(config, COMPONENTS[arguments.component][0]), arguments)
    from kimia_infer.training.tasks.detokenizer import train_detokenizer  # imports PyTorch: seconds
    from kimia_infer.training.tasks.speech_tokenizer import train_tokenizer
    from kimia_infer.training.tasks.vocoder import train_vocoder

    train = {
        "detokenizer": train_detokenizer,
        "vocoder": train_vocoder,
        "tokenizer": train_tokenizer,
    }[arguments.component]
    return report(train(settings, arguments.resume), settings.output)
