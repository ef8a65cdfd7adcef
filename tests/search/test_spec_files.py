"""Odd YAML files: each is read as YAML says, or refused in one line that names the problem."""

import re
from pathlib import Path

import pytest

from cbnerf.search.spec import Choices, load_spec

pytestmark = pytest.mark.search


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "spec.yaml"


SPACE = "space: {codebook.dim: {choices: [4, 8]}}\n"
LAUGHS = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 8)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
ODD = {
    "an alias of itself": ("space: &a {codebook.dim: {choices: &b [*b]}}", "codebook.dim"),
    "a mapping in itself": ("space: &a {codebook.dim: *a}", "codebook.dim"),
    "a billion laughs": (LAUGHS + SPACE, "unknown key 'a'"),
    "a billion choices": (
        LAUGHS.replace("a:", "fixed:\n a:").replace("\n", "\n ") + "\n", "fixed|YAML|knob",
    ),
    "nested deep": ("space: " + "[" * 5000, "too deep"),
    "nested less deep": ("space: " + "[" * 100 + "]" * 100, "space: expected"),
    "octal": ("trials: 010\n" + SPACE, "'010' is not a plain number"),
    "octal in a knob": ("fixed: {refiner.blocks: 07}\n" + SPACE, "'07' is not a plain number"),
    "sexagesimal": ("trials: 1:30\n" + SPACE, "'1:30' is not a plain number"),
    "a time": ("fixed: {loss.lambda_vq: 1:30.5}\n" + SPACE, "'1:30.5' is not a plain number"),
    "the 13th month": ("trials: 2026-13-01\n" + SPACE, "month must be in"),
    "an empty int": ("trials: !!int ''\n" + SPACE, "not readable as YAML"),
    "a strange bool": ("trials: !!bool maybe\n" + SPACE, "not readable as YAML"),
    "a strange time": ("trials: !!timestamp soon\n" + SPACE, "not readable as YAML"),
    "more digits than Python reads": ("trials: " + "9" * 5000 + "\n" + SPACE, "not readable"),
    "a huge hexadecimal": ("trials: 0x" + "f" * 5000 + "\n" + SPACE, "trials = a huge integer"),
    "on": ("fixed: {refiner.blocks: on}\n" + SPACE, "refiner.blocks = True is not an integer"),
    "yes": ("trials: yes\n" + SPACE, "trials = True"),
    "a word that YAML reads as no": ("method: no\n" + SPACE, "method = False is not a name"),
    "binary": ("fixed: {refiner.blocks: !!binary MTI=}\n" + SPACE, "refiner.blocks = b'12'"),
    "a tab": ("fixed:\n\trefiner.blocks: 2\n" + SPACE, "not readable as YAML"),
    "a nested key": ("fixed: {refiner: {blocks: 2}}\n" + SPACE, "'refiner' is a group of knobs"),
    "a key twice, quoted once": (SPACE + "'space': {}\n", "'space' stands twice"),
    "a knob twice": ("fixed: {refiner.blocks: 2, refiner.blocks: 3}\n" + SPACE, "stands twice"),
    "a merge of no mapping": ("<<: 3\n" + SPACE, "not readable as YAML"),
    "two documents": (SPACE + "---\n" + SPACE, "not readable as YAML"),
    "an unknown alias": ("space: *a", "not readable as YAML"),
    "a choice twice": ("space: {codebook.dim: {choices: [4, 4.0]}}", "choices names 4 twice"),
    "a truth twice": ("space: {codebook.normalize: {choices: [yes, on]}}", "names True twice"),
    "a truth for one": ("space: {codebook.dim: {choices: [1, true]}}", "codebook.dim = True"),
    "an initial point off the grid": (
        "space: {codebook.dim: {low: 4, high: 9, step: 2}}\ninitial: [{codebook.dim: 5}]",
        "codebook.dim = 5 lies outside the space",
    ),
    "a step beyond the range": ("space: {codebook.dim: {low: 4, high: 9, step: 6}}", "step must"),
    "a fraction of a step": ("space: {codebook.dim: {low: 4, high: 9, step: .5}}", "codebook.dim"),
    "a step between floats": (
        "space: {codebook.beta: {low: 0.033378402553538716, high: 1, step: 0.025336044397125567}}",
        "too many digits",
    ),
    "a NaN step": ("space: {codebook.beta: {low: 0, high: 1, step: .nan}}", "step must"),
    "trials beyond memory": ("trials: 10000000000\n" + SPACE, "trials must be at least 1 and at"),
    "rungs without end": ("stopping: {rungs: 1000000000}\n" + SPACE, "stopping.rungs"),
    "a line in a key": ('limits: {"a\\nb": 3}\n' + SPACE, r"limits: 'a\nb'"),
    "Latin-1": ("# Größe\n".encode("latin-1") + SPACE.encode(), "not readable as YAML"),
    "UTF-16 without its mark": (SPACE.encode("utf-16-le"), "not readable as YAML"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_an_odd_file_is_one_line(file: Path, name: str):
    text, problem = ODD[name]
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as caught:
        load_spec(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ") and message.isprintable() and len(message) < 1500
    pattern = problem if "|" in problem else re.escape(problem)
    assert re.search(pattern, message.removeprefix(f"{file}: "))


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbf" + SPACE.encode(),
        SPACE.encode("utf-16"),
        SPACE.replace("\n", "\r\n").encode(),
        ("# Größe, размер, 大小\n" + SPACE).encode(),
        b"x: &x {choices: [4, 8]}\n"[3:-1].join([b"space: {codebook.dim: ", b"}\n"]),
        b"space: {codebook.dim: {<<: {choices: [4, 8]}}}\n",
        b"space: {codebook.dim: {choices: &some [4, 8]}, refiner.blocks: {choices: *some}}\n",
        b"space: {codebook.dim: {choices: [0x4, 8.0]}}\n",
        b"space: {codebook.dim: {choices: ['4', 8e0]}}\n",
    ],
    ids=["mark", "utf-16", "crlf", "unicode", "anchor", "merge", "alias", "hexadecimal", "floats"],
)
def test_what_means_the_same_is_read_alike(file: Path, text: bytes):
    file.write_bytes(text)
    domain = load_spec(file).space["codebook.dim"]
    assert domain == Choices(choices=(4, 8))
    assert isinstance(domain, Choices) and all(type(choice) is int for choice in domain.choices)
