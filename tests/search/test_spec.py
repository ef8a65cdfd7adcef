import re
from pathlib import Path

import pytest

from cbnerf.search.spec import Choices, Range, Resources, Stopping, load_spec, parse_spec

pytestmark = pytest.mark.search

SPACE = "space: {codebook.size: {choices: [64, 1024]}}\n"
WITHOUT_SPACE = "method: cb-nerf\n"


def test_a_specification_is_read_with_the_types_of_its_knobs(tmp_path: Path):
    file = tmp_path / "good.yaml"
    file.write_text(
        "method: cnn\nresolution: x2-252\ntrials: 5\nseed: 3\n"
        "objectives: [val/ssim, seconds]\nlimits: {parameters: 300000}\n"
        "stopping: {rule: none, rungs: 2, eta: 4, threshold: 0.1}\n"
        "fixed: {refiner.optim.lr: 1e-3}\n"  # PyYAML reads this one as text
        "space:\n"
        "  codebook.size: {low: 64, high: 4096, log: true}\n"
        "  codebook.dim: {low: 4, high: 64, step: 4}\n"
        "  codebook.beta: {low: 1e-2, high: 2}\n"
        "  codebook.imitation: {choices: [vq, feature]}\n"
        "initial:\n  - {codebook.size: 256, codebook.beta: 1}\n"
        "resources: {workers: 2, cpus_per_worker: 0.5, gpus_per_worker: 1}\n",
        encoding="utf-8",
    )
    spec = load_spec(file)
    assert (spec.method, spec.resolution) == ("cnn", "x2-252")
    assert (spec.objectives, spec.limits) == (("val/ssim", "seconds"), {"parameters": 300_000.0})
    assert spec.stopping == Stopping(rule="none", rungs=2, eta=4, threshold=0.1)
    assert (spec.trials, spec.seed) == (5, 3)
    assert spec.fixed == {"refiner.optim.lr": 1e-3}
    assert spec.space == {
        "codebook.size": Range(low=64, high=4096, log=True),
        "codebook.dim": Range(low=4, high=64, step=4),
        "codebook.beta": Range(low=0.01, high=2.0),
        "codebook.imitation": Choices(choices=("vq", "feature")),
    }
    beta = spec.space["codebook.beta"]
    assert isinstance(beta, Range) and isinstance(beta.high, float)
    assert spec.initial == ({"codebook.size": 256, "codebook.beta": 1.0},)
    assert spec.resources == Resources(workers=2, cpus_per_worker=0.5, gpus_per_worker=1)


def test_all_but_the_space_may_be_left_out(tmp_path: Path):
    spec = parse_spec({"space": {"codebook.size": {"choices": [64]}}})
    assert spec.method == "cb-nerf" and spec.resources == Resources() and spec.initial == ()


BAD = {
    # what the file says: (text, what the message must name)
    "unknown key": ("trails: 3\n" + SPACE, "unknown key 'trails'"),
    "unknown knob": ("space: {codebook.sise: {choices: [1]}}", "did you mean codebook.size"),
    "unknown fixed knob": ("fixed: {codebok.dim: 3}\n" + SPACE, "did you mean codebook.dim"),
    "group of knobs": ("space: {codebook: {choices: [1]}}", "group of knobs"),
    "no space": (WITHOUT_SPACE, "space names no knob"),
    "empty space": ("space: {}", "space names no knob"),
    "space is a list": ("space: [codebook.size]", "space: expected"),
    "fixed is a list": ("fixed: [1]\n" + SPACE, "fixed: expected"),
    "fixed of wrong type": ("fixed: {codebook.dim: many}\n" + SPACE, "codebook.dim = 'many'"),
    "fixed fraction": ("fixed: {codebook.dim: 1.5}\n" + SPACE, "codebook.dim = 1.5"),
    "fixed nothing": ("fixed: {codebook.dim: }\n" + SPACE, "codebook.dim = None"),
    "choice of wrong type": ("space: {codebook.size: {choices: [a]}}", "codebook.size = 'a'"),
    "choices not a list": ("space: {codebook.size: {choices: 3}}", "choices must be a list"),
    "a list to search": (
        "space: {field.planes.scales: {choices: [[1, 4], [1, 2]]}}", "scales is a list"
    ),
    "a key twice": (SPACE + "trials: 2\ntrials: 3\n", "'trials' stands twice"),
    "no choices": ("space: {codebook.size: {choices: []}}", "choices must be a list"),
    "choices nested": ("space: {codebook.size: {choices: [[1, 2]]}}", "codebook.size = [1, 2]"),
    "bound of wrong type": ("space: {codebook.beta: {low: a, high: 1}}", "codebook.beta = 'a'"),
    "no high": ("space: {codebook.beta: {low: 1}}", "low: ..., high: ..."),
    "low not below high": ("space: {codebook.beta: {low: 2, high: 2}}", "low < high"),
    "low above high": ("space: {codebook.size: {low: 99, high: 3}}", "low < high"),
    "log from zero": ("space: {codebook.beta: {low: 0, high: 1, log: true}}", "0 < low < high"),
    "log not a truth": ("space: {codebook.beta: {low: 1, high: 2, log: 7}}", "log = 7"),
    "step with log": (
        "space: {codebook.size: {low: 2, high: 8, log: true, step: 2}}", "step must be positive",
    ),
    "step of zero": ("space: {codebook.size: {low: 2, high: 8, step: 0}}", "step must be positive"),
    "a choice twice": ("space: {codebook.beta: {choices: [1, 1.0]}}", "choices names"),
    "initial off the grid": (
        "initial: [{codebook.size: 70}]\nspace: {codebook.size: {low: 64, high: 128, step: 64}}",
        "outside the space",
    ),
    "infinite bound": ("space: {codebook.beta: {low: 1, high: .inf}}", "codebook.beta"),
    "bound is no number": ("space: {codebook.beta: {low: .nan, high: 1}}", "codebook.beta"),
    "range of words": ("space: {codebook.imitation: {low: 1, high: 2}}", "is not a number"),
    "eval": ('space: {codebook.beta: {"eval": "open(\'owned\', \'w\')"}}', "codebook.beta: give"),
    "choice beyond the knob": ("space: {codebook.size: {choices: [1]}}", "codebook.size = 1"),
    "range beyond the knob": ("space: {codebook.beta: {low: -1, high: 1}}", "codebook.beta = -1.0"),
    "fixed beyond the knob": ("fixed: {codebook.dim: 0}\n" + SPACE, "codebook.dim = 0"),
    "searched data": ("space: {data.scale: {choices: [2, 4]}}", "data.scale decides what is"),
    "nothing to select on": (
        "fixed: {data.validation: false}\n" + SPACE, "data.validation must be true",
    ),
    "fixed and searched": ("fixed: {codebook.size: 64}\n" + SPACE, "both fixed and space"),
    "initial outside choices": ("initial: [{codebook.size: 65}]\n" + SPACE, "outside the space"),
    "initial not searched": ("initial: [{codebook.dim: 4}]\n" + SPACE, "not in the space"),
    "initial of wrong type": ("initial: [{codebook.size: x}]\n" + SPACE, "codebook.size = 'x'"),
    "initial not a list": ("initial: {codebook.size: 64}\n" + SPACE, "initial must be a list"),
    "resources unknown": ("resources: {gpus: 1}\n" + SPACE, "unknown key 'gpus' in resources"),
    "resources of wrong type": ("resources: {workers: two}\n" + SPACE, "resources.workers"),
    "half a worker": ("resources: {workers: 1.5}\n" + SPACE, "resources.workers"),
    "auto workers": ("resources: {workers: auto}\n" + SPACE, "resources.workers"),
    "infinite CPUs": ("resources: {cpus_per_worker: .inf}\n" + SPACE, "cpus_per_worker"),
    "one bound of workers": ("resources: {workers: [2]}\n" + SPACE, "[2] is not a whole number or"),
    "workers that fall": ("resources: {workers: [4, 1]}\n" + SPACE, "needs least < most"),
    "no worker at least": ("resources: {workers: [0, 4]}\n" + SPACE, "at least 1 worker"),
    "a group that shares a GPU": (
        "resources: {workers: [1, 2], gpus_per_worker: 0.5}\n" + SPACE, "workers = [1, 2]: workers"
    ),
    "no worker": ("resources: {workers: 0}\n" + SPACE, "at least 1 worker"),
    "no CPU": ("resources: {cpus_per_worker: 0}\n" + SPACE, "some CPU"),
    "negative GPUs": ("resources: {gpus_per_worker: -1}\n" + SPACE, "gpus_per_worker"),
    "one GPU and a half": ("resources: {gpus_per_worker: 1.5}\n" + SPACE, "trains on one GPU"),
    "two GPUs a process": ("resources: {gpus_per_worker: 2}\n" + SPACE, "more resources.workers"),
    "next to no GPU": ("resources: {gpus_per_worker: 1.0e-6}\n" + SPACE, "at least 0.01"),
    "workers that share a GPU": (
        "resources: {workers: 2, gpus_per_worker: 0.25}\n" + SPACE, "need a whole GPU each"
    ),
    "unknown method": ("method: nerf2\n" + SPACE, "'nerf2' is not one of nerf, nerf-sr"),
    "method is a list": ("method: [nerf]\n" + SPACE, "method = ['nerf']"),
    "unknown resolution": ("resolution: x3\n" + SPACE, "'x3' is not one of auto"),
    "unknown objective": ("objectives: [val/lpips]\n" + SPACE, "'val/lpips' is not one of"),
    "objective is a name": ("objectives: val/psnr\n" + SPACE, "must be a list of names"),
    "a cost first": ("objectives: [seconds]\n" + SPACE, "first objective must be one of val/psnr"),
    "an objective twice": ("objectives: [val/psnr, val/psnr]\n" + SPACE, "names one twice"),
    "unknown limit": ("limits: {watts: 3}\n" + SPACE, "limits: 'watts'"),
    "limit of wrong type": ("limits: {parameters: few}\n" + SPACE, "'few' is not a number"),
    "unknown rule": ("stopping: {rule: luck}\n" + SPACE, "stopping.rule = 'luck' is not one of"),
    "unknown key of stopping": ("stopping: {rung: 3}\n" + SPACE, "unknown key 'rung' in stopping"),
    "no grace period": (
        "stopping: {grace_period: 0}\n" + SPACE,
        "stopping.grace_period must be at least 1",
    ),
    "no rungs": ("stopping: {rungs: 0}\n" + SPACE, "stopping.rungs must be at least 1"),
    "a sure threshold": ("stopping: {threshold: 0.7}\n" + SPACE, "between 0 and 0.5"),
    "unknown sampler": ("sampler: grid\n" + SPACE, "sampler = 'grid' is not one of"),
    "no trials": ("trials: 0\n" + SPACE, "trials must be at least 1"),
    "trials of wrong type": ("trials: many\n" + SPACE, "trials = 'many'"),
    "negative seed": ("seed: -1\n" + SPACE, "seed = -1"),
    "half a trial": ("trials: 1.5\n" + SPACE, "trials = 1.5"),
    "number as knob": ("space: {3: {choices: [1]}}", "3"),
    "a list": ("- trials\n", "expected `name: value` lines, found list"),
    "empty": ("", "expected `name: value` lines, found NoneType"),
    "not YAML": ("space: {a: [\n", "not readable as YAML"),
    "a tag": ("space: !!python/object/apply:os.getcwd []", "not readable as YAML"),
    "not text": (b"\xff\xfe\x00", "not readable as YAML"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_line_naming_file_and_problem(tmp_path: Path, name: str):
    text, problem = BAD[name]
    file = tmp_path / "bad.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=re.escape(problem)) as caught:
        load_spec(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ") and message.count(str(file)) == 1
    assert "\n" not in message
    assert not (tmp_path / "owned").exists()


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"nowhere\.yaml: no such file"):
        load_spec(tmp_path / "nowhere.yaml")
    with pytest.raises(ValueError, match="not readable"):
        load_spec(tmp_path)


@pytest.mark.parametrize(
    "written, last",
    [((1, 10, 4), 9), ((1, 9, 4), 9), ((0.0, 1.0, 0.3), 0.9), ((0.1, 0.7, 0.2), 0.7)],
)
def test_a_grid_ends_at_its_last_value(written: tuple, last: float):
    low, high, step = written
    name = "refiner.blocks" if isinstance(low, int) else "loss.lambda_vq"
    domain = parse_spec({"space": {name: {"low": low, "high": high, "step": step}}}).space[name]
    assert domain == Range(low=low, high=last, step=step)


def test_membership_is_that_of_the_grid_and_of_the_type():
    grid, real = Range(low=1, high=9, step=4), Range(low=0.0, high=1.0, step=0.1)
    assert [value for value in range(12) if value in grid] == [1, 5, 9]
    assert True not in grid and 5.0 not in grid
    assert 0.1 + 0.2 in real and 0.25 not in real and 1 not in real
    assert True not in Choices(choices=(1, 2)) and 1 not in Choices(choices=(True,))
    assert 3 in Range(low=1, high=9, log=True) and 0 not in Range(low=1, high=9, log=True)
