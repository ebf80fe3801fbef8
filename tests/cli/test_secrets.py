"""No output contains a secret: one table of names, in a command, a header, JSON and a log."""

from __future__ import annotations

import time

import pytest

from dsv4_plugin.cli.shared import secrets
from dsv4_plugin.cli.shared.secrets import HIDDEN, Secrets

NAMES = [
    "API_KEY", "apiKey", "api-key", "OPENAI_API_KEY", "HF_TOKEN", "hf-token", "X-Api-Key",
    "Authorization", "Proxy-Authorization", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY",
    "PGPASSWORD", "MYSQL_PWD", "api-keys", "Cookie", "PROXY_AUTH", "AccountKey", "HFTOKEN",
    "access_token", "sig", "db_password_1", "API_TOKENS", "kv.connector.auth.token", "passphrase",
]  # fmt: skip
PLAIN = [
    "PWD", "OLDDIR", "max-num-batched-tokens", "max-key-len", "tokenizer", "eos_token_id",
    "TOKENIZERS_PARALLELISM", "total_input_tokens", "SSH_AUTH_SOCK", "model", "author", "",
]  # fmt: skip


def test_the_table_of_names() -> None:
    assert [name for name in NAMES if not secrets.is_secret(name)] == []
    assert [name for name in PLAIN if secrets.is_secret(name)] == []


COMMANDS = [
    ["--api-key", "sesame"],
    ["--api-key=sesame"],
    ["--api-key", "sesame", "sesame2", "--port", "3"],
    ["-H", "Authorization: Bearer sesame"],
    ["-HAuthorization: Bearer sesame"],
    ["--header=X-Api-Key: sesame x"],
    ["--header", "Authorization=Bearer sesame"],
    ["--header", "Cookie: a=sesame; b=sesame"],
    [
        "--extra-body",
        '{"api_key": "sesame", "a": {"auth": {"user": "sesame", "n": ["sesame"]}}}',
    ],
    ['--extra-body={"token": "sesame"}'],
    ["--url", "http://user:sesame@h:1/x?token=sesame&a=1#access_token=sesame"],
    ["https://sesamesesame@h/x.git"],
    ["--serve-args= --api-key sesame --port 5"],
    ["--serve-args", '--hf-overrides \'{"token": "sesame"}\''],
    ["--serve-args", "--api-key 'sesame"],
    ["sh", "-c", "export API_KEY=sesame; vllm serve --api-key sesame"],
    ["--env", "OPENAI_API_KEY=sesame, with=more"],
    ["--server", "on:HF_TOKEN=sesame,DSV4_PLUGIN=1"],
    ["curl", "-u", "me:sesame", "http://h"],
    ["root:sesame@localhost:5432"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_command_has_no_secret(command: list[str]) -> None:
    told = secrets.command(command)
    assert "sesame" not in " ".join(told) and HIDDEN in " ".join(told)
    assert len(told) == len(command)


def test_what_is_no_secret_stays() -> None:
    command = ["vllm", "serve", "org/model", "--max-key-len", "3", "--max-num-seqs=4", "-tp", "2",
               "--x={\"a\": \"$(touch y)\"}", "http://127.0.0.1/health?n=1", "a b"]  # fmt: skip
    assert secrets.command(command) == command
    line = "dsv4 in vLLM 0.33: key gather: triton, top-k bf16; ms a token: 2.5; 3 tokens: 5"
    assert Secrets().text(line) == line


TEXTS = [
    "api_key='sesame', x=1",
    "non-default args: {'api_key': ['sesame', 'sesame2'], 'b': 3}",
    "non-default args: {'api_key': ['sesame",
    'api_key="sesame',
    "running vllm serve --api-key sesame --port 3",
    "['--api-key', 'sesame', '--x']",
    '{\\"api_key\\": \\"sesame\\"}',
    "Authorization: Bearer sesame",
    "header: Authorization: Bearer sesame",
    "headers={'Authorization': 'Bearer sesame'}",
    "password=sesame;",
    "got Bearer sesame12",
    "cannot reach postgres://me:sesame@h/db",
    "GET /v1?api-key=sesame&x=1 HTTP/1.1",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_has_no_secret(text: str) -> None:
    told = Secrets().text(text)
    assert "sesame" not in told and HIDDEN in told


def test_a_secret_is_known_by_its_value() -> None:
    """A value that appeared under such a name is recognised wherever it appears."""
    known = Secrets(
        [
            {
                "HF_TOKEN": "open sesame",
                "PROXY": "http://me:pa55word@h",
                "PWD": "/w",
                "X_KEY": "1",
            }
        ],
        [["serve", "--api-key", "se'same", "--header", "Authorization: Bearer crumbs"]],
    )
    for text in ("open sesame", "the pa55word", "se'same", "open%20sesame", "crumbs fell"):
        assert HIDDEN in known.text(text)
    assert known.text("/w/1 of 1") == "/w/1 of 1"
    document = {"env": {"A_TOKEN": "abc", "B": "open sesame"}, "key": 5, "said": ["se'same!"]}
    assert known.data(document) == {
        "env": {"A_TOKEN": HIDDEN, "B": HIDDEN}, "key": 5, "said": [f"{HIDDEN}!"],
    }  # fmt: skip


def test_a_long_line_takes_no_time() -> None:
    began = time.monotonic()
    for piece in ("a", "a-", "key=", 'key="', "a://", "--a ", "key=[", "a:", "hf_", "'", "\\", "@"):
        Secrets().text(piece * 20_000)
    assert time.monotonic() - began < 20
