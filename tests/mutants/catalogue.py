"""Every mutant, in the order of the page; and those that are quick enough for every run of the suite."""

from .at_site import AT_SITE
from .in_accounting import ACCOUNTING
from .in_cli import CLI_FAULTS
from .in_clipping import CLIPPING
from .in_data import DATA_FAULTS
from .in_deploy import DEPLOY_FAULTS
from .in_distributed_noise import DISTRIBUTED_NOISE
from .in_federation import FEDERATION_FAULTS
from .in_ledger import LEDGER_FAULTS
from .in_models import MODEL_FAULTS
from .in_noise import NOISE
from .in_report import REPORT_FAULTS
from .in_sampling import SAMPLING
from .in_secure_sum import SECURE_SUM_FAULTS
from .in_tasks import TASK_FAULTS
from .in_users import USER_FAULTS
from .mutant import Mutant

MUTANTS: dict[str, Mutant] = {
    mutant.name: mutant
    for mutant in (
        *(*NOISE, *DISTRIBUTED_NOISE, *CLIPPING, *SAMPLING, *ACCOUNTING, *LEDGER_FAULTS),
        *(*AT_SITE, *FEDERATION_FAULTS, *USER_FAULTS, *DATA_FAULTS, *MODEL_FAULTS),
        *(*TASK_FAULTS, *DEPLOY_FAULTS, *CLI_FAULTS, *REPORT_FAULTS, *SECURE_SUM_FAULTS),
    )
}
QUICK = ("no-noise", "shuffled-instead-of-poisson", "exact-scores")
"""Found by tests of a second or two that need no torch."""
