"""SIGKILL at every link, rename, removal and fsync of the last write: after a new start all is as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path

from support import forks
from support.runs import environment

# Runs four steps in a child, killed at one of the calls of the last write; then again in another. Prints what is there each time.
CODE = """
import json, os, signal, sys, traceback
from pathlib import Path
import torch
from swirl_fast.ranks import Ranks
from swirl_fast.training.checkpoint import Checkpoints, load_weights, named
torch.set_num_threads(1)
REWARDS = [0.2, 0.9, 0.5, 0.95, 0.99]
STEPS = len(REWARDS)
calls, armed, kill_at, reached = [], False, None, []

def watch(name):
    real = getattr(os, name)
    def called(*given, **options):
        if armed:
            if len(calls) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(name)
        return real(*given, **options)
    setattr(os, name, called)

for name in ("symlink", "rename", "replace", "unlink", "rmdir", "fsync"):
    watch(name)

def train(folder):
    global armed
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    with Checkpoints(folder, Ranks(0, 1, torch.device("cpu")), keep=2, best="reward") as checkpoints:
        state = checkpoints.load_latest(model, optimizer)
        for step in range((state or {"step": 0})["step"] + 1, STEPS + 1):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            checkpoints.measure({"reward": REWARDS[step - 1]})
            checkpoints.wait()
            armed = step == STEPS
            checkpoints.save(step, model, optimizer, {"step": step})
        checkpoints.wait()
        armed = False

def child(folder, at):
    global kill_at
    pid = os.fork()
    if not pid:
        try:
            kill_at = at
            train(folder)
            (folder.parent / "calls").write_text(json.dumps(calls))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def there(folder):
    kept = sorted(path.name for path in folder.iterdir())
    return [kept, os.readlink(folder / "best"), named(folder, "best").name, *map(exported, ("best", "step_000004"), [folder] * 2)]

def exported(name, folder):
    model = torch.nn.Linear(2, 2)
    load_weights(named(folder, name), model)
    return [parameter.flatten().tolist() for parameter in model.parameters()]

root, found = Path(sys.argv[1]), []
assert child(root / "none", None) == 0
names = json.loads((root / "calls").read_text())
for at, name in enumerate(names):
    code = child(root / str(at), at)
    taken = named(root / str(at), "best").name
    again = child(root / str(at), None)
    found.append([name, code, taken, again, there(root / str(at))])
print(json.dumps([there(root / "none"), found]))
"""


def test_a_kill_anywhere_in_the_last_write_leaves_no_trace(tmp_path: Path) -> None:
    done = forks.run(["-c", CODE, str(tmp_path)], environment(), timeout=200)
    assert done.returncode == 0, done.stderr
    undisturbed, found = json.loads(done.stdout.splitlines()[-1])
    assert undisturbed[:3] == [["best", "step_000004", "step_000005"], "step_000005", "step_000005"]
    assert undisturbed[3] != undisturbed[4], "weights of two steps"
    assert {name for name, *_ in found} >= {"symlink", "rename", "replace", "unlink", "fsync"}
    published = False
    for i, (name, code, taken, again, after) in enumerate(found):
        assert (code, again) == (-9, 0), (i, name)
        assert after == undisturbed, (i, name)
        published = published or taken == "step_000005"
        assert taken == ("step_000005" if published else "step_000004"), "what export takes, without a new start"
        assert name != "symlink" or published
    assert published
