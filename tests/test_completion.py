"""`--print_completion`: bash completes verbs, options and values."""

import subprocess

import pytest

from magnet_train.__main__ import main
from magnet_train.cli import completion


@pytest.mark.slow
def test_bash_completes_verbs_options_and_values(tmp_path, capsys):
    pytest.importorskip("shtab")
    assert main(["--print_completion", "bash"]) == 0
    script = tmp_path / "completion.bash"
    script.write_text(capsys.readouterr().out)

    def completed(line: str) -> set[str]:
        """Completions that bash offers for an unfinished command."""
        words = line.split(" ")
        quoted = " ".join(f"'{word}'" for word in words)
        shell = (
            f"source {script}; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}\n"
            'function=$(complete -p magnet-train | sed "s/.*-F //;s/ .*//")\n'
            '$function; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        found = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
        return set(found.stdout.split())

    assert completed("magnet-train ev") == {"evaluate"}
    assert completed("magnet-train edit --decoding.max") == {"--decoding.max_cfg_coef"}
    assert {"wandb", "tensorboard", "csv"} <= completed("magnet-train fit --tracker ")
    assert completed("magnet-train generate --loop ") == {"true", "false"}
    assert "--gpu_hour_price" in completed("magnet-train doctor --gpu")
    assert "-->" not in script.read_text()  # a link between options: zsh refuses it


def test_another_shell_or_no_shtab_is_refused(capsys, monkeypatch):
    assert main(["--print_completion", "fish"]) == 2
    assert "choose bash or zsh" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "shtab", None)
    with pytest.raises(completion.UserError, match=r"pip install -e '\.\[completion\]'"):
        completion.completion_script("bash", {}, {})
