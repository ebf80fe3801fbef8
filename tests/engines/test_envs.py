"""The settings: every value, every wrong value, and who wins."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

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


def test_the_table_has_every_variable_and_value() -> None:
    rows = envs.table().splitlines()[2:]
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
