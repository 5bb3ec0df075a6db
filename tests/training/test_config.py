"""Settings: from YAML and arguments, strict, with messages that name the setting."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml

from kimia_infer.training.config import FinetuneConfig, describe, read_config
from kimia_infer.training.run_directory import path_faults
from kimia_infer.utils.errors import ConfigurationError
from tests.paths import ROOT

NEEDED = ["model=weights/mini", "data=a.jsonl", "output=runs/a"]


def read(*assignments: str, path: Path | None = None) -> FinetuneConfig:
    return read_config(FinetuneConfig, path, [*NEEDED, *assignments])


def test_published_defaults():
    settings = read()
    assert (settings.learning_rate, settings.weight_decay, settings.beta2) == (1e-5, 0.1, 0.95)
    assert (settings.epochs, settings.warmup_ratio, settings.eval_ratio) == (5, 0.01, 0.05)
    assert "whisper" in settings.trained_components
    assert read("method=lora").trained_components == ("trunk", "mimo", "adaptor", "heads")


@pytest.mark.parametrize(
    ("assignment", "data"),
    [
        ("eval_ratio=0", "none"),
        ("eval_ratio=0.1", "the first 10% of the training data"),
        ("eval_data=b.jsonl", "b.jsonl"),
    ],
)
def test_the_summary_names_the_validation_data(assignment: str, data: str):
    assert read(assignment).summary()["validation data"] == data


def test_arguments_win_over_the_file(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("epochs: 3\nlearning_rate: 1e-4\nlora:\n  rank: 4\n  dropout: 0\n")
    settings = read("lora.rank=32", "parts=[trunk, heads]", "max_grad_norm=null", path=path)
    assert (settings.epochs, settings.learning_rate) == (3, 1e-4)
    assert (settings.lora.rank, settings.lora.dropout) == (32, 0.0)
    assert settings.parts == ("trunk", "heads")
    assert settings.max_grad_norm is None


def test_settings_survive_a_file():
    settings = read("method=lora", "parts=[mimo]", "lora.layers=[attention]", "max_steps=7")
    values = yaml.safe_load(yaml.safe_dump(settings.model_dump(mode="json")))
    assert FinetuneConfig(**values) == settings


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("epoch=3", "epoch: unknown field; did you mean epochs?"),
        ("lora.ranks=3", "lora.ranks: unknown field; did you mean lora.rank?"),
        ("zebra=1", "zebra: unknown field"),
        ("epochs=many", "epochs: expected a valid integer, found 'many'"),
        ("epochs=2.5", "epochs: expected a valid integer"),
        ("epochs=true", "epochs: expected a valid integer"),
        ("epochs=0", "epochs: expected greater than or equal to 1, found 0"),
        ("learning_rate=nan", "learning_rate: expected a valid number"),
        ("eval_ratio=1.5", "eval_ratio: expected less than or equal to 0.9, found 1.5"),
        ("gradient_checkpointing=1", "gradient_checkpointing: expected a valid boolean"),
        ("method=dora", "method: expected 'full', 'lora' or 'qlora'"),
        ("parts=trunk", "parts: expected a list"),
        ("parts=[]", "parts: expected a list"),
        ("parts=[brain]", "parts[0]: expected 'embedding', 'trunk'"),
        ("lora=8", "lora: expected an object"),
        ("seed.x=1", "seed: expected a valid integer"),
        ("epochs", "expected name=value"),
        ("data=[", "data: not valid YAML"),
    ],
)
def test_what_is_refused(assignment: str, message: str):
    with pytest.raises(ConfigurationError) as caught:
        read(assignment)
    assert message in str(caught.value)


def test_what_is_needed():
    with pytest.raises(ConfigurationError, match=r"^data: missing"):
        read_config(FinetuneConfig, None, ["model=a", "output=b"])


def test_everything_that_is_wrong_is_named_at_once(tmp_path: Path):
    (tmp_path / "checkpoints" / "step-00000002").mkdir(parents=True)
    assignments = ["model=a", f"output={tmp_path}", "data=nope.jsonl", "epoch=3", "seed=-1"]
    with pytest.raises(ConfigurationError) as caught:
        read_config(FinetuneConfig, None, assignments, partial(path_faults, resume=False))
    first, *faults = str(caught.value).splitlines()
    assert first == "5 settings are wrong:"
    beginnings = ("seed: ", "epoch: ", "data: nope.jsonl ", "model: a is ", f"output: {tmp_path} ")
    for fault, beginning in zip(faults, beginnings, strict=True):
        assert fault.startswith(f"  {beginning}")


def test_settings_are_read_without_slow_imports():
    code = (
        "import sys, kimia_infer.training.run_directory, kimia_infer.training.tasks.config\n"
        "sys.exit(bool({'torch', 'transformers', 'accelerate'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_bad_file(tmp_path: Path):
    with pytest.raises(ConfigurationError, match=r"nowhere.yaml: cannot be read"):
        read(path=tmp_path / "nowhere.yaml")
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ConfigurationError, match="expected settings as name: value"):
        read(path=path)


def test_every_setting_is_described():
    text = "\n".join(describe(FinetuneConfig))
    assert "output [required]: " in text
    assert "lora.layers [attention, feed_forward], one of attention, feed_forward: " in text
    settings = read().model_dump().values()
    groups = [len(value) if isinstance(value, dict) else 1 for value in settings]
    assert len(text.splitlines()) == sum(groups)
