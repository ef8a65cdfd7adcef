"""The store with real processes, files and locks; training is a file written slowly."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cbnerf.cli import main
from cbnerf.nerf.model import Precision
from cbnerf.training.store import Store, write_manifest

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def cache(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def writer(
    text: str = "weights", log: list[Path] | None = None, precision: Precision = "float32"
) -> Callable[[Path], None]:
    """Stands in for training: leaves a file and a manifest, and records that it ran."""

    def train(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "renders.npz").write_text(text, encoding="utf-8")
        write_manifest(folder, precision)
        if log is not None:
            log.append(folder)

    return train


def states(cache: Store, *, thorough: bool = False) -> dict[str, str]:
    return {entry.folder.name: entry.state for entry in cache.entries(thorough=thorough)}


def test_an_entry_is_trained_once(cache: Store):
    log: list[Path] = []
    entry = cache.path("field", "fern", "0123")
    for _ in range(3):
        assert cache.complete(entry, writer(log=log)) == entry
    assert log == [entry] and (entry / "renders.npz").read_text(encoding="utf-8") == "weights"
    assert states(cache) == {"field-fern-0123": "whole"}


def test_an_unfinished_entry_is_resumed(cache: Store):
    entry = cache.path("field", "fern", "0123")
    entry.mkdir(parents=True)
    (entry / "progress").write_text("half", encoding="utf-8")
    assert states(cache) == {"field-fern-0123": "unfinished"}
    cache.complete(entry, writer())
    assert (entry / "progress").read_text(encoding="utf-8") == "half"


def test_a_checkpoint_that_cannot_be_read_is_not_resumed(cache: Store):
    entry = cache.path("field", "fern", "0123")
    entry.mkdir(parents=True)
    (entry / "field.pt").write_bytes(b"half a checkpoint")
    cache.complete(entry, writer())
    assert not (entry / "field.pt").exists()


def test_the_rest_of_a_killed_write_is_not_part_of_an_entry(cache: Store):
    entry = cache.path("field", "fern", "0123")
    entry.mkdir(parents=True)
    (entry / ".field.pt.0123").write_bytes(b"half a checkpoint")
    cache.complete(entry, writer())
    assert {file.name for file in entry.iterdir()} == {"renders.npz", "manifest.json"}


DAMAGES: dict[str, Callable[[Path], object]] = {
    "shorter": lambda entry: (entry / "renders.npz").write_text("weigh", encoding="utf-8"),
    "missing": lambda entry: (entry / "renders.npz").unlink(),
    "manifest": lambda entry: (entry / "manifest.json").write_text("{", encoding="utf-8"),
    "manifest of another kind": lambda entry: (entry / "manifest.json").write_text(
        "[1]", encoding="utf-8"
    ),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_broken_entry_is_retrained(cache: Store, how: str):
    entry = cache.complete(cache.path("field", "fern", "0123"), writer())
    DAMAGES[how](entry)
    assert states(cache) == {"field-fern-0123": "broken"}
    log: list[Path] = []
    cache.complete(entry, writer(log=log))
    assert log == [entry] and states(cache) == {"field-fern-0123": "whole"}


def test_a_flipped_bit_is_found_by_the_next_process(cache: Store):
    entry = cache.complete(cache.path("field", "fern", "0123"), writer("weights"))
    (entry / "renders.npz").write_text("Weights", encoding="utf-8")
    assert states(cache) == {"field-fern-0123": "whole"}
    assert states(cache, thorough=True) == {"field-fern-0123": "broken"}
    process = FORK.Process(target=cache.complete, args=(entry, writer("weights")))
    process.start()
    process.join()
    assert (entry / "renders.npz").read_text(encoding="utf-8") == "weights"


def slow(folder: Path) -> None:
    """Stands in for a training of 1.5 s; records its process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "log").open("a", encoding="utf-8") as log:
        log.write(f"{os.getpid()}\n")
    (folder / "progress").write_text(str(os.getpid()), encoding="utf-8")
    time.sleep(1.5)
    (folder / "renders.npz").write_text("weights", encoding="utf-8")
    write_manifest(folder, "float32")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("die", [False, True])
def test_concurrent_requests_train_once_and_survive_a_kill(cache: Store, die: bool):
    entry = cache.path("field", "fern", "0123")
    processes = [FORK.Process(target=cache.complete, args=(entry, slow)) for _ in range(3)]
    for process in processes:
        process.start()
    until((entry / "progress").exists)
    until(lambda: (entry / "progress").read_text(encoding="utf-8") != "")
    assert states(cache) == {"field-fern-0123": "in use"}
    assert not cache.remove(entry)
    if die:
        os.kill(int((entry / "progress").read_text(encoding="utf-8")), signal.SIGKILL)
    for process in processes:
        process.join()
    makers = (cache.folder / "log").read_text(encoding="utf-8").split()
    assert len(makers) == len(set(makers)) == 1 + die
    assert states(cache) == {"field-fern-0123": "whole"}


def test_a_remote_store_brings_an_entry_to_another_cluster(tmp_path: Path):
    pytest.importorskip("pyarrow")
    store = (tmp_path / "store").as_uri()
    here, there = (Store(tmp_path / name / "cache", store) for name in ("here", "there"))
    here.complete(here.path("field", "fern", "0123"), writer())
    log: list[Path] = []
    entry = there.complete(there.path("field", "fern", "0123"), writer(log=log))
    assert not log and (entry / "renders.npz").read_text(encoding="utf-8") == "weights"
    assert states(there, thorough=True) == {"field-fern-0123": "whole"}


@pytest.mark.parametrize("damage", ["renders.npz", "manifest.json"])
def test_a_damaged_remote_entry_is_not_used(tmp_path: Path, damage: str):
    pytest.importorskip("pyarrow")
    store = (tmp_path / "store").as_uri()
    here, there = (Store(tmp_path / name / "cache", store) for name in ("here", "there"))
    here.complete(here.path("field", "fern", "0123"), writer())
    (tmp_path / "store" / "field-fern-0123" / damage).write_text("{}", encoding="utf-8")
    log: list[Path] = []
    entry = there.complete(there.path("field", "fern", "0123"), writer(log=log))
    assert log == [entry]
    assert sorted(f.name for f in there.folder.iterdir()) == [".locks", "field-fern-0123"]


def test_pruning_takes_broken_then_idle_then_surplus_entries(cache: Store):
    entries = {}
    for age, name in enumerate(("new", "old", "older", "broken")):
        entry = cache.complete(cache.path("field", name, "0"), writer("x" * 1000))
        then = time.time() - 10 * 86_400 * age
        os.utime(cache.folder / ".locks" / f"{entry.name}.lock", (then, then))
        entries[name] = entry
    (entries["broken"] / "renders.npz").write_text("", encoding="utf-8")

    def left() -> list[str]:
        return [name for name, entry in entries.items() if entry.exists()]

    cache.prune(idle_days=99.0, max_bytes=1e9)
    assert left() == ["new", "old", "older"]
    cache.prune(idle_days=15.0, max_bytes=1e9)
    assert left() == ["new", "old"]
    cache.prune(idle_days=99.0, max_bytes=1500.0)
    assert left() == ["new"]


def test_the_command_lists_verifies_and_prunes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cache = Store(tmp_path / "cache")
    entry = cache.complete(cache.path("field", "fern", "0123"), writer())
    here = ["--storage", str(tmp_path)]
    main(["cache", "list", *here])
    listed = capsys.readouterr().out
    assert listed.startswith("whole ") and "field-fern-0123" in listed and "1 entries" in listed
    (entry / "renders.npz").write_text("Weights", encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        main(["cache", "verify", *here])
    output = capsys.readouterr()
    assert output.out.startswith("broken ") and "not those of its manifest" in output.err
    main(["cache", "prune", *here, "--max-gb", "0"])
    assert "removed 1 entries" in capsys.readouterr().out and not entry.exists()
    with pytest.raises(SystemExit, match="2"):
        main(["cache", "list", "--storage", str(tmp_path / "nowhere")])
    assert "no such cache" in capsys.readouterr().err


def test_the_manifest_records_the_precision(cache: Store):
    precisions: tuple[Precision, ...] = ("bfloat16", "float32")
    for precision in precisions:
        train = writer(precision=precision)
        entry = cache.complete(cache.path("field", "fern", precision), train)
        manifest = json.loads((entry / "manifest.json").read_text(encoding="utf-8"))
        assert manifest["precision"] == precision and list(manifest["files"]) == ["renders.npz"]
