"""The examples of README.md run, and the first learns."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_example_runs_and_learns(capsys):
    learns, streams = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    names: dict = {}
    exec(compile(learns, str(README), "exec"), names)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [int(step) for step, _ in printed] == list(range(100, 1001, 100))
    assert float(printed[-1][1]) < 0.8 * float(printed[0][1])
    assert names["adapted"].keys() == names["params"].keys()
    exec(compile(streams, str(README), "exec"), names)
    assert capsys.readouterr().out == "(32, 75, 28, 28, 1)\n"
    names["tasks"].close()
