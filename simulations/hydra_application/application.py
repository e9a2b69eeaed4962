"""A Hydra application of one's own that simulates a federation: with it come everybody's launchers and sweepers.

    python simulations/hydra_application/application.py experiment=debug privacy.epsilon=3
    python simulations/hydra_application/application.py -m experiment=debug seed=0,1 hydra/launcher=joblib

Each job of a launcher is a process that loads the model anew, which `fedtune simulate -m` does once; and what all jobs
together cost of privacy is added up by nobody but the person who starts them.
"""

import hydra
from omegaconf import DictConfig

import fedtune


@hydra.main(version_base="1.3", config_path=".", config_name="conf")
def main(config: DictConfig) -> float:
    run = fedtune.simulate(config)
    epsilon = run.result.privacy.epsilon
    print(f"{run.folder}: {run.result.final.metrics} at epsilon {epsilon:.3f}")
    return run.result.final.metrics[run.config.primary_metric]


if __name__ == "__main__":
    main()
