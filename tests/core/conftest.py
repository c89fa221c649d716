from tests.pipelines.conftest import pipe, seeded

__all__ = ["pipe", "seeded"]
