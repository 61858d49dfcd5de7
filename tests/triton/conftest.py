import pytest


@pytest.fixture
def wide_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of many lanes and channels: the same kernels, but fewer programs for the interpreter to step through."""
    from effnet_fast.passes.triton import configs

    for table in configs.TABLES.values():
        for key, config in table.items():
            monkeypatch.setitem(table, key, config._replace(lanes=64, channels=128))
