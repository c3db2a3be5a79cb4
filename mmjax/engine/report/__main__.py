"""Makes the report of a run and prints its path: `python -m mmjax.engine.report WORKDIR`."""

import sys

from mmjax.engine import report
from mmjax.errors import UserError

if len(sys.argv) != 2:
    sys.exit('usage: python -m mmjax.engine.report WORKDIR')
try:
    print(report.write(sys.argv[1]))
except UserError as error:
    sys.exit(f'mmjax: {error}')
