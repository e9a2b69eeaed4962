"""`pkg://fedtune.conf` and `fedtune_schema` in a user's own Hydra application."""

from importlib import import_module
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from fedtune.api.compose import compose_recipe, compose_run


def test_registered_schema_lets_hydra_check_types(tmp_path: Path) -> None:
    defaults = "defaults: [fedtune_schema, config, _self_]\nhydra: {searchpath: [pkg://fedtune.conf]}\n"
    (tmp_path / "conf.yaml").write_text(defaults)
    import_module("fedtune.conf")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        config = compose("conf", overrides=["experiment=debug", "privacy.epsilon=3"])
        assert compose_recipe(config, {"name": "x"}) == compose_run(["experiment=debug", "privacy.epsilon=3", "name=x"])
        with pytest.raises(HydraException, match="epsilon=much"):
            compose("conf", overrides=["privacy.epsilon=much"])
