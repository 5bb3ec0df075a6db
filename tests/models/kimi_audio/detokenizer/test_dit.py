"""The velocity network and its ODE against the recorded published implementation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from kimia_infer.models.kimi_audio.config import DiTConfig
from kimia_infer.models.kimi_audio.dit import DiT, dit_component, dit_slots
from kimia_infer.models.kimi_audio.flow import (
    CACHE_TIMESTEP,
    Chunk,
    FlowNetwork,
    FrameCache,
    Past,
    StreamConfig,
)
from kimia_infer.utils.errors import CheckpointError
from kimia_infer.utils.graphs import Direct
from kimia_infer.weights.component import expected_tensors

TOLERANCE = 1e-4
CPU = torch.device("cpu")
Recorded = dict[str, torch.Tensor]

# The published audio_detokenizer/config.yaml, as far as it is read.
FULL_SIZE = {
    "normalize_mel": True,
    "mel_mean": -4.479605,
    "mel_std": 3.4584913,
    "model": {
        "dit": {
            "depth": 16,
            "hidden_size": 2304,
            "num_heads": 18,
            "mlp_ratio": 4,
            "input_size": 80,
            "semantic_vocab_size": 16384,
            "condition_type": "discrete_codes",
            "position_embedding_type": "skip",
            "use_rope": True,
            "rope_params": {
                "max_position_embeddings": 4096,
                "rope_base": 10000.0,
                "rope_interpolation_factor": 1.0,
            },
            "ffn_type": "vanilla_mlp",
            "ffn_gated_glu": False,
        }
    },
}


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


@pytest.fixture(scope="module")
def recorded(golden: Path) -> Recorded:
    return load_file(golden / "detok" / "unit.safetensors")


def new_cache(dit: DiT, frames: int, past: Past | None = None) -> FrameCache:
    return FrameCache.behind(past or Past.nothing(dit), frames)


def recorded_times(recorded: Recorded) -> list[int]:
    return sorted(
        int(name[5:-4]) for name in recorded if name[:5] == "dit.t" and name[-4:] == ".out"
    )


@torch.no_grad()
def test_single_evaluations(dit: DiT, recorded: Recorded) -> None:
    """Embedding, every block and the velocity; all times conditioned in one call."""
    times = recorded_times(recorded)
    assert times
    positions = recorded["dit.position_ids"]
    conditioning = dit.condition(recorded["dit.tokens"], torch.tensor(times))
    rotary = dit.rotary(positions)
    blocks: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _m, _a, output: blocks.append(output.flatten(0, 1)))
        for block in dit.blocks
    ]
    for step, time in enumerate(times):
        blocks.clear()
        attend = new_cache(dit, len(positions)).attend
        out = dit(recorded["dit.x"], conditioning.at(step), rotary, attend)
        close(dit.t_embedder(torch.tensor([time])), recorded[f"dit.t{time}.t_emb"])
        for index, block in enumerate(blocks):
            close(block, recorded[f"dit.t{time}.block.{index}"])
        close(out, recorded[f"dit.t{time}.out"])
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def test_incremental_evaluation(dit: DiT, recorded: Recorded) -> None:
    """Frames on top of a cache, as recorded: the second part at time 300."""
    x, tokens = recorded["dit.x"], recorded["dit.tokens"]
    first, positions = len(recorded["dit_inc.cache.0.k"]), recorded["dit.position_ids"]
    cache = new_cache(dit, first)
    conditioning = dit.condition(tokens[:first], torch.tensor([CACHE_TIMESTEP]))
    dit(x[:first], conditioning.at(0), dit.rotary(positions[:first]), cache.attend)
    past = cache.past(first, limit=len(x))
    close(past.keys[0].transpose(0, 1), recorded["dit_inc.cache.0.k"])
    close(past.values[0].transpose(0, 1), recorded["dit_inc.cache.0.v"])
    cache = new_cache(dit, len(x) - first, past)
    conditioning = dit.condition(tokens[first:], torch.tensor([300]))
    for _ in range(2):  # an evaluation leaves the past as it was
        out = dit(x[first:], conditioning.at(0), dit.rotary(positions[first:]), cache.attend)
        close(out, recorded["dit_inc.out"])


@torch.no_grad()
def test_frames_of_a_code_share_their_modulation(dit: DiT) -> None:
    """Codes given once, or once per frame, are the same condition."""
    codes, repeat = torch.tensor([3, 1, 4]), 4
    x = torch.randn(len(codes) * repeat, dit.config.mel_bins)
    rotary, times = dit.rotary(torch.arange(len(x))), torch.tensor([500])
    once = dit(x, dit.condition(codes, times).at(0), rotary, new_cache(dit, len(x)).attend)
    each = dit.condition(codes.repeat_interleave(repeat), times).at(0)
    out = dit(x, each, rotary, new_cache(dit, len(x)).attend)
    torch.testing.assert_close(once, out)


@torch.no_grad()
def test_ode(dit: DiT, recorded: Recorded) -> None:
    """Ten grid points, nine Euler steps, mel de-normalized."""
    noise, tokens = recorded["ode.noise"], recorded["ode.tokens"].tolist()
    config = StreamConfig(ode_points=10, frames_per_code=len(noise) // len(tokens))
    network = FlowNetwork(dit, config, Direct(), (1,))
    chunk = Chunk(tokens, len(tokens), 0, Past.nothing(dit), noise, continues=False)
    (solution,) = network.solve([chunk])
    assert solution.past is None
    close(network.mel(solution), recorded["ode.neural_ode_euler.mel"])


def test_cache_forgets_the_oldest_frames(dit: DiT) -> None:
    cache = new_cache(dit, 7)
    numbers = torch.arange(7.0)[:, None].expand(dit.config.heads, 7, dit.config.head_dim)
    for layer in range(dit.config.depth):
        cache.attend(numbers, numbers, -numbers, layer)
    past = cache.past(6, limit=4)
    assert past.keys[-1, 0, :, 0].tolist() == [2, 3, 4, 5]
    torch.testing.assert_close(past.values, -past.keys)
    torch.testing.assert_close(new_cache(dit, 5, past).past(0, limit=4), past)


def test_full_size_manifest() -> None:
    """Tensors and values of the published file, derived from the configuration alone."""
    config = DiTConfig.from_dict(FULL_SIZE)
    slots = dit_slots(config)
    shapes = expected_tensors(slots)
    assert len(shapes) == 171
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 1_584_023_120
    assert shapes["semantic_token_embedding.weight"] == (16385, 2304)
    with torch.device("meta"):
        module = DiT(config)
    filled = sorted(slot.parameter for slot in slots)
    assert filled == sorted(name for name, _ in module.named_parameters())
    assert not list(module.buffers())


def test_slim_checkpoint_without_prefix(dit: DiT, checkpoint: Path, tmp_path: Path) -> None:
    save_file(dict(dit.state_dict()), tmp_path / "model.safetensors")
    config = (checkpoint / "audio_detokenizer" / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(config)
    slim = dit_component(tmp_path).load(CPU, torch.float32)
    for name, value in dit.state_dict().items():
        assert torch.equal(slim.get_parameter(name), value)


def test_surplus_tensor_is_refused(dit: DiT, checkpoint: Path, tmp_path: Path) -> None:
    surplus = {"speech_model.surplus.weight": torch.zeros(1)}
    surplus |= {f"speech_model.{name}": value for name, value in dit.state_dict().items()}
    save_file(surplus, tmp_path / "model.safetensors")
    config = (checkpoint / "audio_detokenizer" / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(config)
    with pytest.raises(CheckpointError, match=r"surplus\.weight has no place"):
        dit_component(tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.dit.depth", None, "model.dit.depth must be a positive integer"),
        ("model.dit.depth", 2.5, "model.dit.depth must be a positive integer"),
        ("model.dit.num_heads", 0, "model.dit.num_heads must be a positive integer"),
        ("model.dit.num_heads", 7, "even multiple of model.dit.num_heads"),
        ("model.dit.use_rope", False, "use_rope = False is not supported"),
        ("model.dit.rope_params.rope_interpolation_factor", "x", "must be a number"),
        ("mel_mean", "low", "mel_mean must be a number"),
        ("normalize_mel", "no", "normalize_mel must be true or false"),
    ],
)
def test_bad_configuration(path: str, value: object, message: str, tmp_path: Path) -> None:
    values = yaml.safe_load(yaml.safe_dump(FULL_SIZE))
    *parents, leaf = path.split(".")
    place = values
    for key in parents:
        place = place[key]
    place[leaf] = value
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(CheckpointError, match=message) as error:
        DiTConfig.from_directory(tmp_path)
    assert str(tmp_path / "config.yaml") in str(error.value)


def test_fields_that_may_be_left_out_or_differ() -> None:
    values = yaml.safe_load(yaml.safe_dump(FULL_SIZE))
    values["normalize_mel"] = False
    del values["model"]["dit"]["rope_params"]
    config = DiTConfig.from_dict(values)
    assert (config.rope_base, config.rope_interpolation) == (10000.0, 1.0)
    assert (config.mel_mean, config.mel_std) == (0.0, 1.0)


def test_interpolated_positions_are_closer_together(dit: DiT) -> None:
    stretched = DiT(dataclasses.replace(dit.config, rope_interpolation=2.0))
    torch.testing.assert_close(stretched.rotary(torch.arange(9))[::2], dit.rotary(torch.arange(5)))


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "file missing"), ("a: [", "not valid YAML"), ("just text", "is not supported")],
)
def test_unreadable_configuration(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        DiTConfig.from_directory(tmp_path)
