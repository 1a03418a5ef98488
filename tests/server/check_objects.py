"""What our hooks make of SGLang's own objects, without a server: prints one line of findings."""

import json


def main() -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from tests.server import check_draft_weights, check_gone_ranks, check_parts_of_pass

    print(
        "RESULT "
        + json.dumps(
            {
                "draft": check_draft_weights.findings(),
                "parts": check_parts_of_pass.findings(),
                "gone": check_gone_ranks.findings(),
            }
        )
    )


if __name__ == "__main__":
    main()
