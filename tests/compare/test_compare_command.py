"""What `cbnerf compare` is asked for; nothing is trained."""

import pytest

from cbnerf.compare.command import Request, settle


def config_with(*knobs: str):
    request = Request(methods="cb-nerf", resolution="tiny", scenes="arcade", knobs=knobs)
    return settle(request).methods["cb-nerf"]


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.delenv("CBNERF_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


def test_knobs_have_the_values_of_a_yaml_file():
    config = config_with(
        "codebook.beta=1e-3", "codebook.size=128.0", "field.planes.scales=[1, 2]",
        "codebook.normalize=yes",
    )  # fmt: skip
    assert (config.codebook.beta, config.codebook.size) == (1e-3, 128)
    assert config.field.planes.scales == (1, 2) and config.codebook.normalize is True


@pytest.mark.parametrize(
    "knobs, message",
    [
        (["codebook.size"], "--knobs 'codebook.size' is not NAME=VALUE"),
        (["codebook.size="], "codebook.size = None is not an integer"),
        (["codebook.sise=4"], "did you mean codebook.size"),
        (["codebook.size=010"], "'010' is not a plain number"),
        (["codebook.size=[" + "[" * 5000], "nested too deep"),
        (["codebook.size={a: 1, a: 2}"], "'a' stands twice"),
        (["codebook.size=2026-13-01"], "month must be in"),
        (["codebook.size=true"], "codebook.size = True is not an integer"),
        (["codebook.beta=.inf"], "codebook.beta = inf must be finite"),
        (["codebook.size=4", "codebook.size=8"], "--knobs: codebook.size is named twice"),
        (["=4"], "unknown knob ''"),
    ],
)
def test_a_wrong_knob_is_one_line(knobs: list[str], message: str):
    with pytest.raises(ValueError) as caught:
        config_with(*knobs)
    assert message in str(caught.value) and str(caught.value).isprintable()


def test_a_method_whose_name_holds_a_comma_is_quoted(tmp_path):
    file = tmp_path / "k 64, beta 1.yaml"
    file.write_text("codebook.size: 64\ncodebook.beta: 1.0\n", encoding="utf-8")
    request = Request(methods=f'linear,"{file}"', resolution="tiny", scenes="arcade")
    methods = settle(request).methods
    assert [*methods] == ["linear", f"{tmp_path.name} k 64, beta 1"]
    assert methods[f"{tmp_path.name} k 64, beta 1"].codebook.beta == 1.0
