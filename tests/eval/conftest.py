from tests.kit.sweep_report import made  # noqa: F401  (a fixture)
