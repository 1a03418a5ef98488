import json
import re
import textwrap
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from bench.engines.emulated_link.settings import LinkSettings
from bench.harness.arms import ARMS
from bench.harness.engine import ROOT, write_model_config
from bench.harness.links import Link, link_environment, with_link
from bench.harness.profile import PROFILE_DIR, Profile
from bench.harness.rehearsal import rehearsal
from bench.harness.server import PORT_STEP, server_command
from sglang_eplb_affinity.domain.errors import InputError

MINIMAL = '[server]\nmodel = "m"\nranks = 2\n[load]\noutput_tokens = 8\n[load.requests]\n4 = 40\n16 = 80\n'


@pytest.mark.parametrize("path", sorted(PROFILE_DIR.glob("*.toml")), ids=lambda path: path.stem)
def test_every_profile_is_valid(path: Path) -> None:
    profile = Profile.named(path.stem)
    flags = [*profile.server.flags, *profile.server.eplb_flags]
    assert profile.title and len({f for f in flags if f.startswith("--")}) == sum(f.startswith("--") for f in flags)
    for c in profile.load.concurrency:
        assert profile.load.requests_at(c) >= 2 * c, "too few requests to reach the concurrency"


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="no documentation in this checkout")
def test_the_profile_of_the_documentation_is_valid() -> None:
    page = (ROOT / "docs" / "benchmarking.md").read_text()
    (block,) = re.findall(r"^    \[server\]\n(?:    .*\n)+", page, re.MULTILINE)
    profile = Profile.parse(textwrap.dedent(block), name="mine", source="docs/benchmarking.md")
    assert profile.title == "mine" and profile.load.requests and profile.server.model


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
        ("[server]\nranks = 1\n[load]\noutput_tokens = 8\n[load.requests]\n1 = 8\n", r"\[server\]: model missing"),
        (MINIMAL.replace("output_tokens = 8\n", ""), r"\[load\]: output_tokens missing"),
        (MINIMAL.replace("ranks", "rank"), "rank"),
        (MINIMAL.replace("4 = 40", "four = 40"), "requests"),
        (MINIMAL.replace("4 = 40", "4 = 0"), "requests"),
        (MINIMAL.replace("output_tokens = 8", "output_tokens = 1"), "output_tokens"),
        ('arms = ["quick"]\n' + MINIMAL, "quick"),
        ("blocks = 0\n" + MINIMAL, "blocks"),
        (MINIMAL.replace("output_tokens = 8", 'output_tokens = 8\nprompts = "poems"'), "poems"),
        (MINIMAL.replace("ranks = 2", 'ranks = 2\nengine = "tpu"'), "tpu"),
        (
            MINIMAL.replace("ranks = 2", "ranks = 2\nemulated_nodes = 4"),
            "ranks = 2 must be a multiple of emulated_nodes",
        ),
    ],
)
def test_a_wrong_profile_is_refused_with_its_name(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        parse(text)
    assert "p.toml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_rehearsal_keeps_arms_turns_and_routing_and_leaves_the_gpu() -> None:
    profile = Profile.named("h200-x2")
    small = rehearsal(profile)
    assert (small.arms, small.arms_side_by_side, small.load.stagger) == (profile.arms, True, True)
    assert (small.server.engine, small.server.ranks, small.link) == ("cpu", 2, "")
    assert "replay:bench/data/tiny_moe_test.npz,layers=cycle" in small.server.flags
    assert "deepep" not in small.server.flags and sum(small.load.requests.values()) < 100


def test_an_emulated_link_makes_nodes_and_is_in_the_title() -> None:
    four = Profile.named("h200-x4")
    assert with_link(four, "emulated25").server.nodes == 2  # each half of the GPUs
    assert with_link(Profile.named("h200-x2"), "emulated25").server.nodes == 2
    profile = with_link(replace(four, server=replace(four.server, emulated_nodes=0)), "emulated25")
    assert (profile.server.nodes, Link.of(profile)) == (4, Link("emulated25", 25))
    assert "emulated link, 25 GB/s" in profile.title and Link.of(profile).kind == "emulated"
    halves = replace(four.server, nodes=2, emulated_nodes=0)
    assert with_link(replace(four, server=halves), "emulated25").server.nodes == 2
    plain = with_link(four, "nvlink")
    assert plain == four and Link.of(plain) == Link("nvlink")
    assert Link.of(Profile.named("cpu")).name == "cpu"
    environment = link_environment(profile.link, profile.server, {"PYTHONPATH": "site"})
    assert LinkSettings.of(environment) == LinkSettings(25.0, 4)
    assert environment["PYTHONPATH"].endswith("site") and link_environment("", profile.server, {}) == {}


@pytest.mark.parametrize(
    ("name", "link", "said"),
    [
        ("h200-x2", "infiniband", "'infiniband' is unknown; use nvlink, or emulatedN"),
        ("h200-x2", "emulated0", "emulatedN"),
        ("cpu", "emulated50", "does not serve with --moe-a2a-backend deepep"),
    ],
)
def test_a_link_that_cannot_be_is_refused(name: str, link: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        with_link(Profile.named(name), link)


def test_a_model_without_weights_is_written_from_its_sizes() -> None:
    folder = write_model_config("random", "layers=2,hidden=64,heads=2,kv_heads=1")
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["num_experts"]) == (2, 64, 64)
    for wrong in ("depth=2", "layers", "layers=two"):
        with pytest.raises(InputError, match=r"random:.* is not KEY=N,\.\.\. with KEY one of layers, hidden"):
            write_model_config("random", wrong)
    deepseek = json.loads((write_model_config("deepseek", "moe_layers=3") / "config.json").read_text())
    assert (deepseek["architectures"], deepseek["num_hidden_layers"]) == (["DeepseekV3ForCausalLM"], 4)
    with pytest.raises(InputError, match=r"deepseek:layers=3 is not .* with KEY one of moe_layers"):
        write_model_config("deepseek", "layers=3")


BASE = """title = "base"
arms = ["vanilla"]
[server]
model = "m"
ranks = 2
flags = ["--a", "1", "--b", "--c", "3", "4"]
[load]
output_tokens = 8
requests = { 4 = 40 }
[loads.decode]
kind = "decode"
output_tokens = 64
requests = { 8 = 8, 16 = 16 }
[loads.prefill]
kind = "prefill"
output_tokens = 1
requests = { 8 = 64 }
"""


def test_a_profile_says_only_what_differs_from_its_base(tmp_path: Path) -> None:
    (tmp_path / "one.toml").write_text(BASE)
    (tmp_path / "two.toml").write_text(
        'base = "one"\ntitle = "two"\n[server]\nmore_flags = ["--c", "5", "--d"]\n[load]\nrequests = { 6 = 60 }\n'
        '[loads.decode]\nkind = "decode"\noutput_tokens = 32\nrequests = { 8 = 8 }\n'
    )
    one, two = Profile.named("one", tmp_path), Profile.named("two", tmp_path)
    assert (two.name, two.title, two.arms, two.server.model) == ("two", "two", ("vanilla",), "m")
    assert two.server.flags == ("--a", "1", "--b", "--c", "5", "--d") and len(one.server.flags) == 6
    assert (two.load.requests, two.load.output_tokens) == ({6: 60}, 8)
    assert two.loads["decode"].requests == {8: 8} and two.loads["prefill"] == one.loads["prefill"]
    (tmp_path / "two.toml").write_text('base = "none"\n')
    with pytest.raises(InputError, match=r"base is 'none', but there is no none\.toml"):
        Profile.named("two", tmp_path)


def test_a_rate_adds_the_main_loads_requests_as_they_arrive() -> None:
    profile = Profile.parse(BASE, name="p", source="p.toml")
    poisson = profile.with_poisson(2.5).loads["poisson"]
    assert (poisson.request_rate, poisson.requests, poisson.kind) == (2.5, {4: 40}, "requests")
    assert profile.with_poisson(1.0).loads["poisson"].requests == {4: 16}  # for 16 s
    with pytest.raises(InputError, match="--rate: 0 requests/s is not above 0"):
        profile.with_poisson(0)


@pytest.mark.parametrize(("where", "streams"), [('kind = "decode"', 9), ('kind = "prefill"', 4)])
def test_only_requests_that_decode_together_stream_token_by_token(where: str, streams: int) -> None:
    with pytest.raises(InputError, match=f"token_streams is {streams}, but must be a number of the requests of a dec"):
        Profile.parse(BASE.replace(where, f"{where}\ntoken_streams = {streams}"), name="p", source="p.toml")


@pytest.mark.parametrize("spread", [-1, 5, 8])
def test_lengths_that_cannot_differ_so_much_are_refused(spread: int) -> None:
    with pytest.raises(InputError, match=f"output_spread is {spread}, but must leave 4 of the 8 output tokens"):
        parse(MINIMAL.replace("output_tokens = 8", f"output_tokens = 8\noutput_spread = {spread}"))
    assert parse(MINIMAL.replace("output_tokens = 8", "output_tokens = 8\noutput_spread = 4")).load.lengths.endswith(
        "tokens in, 4 to 12 out"
    )


def test_a_profile_without_a_model_wants_one() -> None:
    profile = parse(MINIMAL.replace('model = "m"', 'model = ""'))
    with pytest.raises(InputError, match="--model"):
        profile.with_model(None)
    assert profile.with_model("some/model").server.model == "some/model"


def test_arms_differ_only_in_their_flags() -> None:
    config = parse(MINIMAL.replace("ranks = 2", 'ranks = 2\nflags = ["--tp", "2"]\neplb_flags = ["--x", "4"]')).server
    none, vanilla, affinity = (server_command(config, ARMS[arm], "m") for arm in ("none", "vanilla", "affinity"))
    common = none[: len(none) - len(ARMS["none"].flags)]
    assert vanilla == [*common, "--x", "4", *ARMS["vanilla"].flags]
    assert "--x" not in none
    assert [(v, a) for v, a in zip(vanilla, affinity, strict=True) if v != a] == [("deepseek", "affinity")]


def test_an_arm_may_differ_in_a_flag_of_the_profile() -> None:
    rules = 'ranks = 2\neplb_flags = ["--ep-dispatch-algorithm", "static"]'
    command = server_command(parse(MINIMAL.replace("ranks = 2", rules)).server, ARMS["cover"], "m")
    given = [value for flag, value in pairwise(command) if flag == "--ep-dispatch-algorithm"]
    assert given == ["static", "cover"]  # argparse takes the last


def test_servers_side_by_side_have_ports_of_their_own() -> None:
    config = parse(MINIMAL).server
    first, second = (server_command(config, ARMS["none"], "m", place) for place in (0, 1))
    changed = [(a, b) for a, b in zip(first, second, strict=True) if a != b]
    assert changed == [(str(config.port), str(config.port + PORT_STEP))]


def test_emulated_nodes_are_told_to_arms_with_eplb() -> None:
    config = parse(MINIMAL.replace("ranks = 2", "ranks = 4\nnodes = 2")).server
    command = server_command(config, ARMS["vanilla"], "m")
    assert command[command.index("--eplb-affinity-nodes") + 1] == "2"
    assert "--eplb-affinity-nodes" not in server_command(config, ARMS["none"], "m")


@pytest.mark.parametrize(("engine", "recorded"), [("cuda", ["15"]), ("cpu", [])])
def test_on_gpus_vanilla_records_only_before_its_rebalances(engine: str, recorded: list[str]) -> None:
    rules = 'ranks = 2\neplb_flags = ["--eplb-rebalance-num-iterations", "150"]'
    config = replace(parse(MINIMAL.replace("ranks = 2", rules)).server, engine=engine)
    for name, expected in (("vanilla", recorded), ("vanilla-again", recorded), ("affinity", []), ("async", [])):
        command = server_command(config, ARMS[name], "m")
        assert [v for f, v in pairwise(command) if f == "--expert-affinity-record-last-passes"] == expected
    assert "--expert-affinity-record-last-passes" not in server_command(config, ARMS["vanilla-unrecorded"], "m")
