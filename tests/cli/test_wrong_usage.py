"""Wrong usage of the command line: refused in one line, before anything runs."""

from __future__ import annotations

import pytest

from pyggml.cli import fuzz, main


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("x=f32[8]; y=reluu(x); plan(y)", "no op 'reluu'; did you mean 'relu'?"),
        ("x=f32[8]; y=relu(z); plan(y)", "no name z"),
        ("x=f32[8]; y=relu(x); plan(z)", "no name z"),
        ("x=f32[8]; y=relu(x); plan(y, amd=1)", "no attribute 'amd'"),
        ("x=f32[8]; y=relu(x)", "no plan"),
        ("x=f32[8]; y=chain(x); plan(y)", "expected times=N"),
        ("x=f32[8]; z=f32[3]; y=add(x, z); plan(y)", "does not repeat"),
        ("garbage", "'garbage' is no case"),
        ("reluu(f32[8])", "no op 'reluu'; did you mean 'relu'?"),
        ("state(f32[8])", "no op 'state'"),
        ("relu(f32[8]?)", "is no source"),
        ("add(f32[8], f32[3])", "does not repeat"),
    ],
)
def test_a_wrong_case_is_an_error_before_any_backend_runs(
    text: str, why: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz, "Pool", None)
    assert main(["parity", "--case", text]) == 1
    out, err = capsys.readouterr()
    assert not out and why in err and err.startswith("pyggml: error: ") and err.count("\n") == 1
