import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from cbnerf.config import Config
from cbnerf.presets import preset
from cbnerf.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, save_weights

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(tiny_config: Config) -> Checkpoint:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return Checkpoint(
        stage="field",
        scene="fern",
        step=7,
        config=tiny_config,
        precision="float32",
        model=layer.state_dict(),
        optimizer=optimizer.state_dict(),
        cameras={"camera_to_world": torch.eye(3, 4)[None], "frustum": (1.5, 2.0), "size": (3, 4)},
    )


def as_bytes(value: object) -> bytes:
    """Equal for equal nested values, tensors too."""
    return pickle.dumps(
        torch.utils._pytree.tree_map(
            lambda leaf: leaf.numpy().tobytes() if isinstance(leaf, torch.Tensor) else leaf, value
        )
    )


@pytest.mark.parametrize("method", ["cb-nerf", "cb-nerf-paper"])
def test_checkpoints_read_back(method: str, checkpoint: Checkpoint, tmp_path: Path):
    checkpoint = checkpoint._replace(config=preset(method, "x4-1008"))
    save_checkpoint(checkpoint, tmp_path / "new" / "field.pt")
    stored = load_checkpoint(tmp_path / "new" / "field.pt", "field", CPU)
    assert stored[:5] == checkpoint[:5]
    for name in ("model", "optimizer", "cameras"):
        assert as_bytes(dict(getattr(stored, name))) == as_bytes(dict(getattr(checkpoint, name)))


def test_weights_alone_are_the_checkpoint_without_its_optimizer(
    checkpoint: Checkpoint, tmp_path: Path
):
    state = {"state": {0: {"exp_avg": torch.ones(100_000)}}}
    save_checkpoint(checkpoint._replace(optimizer=state), tmp_path / "field.pt")
    save_weights(tmp_path / "field.pt", "field", tmp_path / "copy.pt")
    assert (tmp_path / "copy.pt").stat().st_size < 20_000
    stored = load_checkpoint(tmp_path / "copy.pt", "field", CPU)
    assert stored[:5] == checkpoint[:5] and stored.optimizer == {}
    for name in ("model", "cameras"):
        assert as_bytes(dict(getattr(stored, name))) == as_bytes(dict(getattr(checkpoint, name)))


def test_a_failing_save_leaves_the_old_file_alone(checkpoint, tmp_path: Path, monkeypatch):
    path = tmp_path / "field.pt"
    save_checkpoint(checkpoint, path)

    def fill_the_disk(content: object, file: str) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(checkpoint._replace(step=8), path)
    assert [file.name for file in tmp_path.iterdir()] == ["field.pt"]
    assert load_checkpoint(path, "field", CPU).step == 7


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_is_never_run_as_code(checkpoint: Checkpoint, tmp_path: Path):
    victim, path = tmp_path / "victim", tmp_path / "field.pt"
    torch.save(checkpoint._asdict() | {"model": Malicious(victim)}, path)
    with pytest.raises(ValueError, match="field.pt: not a checkpoint of cbnerf") as error:
        load_checkpoint(path, "field", CPU)
    assert "\n" not in str(error.value)
    path.write_bytes(pickle.dumps(Malicious(victim)))
    with pytest.raises(ValueError, match="field.pt: not a checkpoint of cbnerf"):
        load_checkpoint(path, "field", CPU)
    assert not victim.exists()
    pickle.loads(path.read_bytes())
    assert victim.exists()  # the attack is a real one


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", pickle.dumps({"a": 1})])
def test_what_is_no_checkpoint_is_told_in_one_line(content: bytes, tmp_path: Path):
    path = tmp_path / "mine.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="mine.pt: not a checkpoint of cbnerf") as error:
        load_checkpoint(path, "field", CPU)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [{"stage": "field"}, [1, 2], torch.ones(3)])
def test_other_tensors_files_are_no_checkpoints(content, tmp_path: Path):
    torch.save(content, tmp_path / "mine.pt")
    with pytest.raises(ValueError, match="mine.pt: not a checkpoint of cbnerf"):
        load_checkpoint(tmp_path / "mine.pt", "field", CPU)


def test_no_damage_raises_anything_but_one_line(checkpoint: Checkpoint, tmp_path: Path):
    path = tmp_path / "field.pt"
    save_checkpoint(checkpoint, path)
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for trial in range(150):
        damaged = bytearray(whole if trial % 3 else whole[: generator.integers(len(whole))])
        for place in generator.integers(0, max(len(damaged), 1), 8 if damaged else 0):
            damaged[place] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            load_checkpoint(path, "field", CPU)
        except ValueError as error:
            assert str(path) in str(error)


def test_mistakes_are_named(checkpoint: Checkpoint, tmp_path: Path):
    path = tmp_path / "field.pt"
    with pytest.raises(ValueError, match="field.pt: no such checkpoint"):
        load_checkpoint(path, "field", CPU)
    save_checkpoint(checkpoint, path)
    with pytest.raises(ValueError, match="field.pt: holds a field, expected a refiner"):
        load_checkpoint(path, "refiner", CPU)
    content = torch.load(path, weights_only=True)
    torch.save(content | {"config": {"codebook.colour": 3}}, path)
    with pytest.raises(ValueError, match="another version of cbnerf .*codebook.colour"):
        load_checkpoint(path, "field", CPU)
