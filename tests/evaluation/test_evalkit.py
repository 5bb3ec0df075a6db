"""The published Evalkit's wrapper of the model works with this package in its place.

It puts a checkout of the published project, its submodule, on ``sys.path``, creates the model by
``model_path`` with ``load_detokenizer=False``, and for each item calls ``generate`` with the
messages, a dictionary of all sampling parameters and ``output_type`` by name, inside
``torch.inference_mode``. An item without a question has an empty text message.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.paths import MINI, ROOT
from tests.training.runs import write_sound

WRAPPER = """
import json, sys
sys.path.insert(0, "almeval/models/kimi_audio")
import torch
from kimia_infer.api.kimia import KimiAudio
from kimia_infer.api.parameters import BUDGETS

assert "almeval" in sys.modules["kimia_infer"].__path__[0]
BUDGETS["text"] = 80  # so that an answer that does not end, ends

model = KimiAudio(model_path=sys.argv[1], load_detokenizer=False)
sampling = {
    "audio_temperature": 0.8,
    "audio_top_k": 10,
    "text_temperature": 0.0,
    "text_top_k": 5,
    "audio_repetition_penalty": 1.0,
    "audio_repetition_window_size": 64,
    "text_repetition_penalty": 1.1,
    "text_repetition_window_size": 16,
    "max_new_tokens": -1,
}

@torch.inference_mode()
def answer(prompt):
    messages = []
    if prompt is not None:
        messages.append({"role": "user", "message_type": "text", "content": prompt})
    messages.append({"role": "user", "message_type": "audio", "content": "sound.wav"})
    wav, text = model.generate(messages, **sampling, output_type="text")
    assert wav is None
    return text

print(json.dumps([answer(prompt) for prompt in (None, "", "Please transcribe this audio.")]))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the wrapper gets: without a prompt, with an empty one, and with a question."""
    folder = tmp_path_factory.mktemp("evalkit")
    submodule = folder / "almeval" / "models" / "kimi_audio"
    submodule.parent.mkdir(parents=True)
    submodule.symlink_to(ROOT)
    write_sound(folder / "sound.wav", 0.5, 0)
    (folder / "wrapper.py").write_text(WRAPPER)
    done = subprocess.run(
        [sys.executable, "wrapper.py", str(MINI)],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_wrapper_of_the_published_evaluation_runs_unchanged(answers: list[str]):
    assert len(answers) == 3
    assert all(isinstance(answer, str) for answer in answers)


def test_an_empty_prompt_asks_nothing(answers: list[str]):
    assert answers[0] == answers[1]
