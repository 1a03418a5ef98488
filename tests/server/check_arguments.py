"""Launch a server with each JSON list of arguments from standard input, until it would start; print how it ended."""

import contextlib
import io
import json
import sys


def main() -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang import launch_server
    from sglang.srt.entrypoints import http_server
    from sglang.srt.server_args import prepare_server_args

    from sglang_eplb_affinity.sglang_hooks.adapter import adapter

    http_server.launch_server = lambda arguments: None
    for line in sys.stdin:
        errors = io.StringIO()
        code: object = 0
        resolved: dict[str, object] = {}
        with contextlib.redirect_stderr(errors):
            try:
                record = prepare_server_args(json.loads(line))
                launch_server.run_server(record)
                names = ("enable_eplb", "eplb_algorithm", "expert_distribution_recorder_mode", "ep_dispatch_algorithm")
                names += ("eplb_affinity_primary_tokens",)
                resolved = {name: getattr(adapter().arguments_of(record), name) for name in names}
            except SystemExit as end:
                code = end.code
            except Exception as error:
                code = repr(error)
        last = [text for text in errors.getvalue().splitlines() if text.startswith("error:")]
        print("RESULT " + json.dumps({"code": code, "errors": last, "resolved": resolved}), flush=True)


if __name__ == "__main__":
    main()
