"""The command line. Bad input exits with code 2 and one line; nothing is half-written."""

from __future__ import annotations

import sys

import click

from sglang_eplb_affinity import __version__
from sglang_eplb_affinity.cli.convert import convert_command
from sglang_eplb_affinity.cli.demo import demo_command
from sglang_eplb_affinity.cli.evaluate import evaluate_command
from sglang_eplb_affinity.cli.inspect import inspect_command
from sglang_eplb_affinity.cli.monitor import monitor_command
from sglang_eplb_affinity.cli.plan import plan_command
from sglang_eplb_affinity.cli.recommend import recommend_command
from sglang_eplb_affinity.cli.replay import replay_command
from sglang_eplb_affinity.cli.simulate import simulate_command
from sglang_eplb_affinity.domain.errors import InputError

FIRST_STEPS = """\
sglang_eplb_affinity: expert placement for SGLang's expert parallelism. Needs no GPU and no SGLang.

  demo                    try it: plan, compare and draw on a recording that comes along (half a minute)
  plan, evaluate          a map for your recorded traffic, and what it makes of later traffic
  recommend               what to enable on your cluster, or "leave it", and why (simulated)
  simulate, replay        step times of placements on a cluster; a day of changing traffic
  inspect, convert        what a dump, trace or map holds; maps of other engines
  monitor                 running servers, live: balance, fan-outs, rounds, latencies

First: python -m sglang_eplb_affinity demo     (all commands: --help)"""


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="sglang_eplb_affinity")
@click.pass_context
def cli(context: click.Context) -> None:
    """Expert placement for SGLang's expert parallelism, planned and judged on recorded routing. Needs no GPU."""
    if context.invoked_subcommand is None:
        click.echo(FIRST_STEPS)


cli.add_command(demo_command)
cli.add_command(plan_command)
cli.add_command(evaluate_command)
cli.add_command(convert_command)
cli.add_command(inspect_command)
cli.add_command(simulate_command)
cli.add_command(replay_command)
cli.add_command(recommend_command)
cli.add_command(monitor_command)


def main() -> None:
    """Run the CLI; InputError and wrong usage print one line on stderr and exit with code 2."""
    try:
        cli(prog_name="sglang_eplb_affinity", standalone_mode=False)
    except (InputError, click.ClickException) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"error: {' '.join(message.split())}", err=True)
        sys.exit(2)
    except click.Abort:
        click.echo("error: interrupted", err=True)
        sys.exit(130)
