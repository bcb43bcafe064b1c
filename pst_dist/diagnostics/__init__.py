"""Checks before you spend compute, and a view of a run; changes nothing in a run.

    pst check          rows, rows_page, answer_types; starter writes a config
    pst preview        tokens
    pst probe          probe, probe_labels, probe_report, linear_probe
    pst plan           cost, cost_page, counted_rows, gpus, measure
    pst run --dry-run  dry_run, preflight, machine
    pst watch          watch, watch_page
    pst verify         artefacts

May import everything below the pipeline.
"""
