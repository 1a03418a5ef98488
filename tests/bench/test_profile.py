from pathlib import Path

import pytest

from bench.arms import ARMS
from bench.profile import PROFILE_DIR, Profile
from bench.server import server_command
from sglang_eplb_affinity.errors import InputError

MINIMAL = '[server]\nmodel = "m"\nranks = 2\n[load]\noutput_tokens = 8\n[load.requests]\n4 = 40\n16 = 80\n'


@pytest.mark.parametrize("path", sorted(PROFILE_DIR.glob("*.toml")), ids=lambda path: path.stem)
def test_every_profile_is_valid(path: Path) -> None:
    profile = Profile.named(path.stem)
    flags = [*profile.server.flags, *profile.server.eplb_flags]
    assert profile.title and len({f for f in flags if f.startswith("--")}) == sum(f.startswith("--") for f in flags)
    for c in profile.load.concurrency:
        assert profile.load.requests_at(c) >= 2 * c, "too few requests to reach the concurrency"


def parse(text: str) -> Profile:
    return Profile.parse('title = "t"\n' + text, name="p", source="p.toml")


def test_requests_between_the_profiles_points() -> None:
    load = parse(MINIMAL).load
    assert [load.requests_at(c) for c in (4, 10, 16)] == [40, 60, 80]
    assert load.requests_at(64) == 256  # outside: still enough to reach the concurrency


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[server", "not TOML"),
        ("[server]\nranks = 1\n[load]\noutput_tokens = 8\n[load.requests]\n1 = 8\n", "model"),
        (MINIMAL.replace("ranks", "rank"), "rank"),
        (MINIMAL.replace("4 = 40", "four = 40"), "requests"),
        (MINIMAL.replace("4 = 40", "4 = 0"), "requests"),
        (MINIMAL.replace("output_tokens = 8", "output_tokens = 1"), "output_tokens"),
        ('arms = ["quick"]\n' + MINIMAL, "quick"),
        ("blocks = 0\n" + MINIMAL, "blocks"),
        (MINIMAL.replace("ranks = 2", 'ranks = 2\nengine = "tpu"'), "tpu"),
    ],
)
def test_a_wrong_profile_is_refused_with_its_name(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        parse(text)
    assert "p.toml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_profile_without_a_model_wants_one() -> None:
    profile = parse(MINIMAL.replace('model = "m"', 'model = ""'))
    with pytest.raises(InputError, match="--model"):
        profile.with_model(None)
    assert profile.with_model("some/model").server.model == "some/model"


def test_arms_differ_only_in_their_flags() -> None:
    config = parse(MINIMAL.replace("ranks = 2", 'ranks = 2\nflags = ["--tp", "2"]\neplb_flags = ["--x", "4"]')).server
    none, vanilla, affinity = (server_command(config, ARMS[arm], "m") for arm in ("none", "vanilla", "affinity"))
    common = none[: len(none) - len(ARMS["none"].flags)]
    assert vanilla == [*common, *ARMS["vanilla"].flags, "--x", "4"]
    assert "--x" not in none
    assert [(v, a) for v, a in zip(vanilla, affinity, strict=True) if v != a] == [("deepseek", "affinity")]


def test_emulated_nodes_are_told_to_arms_with_eplb() -> None:
    config = parse(MINIMAL.replace("ranks = 2", "ranks = 4\nnodes = 2")).server
    assert server_command(config, ARMS["vanilla"], "m")[-2:] == ["--eplb-affinity-nodes", "2"]
    assert "--eplb-affinity-nodes" not in server_command(config, ARMS["none"], "m")
