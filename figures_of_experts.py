"""Figures of analyses."""


def of_run(analysis):
    return {}
