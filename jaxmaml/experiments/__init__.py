"""The application behind the commands: presets, runs, run directories, tables and plots.

This package is not public API: its names may change with every release. The library does not import
it. What a module is for:

- `domains`: the three domains and their scores; `settings`: what each setting means and when it has
  an effect; `ranges`: which values it may have; `presets`: the settings of each benchmark; `options`:
  the options of the command line.
- `networks`: the network of a preset as pure functions; `learners`: the learners by name, and what
  each of them can do; `candidates`: a learner that is built for a run.
- `tasks`: the train, val and test sources of a preset; `experiment`: what all runs of a preset share;
  `agents`: what those of reinforcement learning add; `devices` and `joining`: the devices and the
  processes of a run.
- `run`: trains and tests one candidate; `training`: its steps, validations, selection and
  checkpoints; `scoring`: its scores; `references`: the numbers beside them; `seeds`: runs of several
  seeds; `probes`: what else is measured.
- `run_dir`: every file of a run directory; `results`: the contents of results.json; `recorder`: its
  metrics along the runs; `resuming`: whether it is continued; `interruption`: signals; `provenance`:
  versions, commit and device.
- `trained`: a run that is loaded, adapts and predicts; `supports`: checks of what it is given;
  `portable`: its export; `serving`: the same from files to files, with `points` for CSV and `gallery`
  for the picture.
- `program_cache`: the compiled programs that one command keeps for the next.
- `progress`: what a command shows while it works; `messages`: its lines on standard error;
  `native_output`: those of compiled libraries; `availability`: what is installed and prepared;
  `event_files`: the metrics for TensorBoard; `report`: a package that writes a report of run
  directories.
- `compare` and `reevaluate`: the commands; `unseen`: the classes of a test again; `tables`: what they
  print; `figures`: what they draw, by means of `plots`, which draws plain numbers; `agent_figures` and
  `agent_plots`: of policies.
"""
