from tests.kit.comparison import home  # noqa: F401  (a fixture)
from tests.kit.questions import base, small, tasks_dir  # noqa: F401  (fixtures)
from tests.kit.sweep_report import made  # noqa: F401  (a fixture)
