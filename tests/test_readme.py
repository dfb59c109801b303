"""The README: its Python runs, its commands and its files exist."""

import re
import shutil

import pytest

from tests.shared import ROOT

README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_snippets():
    assert SNIPPETS


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet(number, tmp_path, monkeypatch, capsys):
    """Each on its own, in a folder that has nothing but the pictures."""
    shutil.copytree(ROOT / "docs/images", tmp_path / "docs/images")
    monkeypatch.chdir(tmp_path)
    exec(compile(SNIPPETS[number], f"README.md, snippet {number + 1}", "exec"), {"__name__": "__main__"})
    if "save_image" in SNIPPETS[number]:
        from vtc import load_image

        shape = load_image("docs/images/coffee.png").pixels.shape
        assert [load_image(path).pixels.shape for path in tmp_path.glob("*.png")] == [shape]
        assert "tokens" in capsys.readouterr().out


def test_first_two_commands_are_scripts_and_ci_runs_the_second():
    first = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)[0]
    commands = [line.split("#")[0].strip() for line in first.splitlines()]
    assert len(commands) == 2
    for command in commands:
        program, script = command.split()
        assert program == "python3"
        assert (ROOT / script).is_file()
    assert commands[1] in (ROOT / ".ci/run").read_text()


def test_links_and_named_files_exist():
    named = set(re.findall(r"`((?:docs|vtc|codecs|tokenizers|eval|scripts)/[\w./-]+|[A-Z-]+\.md|LICENSE)`", README))
    named |= set(re.findall(r"\]\(([^)#:]+)\)", README))
    assert len(named) > 5
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
