"""Settings: from YAML and arguments, strict, with messages that name the setting."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from kimia_infer.training.config import (
    ConfigError,
    FinetuneSettings,
    describe,
    from_dict,
    read_settings,
    to_dict,
)

NEEDED = ["model=weights/mini", "data=a.jsonl", "output=runs/a"]


def read(*assignments: str, path: Path | None = None) -> FinetuneSettings:
    return read_settings(FinetuneSettings, path, [*NEEDED, *assignments])


def test_published_defaults():
    settings = read()
    assert (settings.learning_rate, settings.weight_decay, settings.beta2) == (1e-5, 0.1, 0.95)
    assert (settings.epochs, settings.warmup_ratio, settings.eval_ratio) == (5, 0.01, 0.05)
    assert "whisper" in settings.trained_parts
    assert read("method=lora").trained_parts == ("trunk", "mimo", "adaptor", "heads")


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
    values = yaml.safe_load(yaml.safe_dump(to_dict(settings)))
    assert from_dict(FinetuneSettings, values) == settings


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("epoch=3", "epoch: unknown setting; did you mean epochs?"),
        ("lora.ranks=3", "lora.ranks: unknown setting; did you mean lora.rank?"),
        ("zebra=1", "zebra: unknown setting"),
        ("epochs=many", "epochs: expected int, found 'many'"),
        ("epochs=2.5", "epochs: expected int"),
        ("epochs=true", "epochs: expected int"),
        ("epochs=0", "epochs: 0 is less than 1"),
        ("learning_rate=nan", "learning_rate: expected float"),
        ("eval_ratio=1.5", "eval_ratio: 1.5 is more than 0.9"),
        ("gradient_checkpointing=1", "gradient_checkpointing: expected bool"),
        ("method=dora", "method: expected one of full, lora, qlora"),
        ("parts=trunk", "parts: expected a list"),
        ("parts=[]", "parts: expected a list"),
        ("parts=[brain]", "parts: expected one of embedding, trunk"),
        ("lora=8", "lora: expected a group"),
        ("seed.x=1", "seed: expected int"),
        ("epochs", "expected name=value"),
        ("data=[", "data: not valid YAML"),
    ],
)
def test_what_is_refused(assignment: str, message: str):
    with pytest.raises(ConfigError) as caught:
        read(assignment)
    assert message in str(caught.value)


def test_what_is_needed():
    with pytest.raises(ConfigError, match=r"^data: missing"):
        read_settings(FinetuneSettings, None, ["model=a", "output=b"])


def test_a_bad_file(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nowhere.yaml: cannot be read"):
        read(path=tmp_path / "nowhere.yaml")
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected settings as name: value"):
        read(path=path)


def test_every_setting_is_described():
    text = "\n".join(describe(FinetuneSettings))
    assert "output [required]: " in text
    assert "lora.layers [attention, feed_forward]: " in text
    assert len(text.splitlines()) == len(to_dict(read())) - 1 + len(to_dict(read())["lora"])
