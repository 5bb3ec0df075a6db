"""The one declaration of parameters: what it accepts, and that the rest of the code agrees."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args

import pytest

from kimia_infer.api.parameters import (
    Parameters,
    ServiceParameters,
    parse_as,
    parse_parameters,
)
from kimia_infer.commands.evaluate import SAMPLING
from kimia_infer.layers.sampler import MAX_SEED, TrackSampling
from kimia_infer.models.kimi_audio.detokenizer import PRESETS
from kimia_infer.utils.errors import RequestError


@pytest.mark.parametrize(
    ("name", "suggestions"),
    [
        ("temperature", ["audio_temperature", "text_temperature"]),
        ("top_k", ["audio_top_k", "text_top_k"]),
        ("max_tokens", ["max_new_tokens"]),
        ("audoi_top_k", ["audio_top_k"]),
        ("x", []),
    ],
)
def test_unknown_name_is_refused_with_the_real_ones(name: str, suggestions: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        parse_parameters(**{name: 1})
    message = str(caught.value)
    assert message.startswith(f"{name}: unknown parameter")
    assert all(suggestion in message for suggestion in suggestions)
    assert ("did you mean" in message) == bool(suggestions)


def test_message_names_parameter_rule_and_value() -> None:
    with pytest.raises(RequestError) as caught:
        parse_parameters(seed=-1)
    assert str(caught.value) == (
        f"seed: expected a whole number of at least 0 and at most {MAX_SEED}, found -1"
    )
    with pytest.raises(RequestError, match=r"expected -1 \(no limit\) or at least 1, found 0"):
        parse_parameters(max_new_tokens=0)


def test_values_reach_the_sampler_as_published() -> None:
    """top_k below 0 is 0, integers become floats and whole floats integers."""
    sampling = parse_parameters(
        audio_temperature=1, audio_top_k=-3, audio_repetition_window_size=2.0
    ).sampling
    assert sampling.audio == TrackSampling(1.0, 0, 1.0, 2)
    assert sampling.text == TrackSampling(0.0, 5, 1.0, 16)
    assert isinstance(sampling.audio.repetition_window_size, int)


def test_a_service_has_the_same_parameters_within_narrower_bounds() -> None:
    library, service = Parameters.model_fields, ServiceParameters.model_fields
    assert list(service) == list(library)
    for name in library:
        assert service[name].description == library[name].description
    for wrong in ({"audio_temperature": 2.1}, {"text_top_k": -1}, {"max_new_tokens": 7501}):
        parse_parameters(**wrong)
        with pytest.raises(RequestError, match=f"{min(wrong)}: expected"):
            parse_as(ServiceParameters, wrong)


def test_choices_and_bounds_are_those_of_the_modules_that_use_them() -> None:
    properties = ServiceParameters.model_json_schema()["properties"]
    assert set(properties["preset"]["enum"]) == set(PRESETS)
    assert properties["seed"]["anyOf"][0]["maximum"] == MAX_SEED
    assert all(get_args(f.annotation) or f.description for f in Parameters.model_fields.values())


def test_evaluation_has_the_defaults_of_the_library() -> None:
    defaults = {name: default for name, (_, default) in SAMPLING.items()}
    assert defaults.pop("seed") == 0, "results can be repeated"
    assert defaults == {name: Parameters.model_fields[name].default for name in defaults}


def test_command_lines_can_import_it_without_pytorch() -> None:
    code = "import sys, kimia_infer.api.parameters; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
