from tests.hosted import site
from tests.live import live, queue, trainers
from tests.sshd import keeper, login, owner, python_there, sshd

__all__ = ["keeper", "live", "login", "owner", "python_there", "queue", "site", "sshd", "trainers"]
