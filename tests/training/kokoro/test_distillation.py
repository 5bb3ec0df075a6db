"""Adapters of Kokoro's prosody, trained on what the model itself says."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimia_infer.data.conversations import DataError
from kimia_infer.evaluation.prosody import ProsodyAgreement, prosody_agreement
from kimia_infer.models.kokoro.adapters.config import SEAMS, AdapterConfig
from kimia_infer.models.kokoro.adapters.seams import adapter_parameters, attach
from kimia_infer.models.kokoro.adapters.store import apply_adapter
from kimia_infer.models.kokoro.checkpoint import load_network
from kimia_infer.models.kokoro.config import KokoroConfig
from kimia_infer.models.kokoro.voices import Voices
from kimia_infer.training.config import read_config
from kimia_infer.training.run_directory import TrainingError
from kimia_infer.training.tasks.kokoro import ProsodyNetwork, train_kokoro
from kimia_infer.training.tasks.kokoro_config import KokoroTrainingConfig, ProsodyWeights
from kimia_infer.training.tasks.kokoro_data import Example, Line, Teacher, join, read_lines
from kimia_infer.training.trainer import TrainingResult
from kimia_infer.utils.errors import ConfigurationError, RequestError
from tests.command_line import run_here
from tests.models.kokoro.tiny import STYLE, narrow_kokoro
from tests.training.runs import interrupt, losses

CPU = torch.device("cpu")
LINES = (
    "kwˈɪk bɹˈWn fˈɑks",
    "ʤˈʌmps ˈOvəɹ",
    "ðə lˈAzi dˈɔɡ.",
    "fˈɑks ˈOvəɹ ðə dˈɔɡ",
    "lˈAzi bɹˈWn",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with narrow_kokoro(tmp_path_factory.mktemp("kokoro")) as directory:
        yield directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lines") / "lines.txt"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return path


def assignments(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    return [
        f"model={model}", f"data={data}", f"output={output}", "device=cpu", "batch_size=2",
        "eval_ratio=0.2", "learning_rate=1e-2", "adapter.rank=2", "max_steps=4", *more,
    ]  # fmt: skip


def run(known: list[str], resume: bool = False) -> TrainingResult:
    return train_kokoro(read_config(KokoroTrainingConfig, None, known), resume)


def teacher(model: Path, voice: str | None = None) -> Teacher:
    network = load_network(model, CPU)
    return Teacher(network, Voices(model, 2 * STYLE), voice)


def examples(model: Path, voice: str | None = None) -> list[Example]:
    answers = teacher(model, voice)
    return [answers(Line("here", text, "af_heart")) for text in LINES]


@pytest.mark.parametrize(
    "adapter",
    [
        ["adapter.method=lora"],
        *(
            ["adapter.method=residual", "adapter.width=16", f"adapter.cell={cell}"]
            for cell in ("cfc", "mamba")
        ),
    ],
    ids=lambda adapter: adapter[-1],
)
def test_prosody_of_another_voice_is_learned(
    model: Path, data: Path, tmp_path: Path, adapter: list[str]
):
    known = assignments(model, data, tmp_path, "teacher_voice=am_adam", "max_steps=20", *adapter)
    found = losses(run(known))
    assert sum(found[-4:]) < 0.6 * sum(found[:4])
    network = load_network(model, CPU)
    taught = examples(model, "am_adam")
    before = prosody_agreement(network.predictor, taught)
    apply_adapter(network.predictor, tmp_path / "final")
    after = prosody_agreement(network.predictor, taught)
    assert after.energy < before.energy


def test_outputs_of_lstms_are_learned(model: Path, data: Path, tmp_path: Path):
    known = assignments(
        model, data, tmp_path, "objective=outputs", "adapter.method=replace",
        "adapter.cell=ltc", "adapter.width=16", "max_steps=20",
    )  # fmt: skip
    found = run(known)
    for seam in SEAMS:
        errors = losses(found, f"{seam}_loss")
        assert errors[-1] < 0.9 * errors[0], seam


def test_an_interrupted_run_continues_as_if_it_had_not_been(
    model: Path, data: Path, tmp_path: Path
):
    more = ["teacher_voice=am_adam", "save_every=2", "max_steps=6"]
    whole, parts = (assignments(model, data, tmp_path / n, *more) for n in ("whole", "parts"))
    expected = run(whole)
    interrupt(lambda: run(parts), step=3)
    found = run(parts, resume=True)
    assert found.step == 6
    assert losses(found) == losses(expected)
    assert losses(found, "eval_loss") == losses(expected, "eval_loss")
    weights = [tmp_path / n / "final" / "adapter_model.safetensors" for n in ("whole", "parts")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_what_is_written_speaks_as_what_was_trained(model: Path, data: Path, tmp_path: Path):
    """The last validation, computed again through the stored adapter and a merged checkpoint."""
    known = assignments(model, data, tmp_path / "run", "teacher_voice=am_adam")
    result = run(known)
    adapter = tmp_path / "run" / "final"
    assert run_here("export", tmp_path / "run", tmp_path / "merged", "--merge") == 0
    assert run_here("export", tmp_path / "run", tmp_path / "copy") == 0
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    stored, merged = load_network(model, CPU), load_network(tmp_path / "merged", CPU)
    apply_adapter(stored.predictor, adapter)
    example = teacher(model, "am_adam")(Line("here", LINES[0], "af_heart"))
    for network in (stored, merged):
        student = ProsodyNetwork(network.predictor, AdapterConfig(), ProsodyWeights())
        with torch.no_grad():
            found = sum(student(join([example], [1.0], ["here"])).values())
        torch.testing.assert_close(found, torch.tensor([losses(result, "eval_loss")[-1]]))


def test_rows_of_a_batch_have_the_losses_that_they_have_alone(model: Path):
    taught = examples(model, "am_adam")[:3]
    predictor = copy.deepcopy(load_network(model, CPU).predictor)
    adapter = AdapterConfig(method="residual", cell="cfc", width=4)
    attach(predictor, adapter)
    student = ProsodyNetwork(predictor, adapter, ProsodyWeights())
    together = student(join(taught, [1.0] * 3, ["here"] * 3))
    for row, example in enumerate(taught):
        alone = student(join([example], [1.0], ["here"]))
        for name, value in alone.items():
            torch.testing.assert_close(together[name][row], value[0], atol=1e-4, rtol=1e-4)


def test_losses_are_zero_where_nothing_is_to_be_learned(model: Path):
    taught = examples(model)
    predictor = load_network(model, CPU).predictor
    attach(predictor, AdapterConfig(rank=2))
    student = ProsodyNetwork(predictor, AdapterConfig(rank=2), ProsodyWeights())
    for example in taught:
        for name, value in student(join([example], [1.0], ["here"])).items():
            assert value.abs() < 1e-5, name
    assert all(p.requires_grad for p in adapter_parameters(predictor).values())


@pytest.mark.parametrize(("seam", "changed"), [("lstm", "durations"), ("shared", "pitch")])
def test_only_what_a_seam_changes_is_computed(model: Path, seam: str, changed: str):
    adapter = AdapterConfig.model_validate({"rank": 2, "seams": [seam]})
    predictor = load_network(model, CPU).predictor
    attach(predictor, adapter)
    student = ProsodyNetwork(predictor, adapter, ProsodyWeights())
    found = student(join(examples(model, "am_adam")[:1], [1.0], ["here"]))
    assert found[changed].requires_grad
    other = {"durations": "pitch", "pitch": "durations"}[changed]
    assert found[other].item() == 0


def test_agreement_with_itself_is_complete(model: Path):
    found = prosody_agreement(load_network(model, CPU).predictor, examples(model))
    perfect = ProsodyAgreement(1, 1, 1, 0, 1, 0, found.energy_deviation)
    assert vars(found) == pytest.approx(vars(perfect), abs=1e-4)
    assert found.energy_deviation > 0.1


def test_agreement_counts_frames_and_cents(model: Path):
    """Against answers that are changed by known amounts."""

    def changed(example: Example) -> Example:
        longer = example.durations.clone()
        longer[0] += 2
        one = [example.pitch[:1], example.energy[:1]]
        pitch, energy = (
            torch.cat([first.expand(4), curve])
            for first, curve in zip(one, (example.pitch, example.energy), strict=True)
        )
        values = vars(example) | {"durations": longer, "pitch": pitch, "energy": energy}
        return Example(**values)

    taught = examples(model)[:1]
    symbols = len(taught[0].durations)
    found = prosody_agreement(load_network(model, CPU).predictor, [changed(taught[0])])
    assert found.equal == pytest.approx(1 - 1 / symbols)
    assert found.within_one == pytest.approx(1 - 1 / symbols)
    frames = int(taught[0].durations.sum())
    assert found.length == pytest.approx(frames / (frames + 2))
    higher = [Example(**(vars(taught[0]) | {"pitch": taught[0].pitch * 2}))]
    assert prosody_agreement(load_network(model, CPU).predictor, higher).cents == pytest.approx(
        1200, rel=1e-3
    )


def test_made_up_strings_are_dealt_to_voices(model: Path):
    config = KokoroConfig.from_directory(model)
    settings = read_config(
        KokoroTrainingConfig, None, ["model=m", "output=o", "strings=40", "voices=[a, b, c]"]
    )
    lines = read_lines(settings, None, config)
    assert [line.voice for line in lines[:4]] == ["a", "b", "c", "a"]
    assert len({line.phonemes for line in lines}) == 40
    assert lines == read_lines(settings, None, config)
    assert min(len(line.phonemes) for line in lines) > 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fˈɑks\n£5\n", r"lines.txt, line 2: 5 £: no phonemes of this model"),
        ("fˈɑks\n\n", r"lines.txt, line 2: expected 1 .. 254 phonemes, found 0"),
        ("s" * 255 + "\n", r"line 1: expected 1 .. 254 phonemes, found 255"),
    ],
)
def test_lines_that_cannot_be_used_are_named(model: Path, tmp_path: Path, text: str, message: str):
    path = tmp_path / "lines.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        run(assignments(model, path, tmp_path / "run"))


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ("voices=[af_hart]", RequestError, "voice: unknown voice 'af_hart'; did you mean af_heart"),
        ("teacher_voice=nobody", RequestError, "voice: unknown voice 'nobody'"),
        ("adapter.cell=cfc", ConfigurationError, "adapter: cell: lora takes no cell"),
        ("adapter.seams=[lstm, decoder]", ConfigurationError, r"adapter.seams\[1\]"),
        ("objective=outputs", ConfigurationError, "objective: outputs are learned by"),
        ("workers=2", ConfigurationError, "workers: "),
        ("precision=bf16", ConfigurationError, "precision: prosody is computed in float32"),
    ],
)
def test_wrong_settings_are_named(
    model: Path, data: Path, tmp_path: Path, setting: str, error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        run(assignments(model, data, tmp_path / "run", setting))


def test_a_run_is_not_continued_on_another_model(model: Path, data: Path, tmp_path: Path):
    run(assignments(model, data, tmp_path / "run", "max_steps=2"))
    other = shutil.copytree(model, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["predictor.shared.bias_ih_l0"] += 1
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(TrainingError, match="of another model than"):
        run(assignments(other, data, tmp_path / "run", "max_steps=2"), resume=True)


def test_the_command_runs(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    known = assignments(model, data, tmp_path / "run", "max_steps=2")
    assert run_here("finetune-kokoro", *known) == 0
    assert "run/final: 2 steps, loss" in capsys.readouterr().out
    card = (tmp_path / "run" / "final" / "README.md").read_text()
    assert "| adapter | lora, rank 2 |" in card
    assert run_here("finetune-kokoro", *known) == 2
    assert "continue it with --resume" in capsys.readouterr().err
