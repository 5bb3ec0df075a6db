"""What a run gave is exported whole, and answers the same whether merged or added at load."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimia_infer.api.events import AudioChunk, Completion, TextDelta
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.models.kimi_audio.slim import prepare_weights
from kimia_infer.training.export import ExportError, export, find_result
from kimia_infer.training.run_directory import CARD, FINAL
from kimia_infer.training.tasks.finetune import finetune
from kimia_infer.utils.errors import CheckpointError, WeightsError
from kimia_infer.weights.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter
from tests.command_line import run_here
from tests.paths import ROOT
from tests.serving.helpers import data_uri, serve
from tests.training import runs

EXPORT, INFER = (ROOT / "scripts" / name for name in ("export", "infer"))
WHISPER = "whisper-large-v3"


@pytest.fixture(scope="module")
def run(tmp_path_factory, untrained: Path) -> Path:
    """A run of two steps that adapts everything that can be, and leaves its mark."""
    folder = tmp_path_factory.mktemp("run")
    data = runs.write_data(tmp_path_factory.mktemp("data"))
    settings = runs.settings(
        data, folder, f"model={untrained}", "method=lora",
        "parts=[trunk, mimo, adaptor, heads, whisper]",
        "max_steps=2", "save_every=1", "learning_rate=5e-2",
    )  # fmt: skip
    finetune(settings)
    return folder


@pytest.fixture(scope="module")
def merged(run: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "merged"
    assert export(run, folder, merge=True) == ["--weights", str(folder)]
    return folder


def answer(model: KimiAudio, sound: Path, output_type: str) -> Completion:
    """Streamed and not, which must agree."""
    chats = [{"role": "user", "message_type": "audio", "content": str(sound)}]
    arguments = {"max_new_tokens": 24, "seed": 1, "preset": "quality"}
    wav, text = model.generate(chats, output_type=output_type, **arguments)
    *pieces, last = model.stream(chats, output_type=output_type, **arguments)
    assert "".join(p.text for p in pieces if isinstance(p, TextDelta)) == text == last.text
    if wav is not None:
        joined = torch.cat([p.wav for p in pieces if isinstance(p, AudioChunk)])
        torch.testing.assert_close(joined, wav[0])
    return last


@pytest.mark.parametrize(
    ("output_type", "head_rows", "dtype"),
    [("text", "track", "float32"), ("both", "full", "float32")],
)
def test_merged_and_added_at_load_answer_the_same(
    run: Path,
    merged: Path,
    tmp_path: Path,
    output_type: str,
    head_rows: str,
    dtype: str,
    untrained: Path,
):
    options = {"device": "cpu", "dtype": dtype, "head_rows": head_rows}
    sound = runs.write_sound(tmp_path / "question.wav", 1.0, 7)
    expected, found, base = (
        answer(KimiAudio(str(path), adapter=adapter, **options), sound, output_type)
        for path, adapter in ((untrained, run / FINAL), (merged, None), (untrained, None))
    )
    assert found.text_ids == expected.text_ids
    assert found.audio_ids == expected.audio_ids
    assert (found.text_ids, found.audio_ids) != (base.text_ids, base.audio_ids)
    assert expected.metrics["adapter"] == f"{run.name}/{FINAL}"
    assert "adapter" not in found.metrics


def test_a_slim_checkpoint_takes_an_adapter(
    run: Path, merged: Path, tmp_path: Path, capsys, untrained: Path
):
    prepare_weights(untrained, tmp_path / "slim")
    options = {"device": "cpu", "dtype": "bfloat16", "head_rows": "track"}
    sound = runs.write_sound(tmp_path / "question.wav", 1.0, 7)
    export(run, tmp_path / "merged", merge=True, base=str(tmp_path / "slim"))
    whole = KimiAudio(str(merged), **options)
    for weights, adapter in (("slim", run / FINAL), ("merged", None)):
        model = KimiAudio(str(tmp_path / weights), adapter=adapter, **options)
        found, expected = (answer(m, sound, "both") for m in (model, whole))
        assert (found.text_ids, found.audio_ids) == (expected.text_ids, expected.audio_ids)


def test_a_merged_checkpoint_is_the_base_but_for_what_was_adapted(
    run: Path, merged: Path, untrained: Path
):
    before, after = (load_file(folder / "model.safetensors") for folder in (untrained, merged))
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {
        n: (t.shape, t.dtype) for n, t in after.items()
    }
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "model.layers.0.self_attn.k_proj.weight" in changed
    assert {"lm_head.weight", "mimo_output.weight", "model.vq_adaptor.layers.3.weight"} <= changed
    assert "model.embed_tokens.weight" not in changed
    assert not [name for name in changed if "norm" in name or name.endswith("bias")]
    adapter = Adapter.read(run / FINAL)
    for part, rows in (("q", slice(0, 128)), ("k", slice(128, 192)), ("v", slice(192, 256))):
        name = f"model.mimo_layers.1.self_attn.{part}_proj.weight"
        a, b = adapter.factors["language_model.mimo_layers.1.attention.qkv"]
        expected = before[name].float() + adapter.scale * (b @ a)[rows]
        torch.testing.assert_close(after[name], expected.to(torch.bfloat16))
    old, new = (load_file(folder / WHISPER / "model.safetensors") for folder in (untrained, merged))
    assert new.keys() <= old.keys()
    assert not torch.equal(
        old["model.encoder.layers.0.fc1.weight"], new["model.encoder.layers.0.fc1.weight"]
    )
    vocoder = "vocoder/model.safetensors"
    assert (merged / vocoder).samefile(untrained / vocoder)
    files = {p.relative_to(untrained) for p in untrained.rglob("*") if p.is_file()}
    assert {p.relative_to(merged) for p in merged.rglob("*") if p.is_file()} == {*files, Path(CARD)}


def test_the_card_describes_what_was_made(run: Path, merged: Path, untrained: Path):
    adapter, whole = ((folder / CARD).read_text() for folder in (run / FINAL, merged))
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    last = [line["loss"] for line in metrics if "loss" in line][-1]
    for text in (adapter, whole):
        assert text.startswith(f"# {run.name}: Kimi-Audio, fine-tuned\n")
        assert f"| base model | {untrained} |" in text
        assert "| trained | lora, rank 8: trunk, mimo, adaptor, heads, whisper |" in text
        assert "| steps | 2, of 2 samples each |" in text
        assert f"loss {last:.3g}" in text
    assert f"scripts/serve --weights {untrained} --adapter THIS_DIRECTORY" in adapter
    assert "--adapter" not in whole
    assert "scripts/serve --weights THIS_DIRECTORY" in whole


def test_an_adapter_is_copied_and_the_command_merges_it(
    run: Path, tmp_path: Path, untrained: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "adapter"
    assert export(run, output) == ["--weights", str(untrained), "--adapter", str(output)]
    assert {path.name for path in output.iterdir()} == {CONFIG_NAME, WEIGHTS_NAME, CARD}
    early = run / "checkpoints" / "step-00000001"
    assert run_here("export", early, output, "--merge", "--force") == 0
    assert capsys.readouterr().out == f"scripts/serve --weights {output}\n"
    assert (output / "config.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_full_run_is_exported_as_it_is(merged: Path, tmp_path: Path):
    assert export(merged, tmp_path / "copy") == ["--weights", str(tmp_path / "copy")]
    weights = "model.safetensors"
    assert (tmp_path / "copy" / weights).samefile(merged / weights)
    with pytest.raises(ExportError, match="a whole model, not an adapter; leave out --merge"):
        export(merged, tmp_path / "more", merge=True)


def test_a_part_of_the_codec_takes_the_place_of_the_old_one(tmp_path: Path, untrained: Path):
    new = tmp_path / "run" / FINAL / "vocoder"
    shutil.copytree(untrained / "vocoder", new)
    tensors = {n: t * 1.5 for n, t in load_file(new / "model.safetensors").items()}
    save_file(tensors, new / "model.safetensors")
    with pytest.raises(ExportError, match="a component of a model; name the whole one with --base"):
        export(tmp_path / "run", tmp_path / "voice")
    export(tmp_path / "run", tmp_path / "voice", base=str(untrained))
    weights = Path("vocoder/model.safetensors")
    assert (tmp_path / "voice" / weights).samefile(new / weights.name)
    for path in untrained.rglob("*.safetensors"):
        name = path.relative_to(untrained)
        assert (tmp_path / "voice" / name).samefile(path) == (name != weights)
    name = min(tensors)
    save_file({n: t for n, t in tensors.items() if n != name}, new / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"tensor {name} is missing"):
        export(tmp_path / "run", tmp_path / "broken", base=str(untrained))
    assert not (tmp_path / "broken").exists()


def test_what_cannot_be_exported(run: Path, tmp_path: Path, untrained: Path):
    for source, output, message in (
        (tmp_path, tmp_path / "x", "not a run, a checkpoint of one, a model or an adapter"),
        (run, run / FINAL / "x", "name a directory elsewhere"),
        (run, tmp_path, "exists"),
    ):
        with pytest.raises(ExportError, match=message):
            export(source, output)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ExportError, match="holds neither a model nor an adapter"):
        export(run, tmp_path / "mine", force=True)
    for output, options in ((untrained / "x", {"merge": True}), (untrained, {"force": True})):
        with pytest.raises(ExportError, match="lies in the model"):
            export(run, output, **options)
    with pytest.raises(WeightsError, match="nowhere"):
        export(run, tmp_path / "x", merge=True, base="nowhere")

    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, most))
    try:
        with pytest.raises(OSError, match="File too large"):
            export(run, tmp_path / "x", merge=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_unfinished_run_names_its_checkpoints(tmp_path: Path):
    (tmp_path / "checkpoints" / "step-00000004" / "model").mkdir(parents=True)
    with pytest.raises(ExportError, match=r"not complete; name a .*step-00000004"):
        find_result(tmp_path)


def test_an_adapter_that_does_not_fit_is_refused_before_loading(
    run: Path, tmp_path: Path, untrained: Path
):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        os.link(run / FINAL / name, adapter / name)
    tensors = load_file(adapter / WEIGHTS_NAME)
    name = next(name for name in tensors if "mimo_layers.1" in name)
    renamed = {n.replace("mimo_layers.1", "mimo_layers.7"): t for n, t in tensors.items()}
    (adapter / WEIGHTS_NAME).unlink()
    save_file(renamed, adapter / WEIGHTS_NAME)
    assert name not in renamed
    with pytest.raises(CheckpointError, match=r"mimo_layers.1\S+ is missing; it was trained on"):
        KimiAudio(str(untrained), device="cpu", adapter=adapter)
    with pytest.raises(CheckpointError, match=r"mimo_layers.1\S+ is missing"):
        export(adapter, tmp_path / "x", merge=True)
    config = json.loads((adapter / CONFIG_NAME).read_text())
    assert config["base_model_name_or_path"] == str(untrained)


def test_a_server_adds_the_adapter(run: Path, golden: Path, tmp_path: Path, untrained: Path):
    sound = runs.write_sound(tmp_path / "question.wav", 1.0, 7)
    adapter = os.path.relpath(run / FINAL)  # the server runs in another directory
    known = ("--weights", str(untrained), "--adapter", adapter)
    inputs = {"audio": data_uri(sound.read_bytes()), "output_type": "text", "max_new_tokens": 12}
    with serve(golden, tmp_path, *known) as server:
        found = server.succeed(**inputs)
        assert found["metrics"]["adapter"] == f"{run.name}/{FINAL}"
        assert f"adapter: {run / FINAL}" in (tmp_path / "log").read_text()
    model = KimiAudio(str(untrained), device="cpu", adapter=run / FINAL, load_detokenizer=False)
    chats = [{"role": "user", "message_type": "audio", "content": str(sound)}]
    assert found["output"]["text"] == model.generate(chats, max_new_tokens=12)[1]


@pytest.mark.parametrize("script", ["serve", "infer"])
def test_an_adapter_that_is_not_there(script: str, tmp_path: Path, untrained: Path):
    arguments = ["--weights", untrained, "--adapter", tmp_path / "nowhere"]
    if script == "infer":
        arguments += ["--text", "Hello", "--output", tmp_path / "x.wav"]
    done = subprocess.run(
        [sys.executable, INFER.with_name(script), *arguments], capture_output=True, text=True
    )
    assert done.returncode in (1, 2)
    assert "nowhere" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
