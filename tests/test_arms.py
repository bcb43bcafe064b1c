"""The table of arms is the only one: config, help, plots and experiments follow it."""

from __future__ import annotations

import re

import pytest

from pst_dist.arms import ARMS, BASELINE, COST_BASELINE
from pst_dist.config.loading import load_config
from pst_dist.config.schema import Config
from pst_dist.errors import ConfigError
from pst_dist.experiment.spec import Experiment
from pst_dist.publish.plots import arm_colour


def test_every_arm_has_a_description_and_a_colour_of_its_own():
    assert len({arm.colour for arm in ARMS.values()}) == len({arm.description for arm in ARMS.values()}) == len(ARMS)
    for arm in ARMS.values():
        assert re.fullmatch("#[0-9a-f]{6}", arm.colour) and arm.description.startswith("trained ")
        assert arm_colour(arm.name) == arm.colour


def test_the_config_takes_the_arms_of_the_table_and_explains_each():
    schema = Config.model_json_schema()["properties"]
    assert schema["arm"]["enum"] == schema["arms"]["items"]["enum"] == list(ARMS)
    for arm in ARMS.values():
        assert f"{arm.name}: {arm.description.removeprefix('trained ')}." in schema["arm"]["description"]
        assert load_config(None, [f"arm={arm.name}"]).arm == arm.name
    with pytest.raises(ConfigError, match=r"arm.*answer_only.*adaptive"):
        load_config(None, ["arm=psst"])


def test_what_the_arms_need_follows_from_what_they_are_asked_for():
    assert {name for name, arm in ARMS.items() if not arm.needs_rationale} == {"answer_only"}
    assert {name for name, arm in ARMS.items() if arm.aligned} == {"pst", "adaptive"}
    assert {name for name, arm in ARMS.items() if not arm.answers_first} == {"pre_thinking"}
    assert {name for name, arm in ARMS.items() if arm.chooses_order} == {"adaptive"}
    assert not ARMS[BASELINE].needs_rationale and not ARMS[COST_BASELINE].answers_first


def test_an_experiment_without_variants_runs_the_five_arms_of_the_method():
    experiment = Experiment(name="x", tasks={"t": {}})
    assert list(experiment.variants) == ["answer_only", "pre_thinking", "prefix", "post_thinking", "pst"]
