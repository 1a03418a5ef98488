import struct

import pytest

from bench.gpu.trim_fatbin import ELF, MAGIC, PTX, main, trim


def entry(kind: int, arch: int, payload: bytes) -> bytes:
    header = struct.pack("<HHIQ", kind, 0x101, 64, len(payload)) + bytes(12) + struct.pack("<I", arch)
    return header.ljust(64, b"\0") + payload


def library(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return b"code " + MAGIC + struct.pack("<HHQ", 1, 16, len(body)) + body + b" more code"


def test_only_the_named_architecture_keeps_its_code():
    parts = [entry(ELF, 80, b"eighty"), entry(ELF, 90, b"ninety"), entry(PTX, 90, b"as text")]
    before = library(*parts)
    after = bytearray(before)
    assert trim(after, 90) == (len(b"ninety"), len(b"eighty") + len(b"as text"))
    assert len(after) == len(before) and b"ninety" in after and b"eighty" not in after and b"as text" not in after
    assert after == before.replace(b"eighty", bytes(6)).replace(b"as text", bytes(7))


def test_a_library_without_that_code_is_refused(tmp_path, capsys):
    source = tmp_path / "lib.so"
    source.write_bytes(library(entry(ELF, 80, b"eighty")))
    with pytest.raises(SystemExit) as stop:
        main([str(source), str(tmp_path / "out.so")])
    assert stop.value.code == 2 and "no device code for sm_90" in capsys.readouterr().err
    assert not (tmp_path / "out.so").exists()
