"""The report of runs: `saved_runs` reads them, `contents` says what is shown, `html` and `markdown` how.

`writing` puts both, the pictures and a LaTeX table into a folder.
"""
