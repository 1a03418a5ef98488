"""``python -m sglang_eplb_affinity.patching apply|unapply|verify|refresh|status|trial``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.patching import actions, package
from sglang_eplb_affinity.patching.refresh import refresh
from sglang_eplb_affinity.patching.trial import trial
from sglang_eplb_affinity.patching.upstream import Installation, series_folder

CHECKOUT = Path(__file__).resolve().parents[2]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sglang_eplb_affinity.patching", description=__doc__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--patches", type=Path, default=CHECKOUT / "patches", help="folder with a series for each SGLang"
    )
    verbs = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    of_apply = verbs.add_parser("apply", parents=[common], help="patch the SGLang of this Python")
    of_apply.add_argument("--package", type=Path, metavar="CHECKOUT", help="install this package beside it")
    of_apply.add_argument("--editable", action="store_true", help="with --package: as an editable install")
    of_unapply = verbs.add_parser("unapply", parents=[common], help="give SGLang its own files back")
    of_unapply.add_argument("--package", action="store_true", help="remove this package too")
    verbs.add_parser("verify", parents=[common], help="prove that the series applies exactly and comes off")
    of_refresh = verbs.add_parser("refresh", parents=[common], help="write the series again")
    of_refresh.add_argument("--topic", help="the patch that takes edits made to the installed files")
    of_refresh.add_argument("--wheel", type=Path, help="SGLang's wheel, when a further file was edited")
    verbs.add_parser("status", parents=[common], help="what is applied")
    of_trial = verbs.add_parser("trial", parents=[common], help="which hunks would apply to another SGLang")
    of_trial.add_argument("wheel", help="a wheel of SGLang, or a version that pip downloads")
    of_trial.add_argument("--series", help="version of the series to try (default: the nearest)")
    return parser


def _act(options: argparse.Namespace) -> str:
    if options.action == "trial":
        return trial(options.patches, options.wheel, options.series)
    installation = Installation.find()
    project = actions.Project(series_folder(options.patches, installation.version), installation)
    if options.action == "apply" and options.package:
        package.require_installer()
        return actions.apply(project, lambda: package.install(options.package, editable=options.editable))
    if options.action == "unapply" and options.package:
        return "\n".join([actions.unapply(project), package.uninstall()])
    if options.action == "refresh":
        return refresh(project, options.topic, options.wheel)
    return str(getattr(actions, options.action)(project))


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    try:
        print(_act(options))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads has read enough
        sys.stderr.close()
    except OSError as error:  # a full disk, or one that may not be written
        print(f"error: {error.filename}: {error.strerror}; `status` says what is in force", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; `status` says what is in force, and the next apply or unapply goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
