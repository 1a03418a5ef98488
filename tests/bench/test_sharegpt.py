import json
from pathlib import Path

import pytest

from bench.harness import sharegpt
from bench.harness.engine import CACHE
from sglang_eplb_affinity.domain.errors import InputError

CONVERSATIONS = [
    {"id": "a", "conversations": [{"from": "human", "value": "one, [two]"}, {"from": "gpt", "value": "} three"}]},
    {"id": "b", "conversations": [{"from": "gpt", "value": "I begin"}, {"from": "human", "value": "no"}]},
    {"id": "c", "conversations": [{"from": "user", "value": "four"}, {"from": "gpt", "value": ""}]},
    {"id": "d", "conversations": [{"from": "human", "value": "alone"}]},
]
TEXT = json.dumps(CONVERSATIONS, indent=2)


def test_complete_list() -> None:
    assert sharegpt.recover(TEXT) == (CONVERSATIONS, True)


def test_every_cut_gives_the_conversations_before_it() -> None:
    ends = [TEXT.index(f'"id": "{c["id"]}"') for c in CONVERSATIONS]
    for cut in range(len(TEXT)):
        found, complete = sharegpt.recover(TEXT[:cut])
        assert not complete and found == CONVERSATIONS[: len(found)]
        begun = sum(end <= cut for end in ends)
        assert begun - 1 <= len(found) <= begun or begun == 0


def test_first_turns_begin_with_a_human_and_have_an_answer() -> None:
    assert sharegpt.first_turns(CONVERSATIONS) == [
        sharegpt.Turn("one, [two]", "} three"),
        sharegpt.Turn("four", ""),
    ]


def test_prompts_alone_and_chat_messages_are_read_too(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "short"}, {"role": "user", "content": "five"}]
    entries = [{"prompt": "six"}, {"messages": chat}, {"prompt": ["seven"]}, {"messages": chat[:1]}, {"messages": "x"}]
    assert sharegpt.first_turns(entries) == [sharegpt.Turn("six", ""), sharegpt.Turn("five", "")]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, entries[2:])))
    with pytest.raises(InputError, match=r'mine\.jsonl: none of 3 entries has a prompt; one is \{"prompt": "\.\.\."\}'):
        sharegpt.read_turns(file)


def test_json_lines_are_read_too(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text("\n".join(map(json.dumps, CONVERSATIONS)) + "\n\n")
    assert sharegpt.load(file) == CONVERSATIONS


@pytest.mark.parametrize("content", ["", "no json", '{"id": 1}\n{broken', '{"id": 1}\n7'])
def test_useless_files_are_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "sharegpt.json"
    file.write_text(content)
    with pytest.raises(InputError, match=r"sharegpt\.json"):
        sharegpt.load(file)


def test_a_named_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--sharegpt"):
        sharegpt.locate(str(tmp_path / "none.json"), tmp_path)


def test_no_file_and_no_package_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharegpt, "PACKAGE_VERSION", "0.0.0.no.such.version")
    with pytest.raises(InputError, match=r"--sharegpt FILE") as caught:
        sharegpt.locate(None, tmp_path)
    assert "\n" not in str(caught.value)


def test_the_package_holds_17671_complete_conversations() -> None:
    file = CACHE / "sharegpt" / sharegpt.PACKAGE_FILE
    if not file.is_file():
        pytest.skip("the ShareGPT package is not in the cache (a benchmark run installs it)")
    found, complete = sharegpt.recover(file.read_text(encoding="utf-8"))
    assert (len(found), complete) == (17_671, False)
