import random
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cbnerf.config import Config, DataConfig, flatten
from cbnerf.overrides import cast, knob_type, load_config, save_config, with_overrides
from cbnerf.presets import METHODS, RESOLUTIONS, choose_resolution, preset

every_preset = pytest.mark.parametrize(
    "config", [preset(method, resolution) for method in METHODS for resolution in RESOLUTIONS]
)


@every_preset
def test_presets_survive_flattening_and_yaml(config: Config, tmp_path: Path):
    flat = flatten(config)
    assert with_overrides(Config(), flat) == config
    assert {name: cast(name, value) for name, value in flat.items()} == flat
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@every_preset
def test_a_patch_fits_into_the_images_of_every_preset(config: Config):
    assert config.data.width % config.data.scale == 0
    assert config.refiner.patch_size <= config.data.width * 3 / 4


def test_a_preset_changes_only_what_its_resolution_names():
    schedule = {
        "field.optim.batch_size",
        "field.optim.evaluations",
        "refiner.optim.passes",
        "refiner.optim.evaluations",
    }
    for method, config in METHODS.items():
        published = schedule if config.field.kind == "mlp" else set[str]()
        for name, overrides in RESOLUTIONS.items():
            before, after = flatten(config), flatten(preset(method, name))
            changed = {k for k in after if after[k] != before[k]}
            assert changed <= set(overrides) | published


def test_without_a_gpu_large_sizes_have_the_schedule_for_cpus():
    chosen = {has: [choose_resolution(name, has_gpu=has) for name in (None, "x2-504", "x2-128")]
              for has in (True, False)}  # fmt: skip
    assert chosen == {
        True: ["x2-504", "x2-504", "x2-128"],
        False: ["x2-128", "x2-504-cpu", "x2-128"],
    }
    for name in ("x2-504", "x2-1008", "x4-1008"):
        gpu, cpu = preset("cb-nerf", name), preset("cb-nerf", f"{name}-cpu")
        assert cpu.data == gpu.data and cpu.field.optim.passes < gpu.field.optim.passes
        assert choose_resolution(f"{name}-cpu", has_gpu=True) == f"{name}-cpu"


def test_at_cpu_sizes_the_published_systems_take_more_and_smaller_updates():
    for size in ("x2-128", "x2-252"):
        ours, mlp = (preset(name, size) for name in ("cb-nerf", "nerf-sr"))
        assert mlp.field.optim.batch_size < ours.field.optim.batch_size
        for stage in ("field", "refiner"):
            assert mlp.num_steps(stage, 100_000) > ours.num_steps(stage, 100_000)
    # On a GPU they keep what was published.
    assert preset("nerf-sr", "x2-504").field == METHODS["nerf-sr"].field


def test_the_mlp_has_the_published_rays_of_a_step_at_either_scale():
    for size in ("x2-504", "x4-1008"):
        config = preset("nerf-sr", size)
        assert config.field.optim.batch_size * config.data.scale**2 == 2048


def test_order_of_overrides_does_not_matter():
    # Half-way, 1008 pixels at scale 2 become 504 at scale 64, or the other way round.
    wanted = replace(Config(), data=DataConfig(width=640, scale=80, test_every=3))
    overrides = [(k, v) for k, v in flatten(wanted).items() if k.startswith("data.")]
    for seed in range(10):
        random.Random(seed).shuffle(overrides)
        assert with_overrides(Config(), dict(overrides)) == wanted


def test_each_knob_changes_alone():
    before = flatten(Config())
    for name, value in (("codebook.size", 7), ("loss.lambda_vq", 0.5), ("seed", 3)):
        assert flatten(with_overrides(Config(), {name: value})) == before | {name: value}
    assert flatten(Config()) == before


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("field.optim.lr", "1e-3", 0.001),  # as PyYAML reads it
        ("field.optim.lr", 1, 1.0),
        ("codebook.size", 512.0, 512),
        ("codebook.size", "512", 512),
        ("codebook.ema", True, True),
        ("field.planes.scales", [1, 2.0], (1, 2)),
        ("codebook.vq_loss", "released", "released"),
    ],
)
def test_values_become_the_type_of_their_knob(name: str, value, expected):
    result = cast(name, value)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("codebook.sise", 4, "unknown knob 'codebook.sise'; did you mean codebook.size"),
        ("lambda_vq", 1, "unknown knob 'lambda_vq'; did you mean loss.lambda_vq"),
        ("seed.x", 1, "unknown knob 'seed.x'"),
        ("", 1, "unknown knob ''"),
        ("codebook", {"size": 4}, "'codebook' is a group of knobs"),
        ("codebook.size", 4.5, "codebook.size = 4.5 is not an integer"),
        ("codebook.size", "many", "codebook.size = 'many' is not an integer"),
        ("codebook.size", float("inf"), "codebook.size = inf is not an integer"),
        ("codebook.size", True, "codebook.size = True is not an integer"),
        ("codebook.size", None, "codebook.size = None is not an integer"),
        ("codebook.size", [4], r"codebook.size = \[4\] is not an integer"),
        ("codebook.beta", "much", "codebook.beta = 'much' is not a number"),
        ("codebook.beta", True, "codebook.beta = True is not a number"),
        ("codebook.ema", 1, "codebook.ema = 1 is not true or false"),
        ("codebook.ema", "yes", "codebook.ema = 'yes' is not true or false"),
        ("codebook.vq_loss", "mine", "codebook.vq_loss = 'mine' is not one of paper, released"),
        ("codebook.vq_loss", ["paper"], "is not one of paper, released"),
        ("field.planes.scales", 4, "field.planes.scales = 4 is not a list of integers"),
        ("codebook.size", 1, "codebook.size = 1 must be at least 2"),
        ("codebook.beta", -0.1, "codebook.beta = -0.1 must be at least 0"),
        ("codebook.beta", float("nan"), "codebook.beta = nan must be at least 0"),
        ("field.planes.scales", [], "field.planes.scales"),
        ("refiner.neighbours", 0, "refiner.neighbours = 0 must be at least 1"),
        ("refiner.consistency", -1.0, "refiner.consistency = -1.0 must be at least 0"),
        ("refiner.ridge", 0.0, "refiner.ridge = 0.0 must be positive"),
        ("refiner.patch_size", 30, "refiner.patch_size = 30 must be a multiple of 4"),
        ("data.width", 4, "data.width = 4 must be at least 8"),
        ("data.test_every", 2, "data.test_every = 2 must be at least 3"),  # with data.validation
        ("data.test_every", 0, "data.test_every = 0 must be at least 3"),
        ("field.optim.steps", -1, "steps = -1 must be at least 0"),
        ("field.optim.passes", 0.0, "passes = 0.0 must be positive"),
        ("codebook.size", b"12", "codebook.size = b'12' is not an integer"),
        ("codebook.beta", float("inf"), "codebook.beta = inf must be finite"),
        ("codebook.size", 10**400, "codebook.size = a huge integer must be finite"),
        ("codebook.vq_loss", "x" * 5000, "codebook.vq_loss = 'x+[.]{3}x+' is not one of"),
        ("seed", -1, "seed = -1 must be at least 0"),
        ("seed", 2**32, "seed = 4294967296 must be at least 0 and less than"),
        ("field.planes.tv_weight", float("nan"), "field.planes.tv_weight = nan must be at least 0"),
        ("field.mlp.density_noise", -1.0, "field.mlp.density_noise = -1.0 must be at least 0"),
        ("field.mlp.position_frequencies", -1, "position_frequencies = -1 must be at least 0"),
    ],
)
def test_a_wrong_override_is_told_in_one_line(name, value, message: str):
    with pytest.raises(ValueError, match=message) as error:
        with_overrides(Config(), {name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"codebook.size": 300}, "codebook.size = 300 must be one of 64, 256, .* with fsq"),
        ({"codebook.imitation": "vq"}, "codebook.imitation = 'vq' must be feature or ce with fsq"),
    ],
)
def test_fsq_refuses_what_it_cannot_do(overrides: dict, message: str):
    with pytest.raises(ValueError, match=message):
        with_overrides(Config(), {"codebook.kind": "fsq"} | overrides)


def test_positions_are_refused_where_codes_cannot_hold_them():
    weight = {"codebook.position_weight": 2.0}
    message = "codebook.position_weight = 2.0 must be 0 with refiner.kind = paper"
    with pytest.raises(ValueError, match=message):
        with_overrides(METHODS["cb-nerf-paper"], weight)
    with pytest.raises(ValueError, match="codebook.position_weight = -1.0 must be at least 0"):
        with_overrides(Config(), {"codebook.position_weight": -1.0})
    plain, placed = with_overrides(Config(), {}), with_overrides(Config(), weight)
    assert placed.codebook.latent_dim == plain.codebook.latent_dim + 3
    assert placed.codebook.feature_dim == plain.codebook.feature_dim
    scalars = [with_overrides(config, {"codebook.kind": "fsq"}) for config in (plain, placed)]
    assert scalars[0].codebook.latent_dim == scalars[1].codebook.latent_dim


def test_codes_hold_positions_in_the_presets_that_filter_by_code():
    weights = {name: config.codebook.position_weight for name, config in METHODS.items()}
    assert {name for name, weight in weights.items() if weight} == {"cb-nerf"}
    assert weights["cb-nerf"] == 2


def test_a_knob_knows_its_type():
    assert knob_type("codebook.size") is int
    assert {type(name) for name in flatten(Config())} == {str}
    for name in flatten(Config()):
        knob_type(name)


@pytest.mark.parametrize(
    "text, message",
    [
        ("codebook.size: 1\n", "codebook.size = 1 must be"),
        ("codebook:\n  size: 4\n", "is a group of knobs"),
        ("1: 2\n", "1 is not a name"),
        ("- codebook.size\n", "found list"),
        ("", "found NoneType"),
        ("a: [1\nb: }", "not readable as YAML"),
        ("!!python/object/apply:os.getcwd []", "not readable as YAML"),
        ("codebook.size: 010\n", "'010' is not a plain number"),
        ("codebook.size: 1:30\n", "'1:30' is not a plain number"),
        ("codebook.size: 4\ncodebook.size: 8\n", "'codebook.size' stands twice"),
        ("codebook.size: 2026-13-01\n", "month must be in"),
        ("field.planes.scales: &a [*a]\n", "field.planes.scales = .* is not a list of integers"),
    ],
)
def test_a_malformed_file_is_named_in_one_line(text: str, message: str, tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        load_config(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="none.yaml: no such file"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "arguments, message",
    [(("nerv",), "unknown method 'nerv'"), (("nerf", "x3"), "unknown resolution 'x3'")],
)
def test_an_unknown_preset_lists_the_choices(arguments, message: str):
    with pytest.raises(ValueError, match=message):
        preset(*arguments)


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6), st.dates(),
    st.binary(max_size=4), st.lists(st.integers(-2, 9), max_size=3), st.just(10**400),
    st.sampled_from(["1e-3", "yes", "0x10", "1_0", "vq", "nan", "a\nb"]),
)  # fmt: skip


@settings(derandomize=True, max_examples=300, deadline=None, database=None)
@given(st.sampled_from(list(flatten(Config()))), JUNK)
def test_a_value_in_a_file_is_taken_as_written_or_refused(file: Path, name: str, value: object):
    file.write_text(yaml.safe_dump({name: value}), encoding="utf-8")
    try:
        found = flatten(load_config(file))[name]
    except ValueError as error:
        message = str(error)
        assert message.startswith(f"{file}: ") and message.isprintable() and len(message) < 600
        assert name in message
    else:
        assert isinstance(found, bool) == isinstance(value, bool)
        if isinstance(value, str) and not isinstance(found, str):  # a number in quotes
            assert found == float(value)
        else:
            assert found == (tuple(value) if isinstance(value, list) else value)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("configurations") / "mine.yaml"


def test_a_file_from_another_editor_is_read_alike(file: Path):
    for content in (b"\xef\xbb\xbfcodebook.beta: 1e-3\r\n", "codebook.beta: .001".encode("utf-16")):
        file.write_bytes(content)
        assert load_config(file).codebook.beta == 1e-3
