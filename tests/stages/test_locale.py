"""Files are UTF-8 whatever the locale says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from support.runs import environment, overrides
from support.small_models import CHAT_TEMPLATE

from swirl_fast.data.store import Store


def test_a_run_in_the_c_locale(tmp_path: Path, tiny_model: Path) -> None:
    folder, template, data = tmp_path / "Läufe", tmp_path / "Vorlage ｜.jinja", tmp_path / "Fragen – 1.jsonl"
    template.write_text("{# ｜ #}" + CHAT_TEMPLATE, encoding="utf-8")
    rows = [{"question": f"Wie viel ist {n} ｜ 1 für Zoë?", "answer": f"#### {n}"} for n in range(4)]
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "Wörter.yaml").write_text("run: {name: größer}\ntasks: {kind: gsm8k, limit: 1}\n", encoding="utf-8")
    more = ["--config", str(tmp_path / "Wörter.yaml"), f"model.chat_template={template}", f"tasks.path={data}"]
    settings = [
        one for one in overrides(folder, tiny_model) if not one.startswith(("run.name", "tasks.options", "tasks.limit"))
    ]
    run = folder / "größer"
    for arguments in (["collect", *settings, *more], ["status", str(run)]):
        done = subprocess.run(
            [sys.executable, "-m", "swirl_fast", *arguments],
            env={**environment(), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
    assert "größer" in (run / "config.yaml").read_text(encoding="utf-8") and "größer" in done.stdout.decode("utf-8")
    with Store(run / "trajectories.db", writable=False) as store:
        assert "｜ 1 für Zoë?" in store.questions()[0].text
