"""The settings: every value, every wrong value, and which source takes precedence."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.tables import settings
from dsv4_plugin import envs
from dsv4_plugin.errors import Dsv4Error, SettingError

FLAGS = {"": None, "0": False, "1": True}


@pytest.fixture(autouse=True)
def no_override() -> Iterator[None]:
    envs.override(None)
    yield
    envs.override(None)


def python_value(variable: envs.Variable, text: str) -> Any:
    return FLAGS[text] if "1" in variable.choices else text


def test_settings_and_variables_name_the_same_fields() -> None:
    fields = [field.name for field in dataclasses.fields(envs.Settings)]
    assert fields == [variable.field for variable in envs.VARIABLES]
    assert all(v.name == "DSV4_" + v.field.upper() for v in envs.VARIABLES)


@pytest.mark.parametrize("variable", envs.VARIABLES, ids=lambda v: v.name)
def test_default(variable: envs.Variable) -> None:
    assert variable.default == variable.choices[0]
    want = python_value(variable, variable.default)
    assert getattr(envs.settings(), variable.field) == want
    assert getattr(envs.Settings(), variable.field) == want


def test_installed_but_not_asked_for_is_inert() -> None:
    assert envs.settings().plugin is None and not envs.settings().enabled


CHOICES = [(v, choice) for v in envs.VARIABLES for choice in v.choices]


@pytest.mark.parametrize(
    ("variable", "choice"), CHOICES, ids=[f"{v.name}={choice}" for v, choice in CHOICES]
)
def test_every_choice(
    variable: envs.Variable, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in (choice, choice.upper(), f" {choice} "):
        monkeypatch.setenv(variable.name, text)
        want = dataclasses.replace(
            envs.Settings(), **{variable.field: python_value(variable, choice)}
        )
        assert envs.settings() == want


@pytest.mark.parametrize("variable", envs.VARIABLES, ids=lambda v: v.name)
@pytest.mark.parametrize("text", ["bf17", "2", "true", "bf16,fp32"])
def test_a_wrong_value_names_the_variable_the_value_and_the_choices(
    variable: envs.Variable, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable.name, text)
    with pytest.raises(SettingError) as caught:
        envs.settings()
    message = str(caught.value)
    assert message.startswith(f"{variable.name} is {text!r}")
    for choice in variable.choices:
        assert (repr(choice) if choice else "unset") in message
    assert isinstance(caught.value, (Dsv4Error, ValueError))


@pytest.mark.parametrize("variable", envs.VARIABLES, ids=lambda v: v.name)
@pytest.mark.parametrize("text", ["", "  "])
def test_empty_is_unset(
    variable: envs.Variable, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable.name, text)
    assert envs.settings() == envs.Settings()
    assert envs.origins()[variable.name] == (variable.default or "unset", "the default")


def test_every_wrong_variable_is_in_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in envs.VARIABLES:
        monkeypatch.setenv(variable.name, "yes")
    with pytest.raises(SettingError) as caught:
        envs.settings()
    assert all(f"{variable.name} is 'yes'" in str(caught.value) for variable in envs.VARIABLES)


@pytest.mark.parametrize(
    ("text", "asked"), [("1", True), (" 1 ", True), ("0", False), ("", False), ("yes", False)]
)
def test_a_wrong_variable_asks_for_nothing(
    text: str, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSV4_PLUGIN", text)
    monkeypatch.setenv("DSV4_TOPK", "bf17")
    assert envs.asked() is asked


@pytest.mark.parametrize("variable", envs.VARIABLES, ids=lambda v: v.name)
def test_one_setting_is_wrong_by_its_own_variable_only(
    variable: envs.Variable, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in envs.VARIABLES:
        monkeypatch.setenv(other.name, "" if other is variable else "yes")
    assert envs.value(variable.field) == python_value(variable, variable.default)
    monkeypatch.setenv(variable.name, "yes")
    with pytest.raises(SettingError, match=f"^{variable.name} is 'yes'"):
        envs.value(variable.field)


def test_a_change_of_the_environment_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    first = envs.settings()
    assert envs.settings() is first, "the same environment gives the same object"
    monkeypatch.setenv("DSV4_TOPK", "bf16")
    assert envs.settings().topk == "bf16"
    monkeypatch.setenv("DSV4_TOPK", "wrong")
    with pytest.raises(SettingError):
        envs.settings()
    monkeypatch.delenv("DSV4_TOPK")
    assert envs.settings() == first


def test_the_engines_configuration_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV4_TOPK", "bf16")
    monkeypatch.setenv("DSV4_BACKEND", "torch")
    envs.override({"topk": "fp32", "strict": True})
    now = envs.settings()
    assert (now.topk, now.strict, now.backend) == ("fp32", True, "torch")
    assert now.enabled, "naming anything switches the plugin on"
    envs.override({"topk": "off"})
    assert (envs.settings().topk, envs.settings().strict) == ("off", False)
    envs.override(None)
    assert envs.settings() == dataclasses.replace(envs.Settings(), topk="bf16", backend="torch")


def test_the_engines_configuration_can_leave_the_plugin_off() -> None:
    envs.override({"plugin": False, "topk": "bf16"})
    assert envs.settings().plugin is False


def test_nothing_wins_over_the_kill_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    envs.override({"plugin": True, "topk": "bf16"})
    assert envs.settings().enabled
    monkeypatch.setenv("DSV4_PLUGIN", "0")
    assert envs.settings().plugin is False


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"topkk": "bf16"}, "'topkk'"),
        ({"topk": "bf17"}, "'bf17'"),
        ({"topk": None}, "'None'"),
        ({"strict": 2}, "'2'"),
        ({"topk": True}, "'True'"),
        ({"log": False}, "'False'"),
        ({"backend": False}, "'False'"),
        ({"status_dir": False}, "'False'"),
    ],
)
def test_a_wrong_configuration_is_an_error_and_changes_nothing(
    config: dict[str, Any], said: str
) -> None:
    envs.override({"topk": "fp32"})
    with pytest.raises(SettingError, match=said) as caught:
        envs.override(config)
    assert "additional_config['dsv4']" in str(caught.value)
    assert envs.settings().topk == "fp32"


@pytest.mark.parametrize("variable", envs.VARIABLES, ids=lambda v: v.name)
def test_off_read_as_a_boolean_by_yaml(variable: envs.Variable) -> None:
    """YAML 1.1 reads ``off`` as False: it means the same as the text where that is a value."""
    for text in {"off", "0"} & set(variable.choices):
        envs.override({variable.field: False})
        assert getattr(envs.settings(), variable.field) == python_value(variable, text)


def test_an_empty_value_in_the_engines_configuration_names_nothing() -> None:
    envs.override({variable.field: " " for variable in envs.VARIABLES})
    assert envs.settings() == envs.Settings() and not envs.asked()


def test_what_is_wrong_counts_for_nothing_where_the_plugin_is_left_off() -> None:
    assert envs.override({"topkk": "bf16", "log": "debug"} | {"plugin": "0", "topk": "bf17"}) == [
        f"additional_config['dsv4'] has the unknown name 'topkk'; it can have "
        f"{', '.join(sorted(v.field for v in envs.VARIABLES))}",
        "additional_config['dsv4']['topk'] is 'bf17'; it can be 'auto', 'bf16', 'fp16', 'fp32', "
        "'off'",
    ]
    assert envs.settings() == dataclasses.replace(envs.Settings(), plugin=False, log="debug")


def test_the_table_has_every_variable_and_value() -> None:
    rows = settings.table().splitlines()[2:]
    assert len(rows) == len(envs.VARIABLES)
    for row, variable in zip(rows, envs.VARIABLES, strict=True):
        assert f"`{variable.name}`" in row
        assert all(f"`{choice}`" in row for choice in variable.choices if choice)


def test_settings_need_neither_torch_nor_an_engine() -> None:
    code = (
        "import sys, dsv4_plugin; dsv4_plugin.settings();"
        "assert not {'torch', 'triton', 'vllm'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
