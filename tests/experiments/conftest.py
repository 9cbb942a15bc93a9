from tests.live import live, queue, trainers

__all__ = ["live", "queue", "trainers"]
