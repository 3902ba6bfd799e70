from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from throttle.control.settings import ControlSettings
from throttle.daemon.config import DaemonConfig, load_config, split_address
from throttle.daemon.layers import ConfigurationError, settings_of

NEEDED = {"simulated_gpus": "gpus"}


def write(path, text):
    path.write_text(text, "utf-8")
    return path


def test_defaults_fill_what_nobody_says():
    config = load_config(NEEDED, {}, None)
    assert config == DaemonConfig(simulated_gpus=Path("gpus"))
    assert config.control == ControlSettings()


def test_a_flag_wins_over_the_environment_over_the_file_over_the_default(tmp_path):
    path = write(
        tmp_path / "throttle.toml",
        'simulated_gpus = "of-file"\nlog_level = "error"\nengines_limit = 4\n'
        "[control]\ndwell_seconds = 2\nparking = false\n",
    )
    environ = {"THROTTLE_LOG_LEVEL": "warning", "THROTTLE_CONTROL__DWELL_SECONDS": "3.5"}
    config = load_config({"control.dwell_seconds": "4"}, environ, path)
    assert config.control.dwell_seconds == 4.0
    assert config.log_level == "warning"
    assert config.engines_limit == 4
    assert config.control.parking is False
    assert config.simulated_gpus == Path("of-file")
    assert config.lease.maximum_seconds == 60.0


def test_the_environment_may_name_the_file_and_a_flag_another(tmp_path):
    one = write(tmp_path / "one.toml", 'simulated_gpus = "one"\n')
    two = write(tmp_path / "two.toml", 'simulated_gpus = "two"\n')
    assert load_config({}, {"THROTTLE_CONFIG": str(one)}, None).simulated_gpus == Path("one")
    assert load_config({}, {"THROTTLE_CONFIG": str(one)}, two).simulated_gpus == Path("two")


@pytest.mark.parametrize(
    "name",
    [
        "HOME",
        "NOT_THROTTLE_SOCKET",
        # Kubernetes, beside services named throttle and throttle-demo
        "THROTTLE_SERVICE_HOST",
        "THROTTLE_SERVICE_PORT_GRPC",
        "THROTTLE_PORT",
        "THROTTLE_PORT_7077_TCP_ADDR",
        "THROTTLE_DEMO_SERVICE_PORT",
    ],
)
def test_variables_of_others_are_none_of_our_business(name):
    assert load_config(NEEDED, {name: "x"}, None)


def test_a_variable_of_ours_that_is_no_setting_is_refused():
    with pytest.raises(ConfigurationError, match="THROTTLE_SOCKETS is not a setting"):
        load_config(NEEDED, {"THROTTLE_SOCKETS": "x"}, None)


def test_every_error_is_reported_at_once(tmp_path):
    path = write(
        tmp_path / "throttle.toml",
        'engines_limit = "many"\nsockets = "x"\ngpus = ["GPU-a", "GPU-a"]\n'
        "[lease]\nminimum_seconds = 9.0\nmaximum_seconds = 1.0\n[control]\ndwell = 1\n",
    )
    environ = {"THROTTLE_TCP_ADDRESS": "0.0.0.0:7077", "THROTTLE_LOG_LEVEL": "loud"}
    with pytest.raises(ConfigurationError) as raised:
        load_config({"backend": "other", "drain_seconds": "nan"}, environ, path)
    expected = [
        f"engines_limit in {path} is 'many'; allowed: a whole number",
        f"sockets in {path} is not a setting; did you mean socket?",
        f"control.dwell in {path} is not a setting; did you mean control.dwell_seconds?",
        "THROTTLE_LOG_LEVEL is 'loud'; allowed: debug, info, warning, error",
        "--backend is 'other'; allowed: simulated, nvml, observe",
        "--drain-seconds is 'nan'; allowed: a finite number",
    ]
    assert set(expected) <= set(raised.value.problems)
    rest = "\n".join(set(raised.value.problems) - set(expected))
    for part in ("gpus is ['GPU-a', 'GPU-a']", "lease.minimum_seconds is 9.0", "tcp_allow_remote"):
        assert part in rest
    assert "simulated_gpus is empty" in rest
    assert len(raised.value.problems) == len(expected) + 4


def test_a_refused_value_is_not_reported_twice():
    with pytest.raises(ConfigurationError) as raised:
        load_config({**NEEDED, "engines_limit": "x"}, {}, None)
    assert raised.value.problems == ["--engines-limit is 'x'; allowed: a whole number"]


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("tcp_address", "7077", "HOST:PORT"),
        ("tcp_address", "localhost:99999", "HOST:PORT"),
        ("tcp_address", "192.0.2.1:7077", "a loopback address"),
        ("tcp_address", "node.example:7077", "a loopback address"),
        ("metrics_address", "localhost", "HOST:PORT"),
        ("drain_seconds", "0", "above 0, up to 60"),
        ("engines_limit", "0", "1 or more"),
        ("engines_limit", "1.5", "a whole number"),
        ("simulated_gpus", "", "the state file of the simulated GPUs"),
        ("socket", "", "at least one of them"),
        ("socket", "/" + "x" * 107, "a path of up to 107 bytes"),
        ("lease.minimum_seconds", "0.01", "0.1 to 60.0"),
        ("lease.maximum_seconds", "61", "0.1 to 60.0"),
        ("control.parking", "maybe", "true or false"),
        ("control.dwell_seconds", "inf", "a finite number"),
        ("log_format", "xml", "auto, console, json"),
    ],
)
def test_a_bad_value_is_refused_with_what_is_allowed(key, value, allowed):
    with pytest.raises(ConfigurationError, match=allowed):
        load_config({**NEEDED, key: value}, {}, None)


def test_real_gpus_that_may_be_written_must_be_named():
    with pytest.raises(ConfigurationError, match="gpus is empty; allowed: the UUIDs"):
        load_config({"backend": "nvml"}, {}, None)
    assert load_config({"backend": "nvml", "gpus": "GPU-a"}, {}, None).gpus == ("GPU-a",)
    assert load_config({"backend": "observe"}, {}, None).gpus == ()


def test_good_values_of_every_kind():
    config = load_config(
        {
            **NEEDED, "tcp_address": "[::1]:0", "gpus": "GPU-a, GPU-b", "socket": "",
            "tcp_allow_remote": "no", "recordings": "out",
        },
        {}, None,
    )  # fmt: skip
    assert config.gpus == ("GPU-a", "GPU-b")
    assert config.socket is None
    assert config.recordings == Path("out")
    assert load_config({**NEEDED, "tcp_address": "0.0.0.0:1", "tcp_allow_remote": "true"}, {}, None)


@pytest.mark.parametrize(
    "text",
    ['tcp_allow_remote = "perhaps"', "gpus = [1, 2]", "socket = 3", "engines_limit = true"],
)
def test_types_in_the_file_are_checked(tmp_path, text):
    with pytest.raises(ConfigurationError, match=r"throttle\.toml is .*; allowed: "):
        load_config(NEEDED, {}, write(tmp_path / "throttle.toml", text))


def test_a_file_that_cannot_be_read_is_named_along_with_the_other_errors(tmp_path):
    with pytest.raises(ConfigurationError) as raised:
        load_config({"engines_limit": "0"}, {}, tmp_path / "none.toml")
    assert any("none.toml cannot be read" in text for text in raised.value.problems)
    assert any("engines_limit is 0" in text for text in raised.value.problems)
    with pytest.raises(ConfigurationError, match="is not TOML"):
        load_config({}, {}, write(tmp_path / "bad.toml", "= 3"))


def test_every_setting_has_help_flag_and_variable():
    settings = {setting.key: setting for setting in settings_of(DaemonConfig)}
    assert all(setting.help for setting in settings.values())
    dwell = settings["control.dwell_seconds"]
    assert dwell.flag == "--control-dwell-seconds"
    assert dwell.variable("THROTTLE_") == "THROTTLE_CONTROL__DWELL_SECONDS"
    assert len({setting.flag for setting in settings.values()}) == len(settings)


def test_every_field_of_the_control_settings_is_a_setting():
    keys = {setting.key for setting in settings_of(DaemonConfig)}
    assert {f"control.{field.name}" for field in fields(ControlSettings)} <= keys


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("localhost:7077", ("localhost", 7077)),
        ("[::1]:0", ("::1", 0)),
        ("10.0.0.1:1", ("10.0.0.1", 1)),
    ],
)
def test_addresses_are_split(address, parts):
    assert split_address(address) == parts


def test_settings_of_the_controller_are_checked_with_the_rest(tmp_path):
    flags = {
        "simulated_gpus": str(tmp_path / "gpus"),
        "control.tpot_guard_ratio": "1.5",
        "control.dwell_seconds": "-1",
    }
    with pytest.raises(ConfigurationError) as caught:
        load_config(flags, {}, None)
    assert len(caught.value.problems) == 2
    assert any("control.tpot_guard_ratio is 1.5" in each for each in caught.value.problems)
