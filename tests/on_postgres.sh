#!/usr/bin/env bash
# The site's tests against a PostgreSQL server and a Redis server of their own, both ended afterwards.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
pg=$(find /usr/lib/postgresql -name initdb -printf '%h\n' 2>/dev/null | sort -V | tail -1)
[ -n "$pg" ] || { echo 'PostgreSQL is not installed: apt-get install postgresql'; exit 1; }
command -v redis-server >/dev/null || { echo 'Redis is not installed: apt-get install redis-server'; exit 1; }

as_postgres() { # PostgreSQL refuses to run as root
  if [ "$(id -u)" = 0 ]; then setpriv --reuid=postgres --regid=postgres --init-groups "$@"; else "$@"; fi
}
[ "$(id -u)" = 0 ] && chown postgres "$folder"
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
finish() {
  as_postgres "$pg/pg_ctl" -D "$folder/pg" -m immediate stop >/dev/null 2>&1 || true
  [ -f "$folder/redis.pid" ] && kill "$(cat "$folder/redis.pid")" 2>/dev/null || true
  rm -rf "$folder"
}
trap finish EXIT

as_postgres "$pg/initdb" -D "$folder/pg" -U kangaroo -A trust >/dev/null
as_postgres "$pg/pg_ctl" -D "$folder/pg" -w -l "$folder/pg.log" \
  -o "-p $port -k $folder -c listen_addresses=127.0.0.1 -c fsync=off" start >/dev/null
mkdir -p "$folder/redis" && chmod 755 "$folder"
redis-server --port 0 --unixsocket "$folder/redis.sock" --dir "$folder/redis" --save '' --appendonly no \
  --daemonize yes --pidfile "$folder/redis.pid" >/dev/null
until redis-cli -s "$folder/redis.sock" ping >/dev/null 2>&1; do sleep 0.1; done

export DATABASE_URL="postgres://kangaroo@127.0.0.1:$port/postgres" REDIS_URL="unix://$folder/redis.sock"
# What an SSH server, a trainer or pure arithmetic does is the same whatever the database.
left_out=()
for name in addresses agent compare credentials figures gpu_hosts_faults gpu_hosts_gpus gpu_hosts_trainer \
  gpu_hosts_trouble keeper trainer_contract transport; do
  left_out+=(--ignore "tests/experiments/test_$name.py")
done
# `make run` as on a fresh machine is always on SQLite and the embedded broker.
for test in the_first_start_runs_an_experiment_and_the_second_does_not \
  ending_the_site_ends_no_training_and_the_next_start_takes_it_up whatever_is_killed_comes_back \
  a_killed_supervisor_leaves_nothing_behind_but_training a_port_in_use_is_named_with_a_way_out \
  a_second_supervisor_in_the_same_folder_is_refused a_folder_that_cannot_be_written_is_named_with_a_way_out; do
  left_out+=(--deselect "tests/experiments/test_up.py::test_$test")
done
.venv/bin/python -m pytest tests/accounts tests/experiments "${left_out[@]}" "$@"
