"""The commands that say what there is: presets, and the state of the installation."""

from jaxmaml.commands.mistakes import SUCCESS, user_errors
from jaxmaml.commands.session import session
from jaxmaml.experiments import options, presets


def list_presets(name: options.OptionalPreset = "") -> int:
    """List the presets, or show the settings of one.

    For example:

        jaxmaml presets
        jaxmaml presets omniglot-5w1s
    """
    from jaxmaml.experiments import tables

    if not name:
        tables.console().print(tables.presets_table(presets.PRESETS.values()))
        return SUCCESS
    with user_errors():
        preset = presets.get(name)
    tables.console().print(tables.settings_table(preset))
    return SUCCESS


def doctor(*, data_dir: options.DataDir = None) -> int:
    """Show versions, devices, caches, datasets, and what each preset needs.

    For example:

        jaxmaml doctor
    """
    from jaxmaml.data import datasets, preparation
    from jaxmaml.experiments import availability, tables
    from jaxmaml.experiments.progress import Display

    with session("highest"), user_errors(), Display():
        directory = datasets.data_directory(data_dir)
        found = preparation.listing(data_dir)
        prepared = {one.name for one in found if not one.problem}
        needs = {
            preset.name: availability.missing(preset, prepared)
            for preset in presets.PRESETS.values()
        }
        parts = {
            "versions": availability.versions(),
            "devices": availability.devices(),
            "extras": {
                extra: "installed" if there else f"pip install 'jaxmaml[{extra}]'"
                for extra, there in availability.extras().items()
            },
            "caches": {
                cache.name: f"{cache.path}, {cache.num_bytes / 2**20:,.0f} MiB"
                for cache in availability.caches()
            },
            f"datasets in {directory}": {
                one.name: one.problem or f"{one.num_classes:,} classes" for one in found
            },
            "presets": {name: need or "ready" for name, need in needs.items()},
        }
    # A title is a line of its own: a long path in the table would leave no room for the facts.
    console = tables.console()
    for title, rows in parts.items():
        console.print(title, style="bold", soft_wrap=True, markup=False, highlight=False)
        console.print(tables.facts_table(rows or {"none": ""}), highlight=False)
    return SUCCESS
