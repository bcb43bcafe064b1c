"""Control characters stay out of scripts, URLs, headers and commands."""

import pytest
from small_run import small_config

from pst_dist.clusters.plain import plain
from pst_dist.clusters.ray.token import find_token
from pst_dist.clusters.ray.words import read_words
from pst_dist.errors import ConfigError


@pytest.mark.parametrize("hidden", ["\n", "\r", "\0", "\x1b", "\x85", "\u2028", "\u202e", "\ud800"])
def test_a_control_character_reaches_no_script_url_header_or_command(tmp_path, monkeypatch, hidden):
    assert plain("a plain value: é ü 50% #1", "it") == "a plain value: é ü 50% #1"
    with pytest.raises(ConfigError, match=r"it contains the control character U\+"):
        plain(f"a{hidden}b", "it")
    keys = {
        "data_dir": "s3://b/{}",
        "output_dir": "run{}",
        "student.model_name_or_path": "org/{}",
        "embed.encoder": "{}",
    }
    for key, value in keys.items():
        section, _, name = key.rpartition(".")
        tree = {name: value.format(hidden)}
        with pytest.raises(ValueError, match="contains the control character"):
            type(small_config(tmp_path, tmp_path)).model_validate({section: tree} if section else tree)
    for word in (f"address=head:8265{hidden}", f"env.A={hidden}", f"dir={tmp_path}{hidden}"):
        with pytest.raises(ConfigError, match="contains the control character"):
            read_words([word])
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_bytes(f"abc{hidden}def".encode("utf-8", "surrogatepass"))
    with pytest.raises(ConfigError, match="contains the control character"):
        find_token()


def test_an_environment_variable_of_a_job_has_a_plain_name():
    with pytest.raises(ConfigError, match="is not a valid environment variable"):
        read_words(["env.A;touch x=1"])
