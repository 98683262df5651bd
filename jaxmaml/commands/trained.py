"""The commands that use what was trained."""

import dataclasses

from jaxmaml.commands.mistakes import SUCCESS, check_matplotlib, user_errors
from jaxmaml.commands.session import session
from jaxmaml.experiments import options

_AS_TRAINED = options.TaskOptions()


def evaluate(
    run_dir: options.RunDirectory,
    *,
    num_test_tasks: options.NumTestTasks = 600,
    data_dir: options.OwnDataDir = None,
    tasks: options.TaskOptions = _AS_TRAINED,
) -> int:
    """Test the saved runs of a directory on their own tasks or on others.

    For example:

        jaxmaml evaluate runs/first
        jaxmaml evaluate runs/first --num-test-tasks 2000 --shot 5
    """
    from jaxmaml.experiments import reevaluate, tables
    from jaxmaml.experiments.progress import Display
    from jaxmaml.experiments.run_dir import RunDir

    with user_errors():
        config = RunDir(run_dir).read_config()
        options.check_data_dir(tasks.dataset or config["preset"]["dataset"], data_dir)
    with session(config["matmul_precision"]), Display():
        with user_errors():
            restored = reevaluate.restore(
                run_dir,
                num_test_tasks=num_test_tasks,
                data_dir=data_dir,
                **dataclasses.asdict(tasks),
            )
        table = reevaluate.scores_table(restored, num_test_tasks)
    tables.console().print(table)
    return SUCCESS


def adapt(run_dir: options.RunDirectory, *, files: options.AdaptOptions) -> int:
    """Adapt a trained run to new classes or points, and predict.

    For example, with a folder of pictures per class in `cats-and-dogs`:

        jaxmaml adapt runs/pets --support cats-and-dogs --images album
        jaxmaml adapt runs/sinusoid --support points.csv --points x.csv
    """
    check_matplotlib()
    from jaxmaml.experiments import serving, trained
    from jaxmaml.experiments.progress import Display
    from jaxmaml.experiments.run_dir import RunDir, preset_of

    with user_errors():
        config = RunDir(run_dir).read_config()
        request = serving.Request(
            files.support, files.images, files.points,
            files.out or serving.default_out(run_dir, files.run), files.export,
        )  # fmt: skip
        serving.check(request, preset_of(config))
    with session(config["matmul_precision"]), user_errors(), Display():
        served = serving.serve(
            trained.load(run_dir, files.run), request,
            num_inner_steps=files.num_inner_steps, statistics=files.statistics,
        )  # fmt: skip
        paths = serving.write(request, served)
    print(serving.report(served.adapted, paths, len(served.table) - 1))
    return SUCCESS


def report(run_dirs: options.RunDirectories, *, out: options.ReportFolder = None) -> int:
    """Write a report of runs: HTML, Markdown, pictures, a LaTeX table.

    For example:

        jaxmaml report runs/first runs/exact --out report
    """
    check_matplotlib()
    from jaxmaml.experiments.progress import Display
    from jaxmaml.experiments.report import writing

    with user_errors(), Display():
        page = writing.write(run_dirs, out)
    print(page)
    return SUCCESS
