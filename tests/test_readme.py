"""The example of README.md runs and learns."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_example_runs_and_learns(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    names: dict = {}
    exec(compile(code, str(README), "exec"), names)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [int(step) for step, _ in printed] == list(range(100, 1001, 100))
    assert float(printed[-1][1]) < 0.8 * float(printed[0][1])
    assert names["adapted"].keys() == names["params"].keys()
